"""Draws every picture of the documentation: `make pictures`."""

import pathlib
import sys

import house
import scene
import walk

HERE = pathlib.Path(__file__).parent
PICTURES = {
    "scene.svg": scene.draw,
    "kernels.svg": walk.draw,
    "house.svg": house.draw_layers,
    "flow.svg": house.draw_flow,
}


def main(folder: pathlib.Path = HERE) -> None:
    """Writes all pictures into `folder`."""
    for name, draw in PICTURES.items():
        draw(folder / name)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
