"""What routing tells the kernels of all chips."""

import numpy as np
import pytest
from hypothesis import given, settings

from moc_jax.attention import routing
from tests.attention.configs import EVERY, name
from tests.attention.scenes import random_scenes, table_of

MOC = [cfg for cfg in EVERY if cfg.mode == "moc"]


@pytest.mark.parametrize("cfg", MOC, ids=name)
@settings(deadline=None, max_examples=5)
@given(scenes=random_scenes())
def test_two_runs_of_chunks_are_the_candidates(cfg, scenes):
    table = table_of(scenes)
    first, second, end = (np.asarray(x)[..., None] for x in routing.candidate_runs(table, cfg))
    chunk = np.arange(table.kind.shape[1])
    runs = (chunk < first) | ((chunk >= second) & (chunk < end))
    pickable = np.asarray(routing.pickable_chunks(table))
    np.testing.assert_array_equal(runs & pickable[:, None], routing.candidate_chunks(table, cfg))
    if cfg.causal_routing or cfg.self_anchor == "none":  # what the kernel takes for granted
        np.testing.assert_array_equal(runs, chunk < first)
