"""Which scenes each batch holds: a pure function of its number, so any batch can be computed without the others.

That makes the order independent of workers and processes, and a resumed run exact.
"""

import dataclasses
import functools
import itertools
import sys

import numpy as np

_SHUFFLE, _MIX, _AUGMENT = range(3)  # what a random stream is for


@dataclasses.dataclass(frozen=True)
class Batch:
    """The scenes of one batch, all of one bucket."""

    bucket: int
    scenes: tuple[int | None, ...]
    """Numbers within the bucket; None: nothing is left to fill this row."""
    first_turn: int
    """How many scenes were taken from the bucket before this batch."""


class TrainPlan:
    """Endless batches. A bucket's stream is one shuffled pass over its scenes after another.

    So a bucket with fewer scenes than a batch repeats them, and none is left over. A cycle holds, in shuffled order,
    batches of each bucket in proportion to its scenes: after it, all scenes were seen equally often.
    """

    def __init__(self, sizes: tuple[int, ...], batch_size: int, seed: int):
        self._sizes, self._batch_size, self._seed = sizes, batch_size, seed
        divisor = int(np.gcd.reduce(sizes))
        self._per_cycle = tuple(size // divisor for size in sizes)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        cycle, place = divmod(index, sum(self._per_cycle))
        order = _cycle_order(self._seed, self._per_cycle, cycle)
        bucket = int(order[place])
        number = cycle * self._per_cycle[bucket] + int(np.count_nonzero(order[:place] == bucket))
        first = number * self._batch_size
        scenes = tuple(self._scene(bucket, turn) for turn in range(first, first + self._batch_size))
        return Batch(bucket, scenes, first)

    def _scene(self, bucket: int, turn: int) -> int:
        if self._sizes[bucket] == 1:  # no order to make for each of a large batch's passes
            return 0
        epoch, place = divmod(turn, self._sizes[bucket])
        return int(_epoch_order(self._seed, bucket, self._sizes[bucket], epoch)[place])


class ValidationPlan:
    """Every scene once, in order; a bucket's last batch is filled up with None."""

    def __init__(self, sizes: tuple[int, ...], batch_size: int):
        self._batches = [
            Batch(bucket, scenes + (None,) * (batch_size - len(scenes)), scenes[0])
            for bucket, size in enumerate(sizes)
            for scenes in itertools.batched(range(size), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        return self._batches[index]


def augmentation(seed: int, bucket: int, turn: int) -> np.random.Generator:
    """The random stream for one showing of one scene."""
    return _random(seed, _AUGMENT, bucket, turn)


@functools.lru_cache(maxsize=4)
def _cycle_order(seed: int, per_cycle: tuple[int, ...], cycle: int) -> np.ndarray:
    return _random(seed, _MIX, cycle).permutation(np.repeat(np.arange(len(per_cycle)), per_cycle))


@functools.lru_cache(maxsize=64)
def _epoch_order(seed: int, bucket: int, size: int, epoch: int) -> np.ndarray:
    return _random(seed, _SHUFFLE, bucket, epoch).permutation(size)


def _random(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)))
