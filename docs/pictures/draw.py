"""Draws every picture of the documentation anew: `make pictures`."""

import pathlib
import sys

import scene

HERE = pathlib.Path(__file__).parent
PICTURES = {"scene.svg": scene.draw}


def main(folder: pathlib.Path = HERE) -> None:
    """Writes all pictures into `folder`."""
    for name, draw in PICTURES.items():
        draw(folder / name)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
