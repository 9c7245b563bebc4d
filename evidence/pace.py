"""How fast one core makes stories.

python -m evidence.pace             # of the full and the still world
python -m evidence.pace --settings long --stories 2
"""

import dataclasses
import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import tyro

from benchmarks.tables import markdown
from evidence import dataset
from evidence.exam import candidates
from evidence.settings import SETTINGS
from evidence.stories import Stories


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Of which worlds, and how many stories."""

    settings: tuple[str, ...] = ("full", "still")
    stories: int = 40


def main(args: Arguments) -> None:
    """Prints milliseconds of processor time for each story; to be run with OMP_NUM_THREADS=1."""
    rows = []
    for name in args.settings:
        setting = SETTINGS[name]
        world, seeds = setting.world, range(args.stories)
        codec = dataset.fit(world, setting.codec, 4)
        with tempfile.TemporaryDirectory() as place:
            file = pathlib.Path(place, "latents.npy")
            dataset.open_rows(world, codec, file, seeds)
            rendered = _milliseconds(functools.partial(_rendered, world), seeds)
            encoded = _milliseconds(functools.partial(dataset.encode, world, codec, file, seeds), seeds)
        asked = _milliseconds(functools.partial(candidates, world, codec), seeds[: max(1, len(seeds) // 8)])
        frames = world.shots * world.frames / rendered
        rows.append([name, f"{1e3 * frames:,.0f}", *(f"{ms:.1f}" for ms in (rendered, encoded, asked))])
    head = ["world", "frames rendered a second", "ms to render a story", "and encode it", "candidates of its recalls"]
    print("\n".join(markdown(head, rows)))


def _rendered(world: Stories, seed: int) -> None:
    world.story(seed).render()


def _milliseconds(work: Callable[[int], object], seeds: Sequence[int]) -> float:
    """Of processor time, for each seed; the first is done once before."""
    work(seeds[0])
    begin = time.process_time()
    for seed in seeds:
        work(seed)
    return 1e3 * (time.process_time() - begin) / len(seeds)


def run(argv: Sequence[str]) -> None:
    """The command line."""
    main(tyro.cli(Arguments, args=list(argv), description=__doc__))


if __name__ == "__main__":
    run(sys.argv[1:])
