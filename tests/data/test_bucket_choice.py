"""The shapes of least cost: against every way to cut the sorted scenes into intervals."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_jax.config import BucketConfig
from moc_jax.data.bucket_choice import best_shapes, video_tokens

SIZES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=9)


def _cost(groups, per_frame) -> int:
    maxima = [np.max(group, axis=0) for group in groups]
    return sum(len(g) * (m[2] + video_tokens(int(m[1]), per_frame)) for g, m in zip(groups, maxima))


def _least(sizes, per_frame, most) -> int:
    """Over all partitions into at most so many intervals of the distinct frame counts."""
    by_frames = [[s for s in sizes if s[1] == f] for f in sorted({s[1] for s in sizes})]
    least = None
    for parts in range(1, min(most, len(by_frames)) + 1):
        for cuts in itertools.combinations(range(1, len(by_frames)), parts - 1):
            groups = [[*itertools.chain(*by_frames[a:b])] for a, b in itertools.pairwise([0, *cuts, len(by_frames)])]
            least = min(_cost(groups, per_frame), least or 10**9)
    return least


@settings(max_examples=200, deadline=None)
@given(SIZES, st.sampled_from([0.5, 1.0, 6.0, 240.0]), st.integers(1, 5))
def test_no_partition_is_cheaper(sizes, per_frame, most):
    array = np.array(sizes)
    chosen = best_shapes(array, per_frame, most)
    assert [len(shapes) for shapes in chosen] == list(range(1, len(chosen) + 1))
    for shapes in chosen:
        groups = {shape: [] for shape in shapes}
        for scene in sizes:  # into the first that holds its frames; shots and text must fit there, too
            shape = next(s for s in shapes if s.frames >= scene[1])
            assert shape.shots >= scene[0]
            assert shape.text_tokens >= scene[2]
            groups[shape].append(scene)
        for shape, group in groups.items():  # and no shape is larger than what it holds
            assert (
                BucketConfig(
                    shots=max(s[0] for s in group),
                    frames=max(s[1] for s in group),
                    text_tokens=max(s[2] for s in group),
                )
                == shape
            )
        assert _cost(groups.values(), per_frame) == _least(sizes, per_frame, len(shapes))
    assert _cost(_groups(chosen[-1], sizes), per_frame) == _least(sizes, per_frame, most)


def _groups(shapes, sizes):
    return [[s for s in sizes if next(b for b in shapes if b.frames >= s[1]) == shape] for shape in shapes]


def test_no_more_shapes_than_help():
    assert best_shapes(np.array([[1, 4, 8]] * 3), 6.0, 4) == [(BucketConfig(shots=1, frames=4, text_tokens=8),)]
    two = best_shapes(np.array([[1, 4, 8], [2, 9, 8]]), 6.0, 4)
    assert two[-1] == (BucketConfig(shots=1, frames=4, text_tokens=8), BucketConfig(shots=2, frames=9, text_tokens=8))
    assert len(two) == 2


@pytest.mark.parametrize("scenes", [1_000_000])
def test_a_million_scenes_take_seconds(scenes):
    random = np.random.default_rng(0)
    sizes = np.stack(
        [random.integers(1, 9, scenes), random.integers(2, 800, scenes), random.integers(9, 400, scenes)], 1
    )
    begin = time.thread_time()
    assert len(best_shapes(sizes, 240.0, 4)) == 4
    assert time.thread_time() - begin < 5  # it takes 0.2
