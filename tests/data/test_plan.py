"""The order of scenes: fair, endless, shuffled, and the same however it is asked for."""

import collections
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_jax.data.plan import TrainPlan, ValidationPlan, augmentation

_SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(sizes=_SIZES, batch_size=st.integers(1, 5), seed=st.integers(0, 3))
def test_every_scene_is_seen_equally_often(sizes, batch_size, seed):
    """After a whole cycle each scene was shown as often as any other, give or take one, whatever its bucket."""
    plan = TrainPlan(sizes, batch_size, seed)
    cycle = sum(sizes) // int(np.gcd.reduce(sizes))
    seen = collections.Counter()
    passes = collections.defaultdict(list)
    for step in range(3 * cycle):
        batch = plan[step]
        assert len(batch.scenes) == batch_size
        assert batch.first_turn == len(passes[batch.bucket])
        passes[batch.bucket] += batch.scenes
        seen.update((batch.bucket, scene) for scene in batch.scenes)
    assert len(seen) <= sum(sizes)
    for bucket, size in enumerate(sizes):
        for start in range(0, len(passes[bucket]) - size + 1, size):
            assert sorted(passes[bucket][start : start + size]) == list(range(size))  # one shuffled pass after another
    mean = 3 * cycle * batch_size / sum(sizes)
    assert all(abs(count - mean) < 1 for count in seen.values())


def test_steps_can_be_asked_for_in_any_order():
    plan, again = TrainPlan((5, 3), 4, 1), TrainPlan((5, 3), 4, 1)
    forward = [plan[step] for step in range(40)]
    assert [again[step] for step in reversed(range(40))] == forward[::-1]


def test_seed_and_pass_change_the_order():
    def scenes(seed):
        return [scene for step in range(4) for scene in TrainPlan((20,), 10, seed)[step].scenes]

    assert scenes(0) != scenes(1)
    assert scenes(0)[:20] != scenes(0)[20:]
    assert scenes(0)[:20] != sorted(scenes(0)[:20])


def test_buckets_are_mixed():
    order = [TrainPlan((8, 8), 1, 0)[step].bucket for step in range(64)]
    assert collections.Counter(order) == {0: 32, 1: 32}
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes > 16  # a fair coin would change about 32 times


@settings(deadline=None)
@given(sizes=_SIZES, batch_size=st.integers(1, 5))
def test_validation_shows_each_scene_once(sizes, batch_size):
    plan = ValidationPlan(sizes, batch_size)
    batches = [plan[step] for step in range(len(plan))]
    assert all(len(batch.scenes) == batch_size for batch in batches)
    shown = [(batch.bucket, scene) for batch in batches for scene in batch.scenes if scene is not None]
    assert shown == [(bucket, scene) for bucket, size in enumerate(sizes) for scene in range(size)]


def test_every_showing_has_its_own_randomness():
    draws = {augmentation(0, bucket, turn).random() for bucket in range(3) for turn in range(50)}
    assert len(draws) == 150
    assert augmentation(0, 1, 7).random() == augmentation(0, 1, 7).random() != augmentation(1, 1, 7).random()
