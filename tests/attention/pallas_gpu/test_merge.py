"""Merging parts by log-sum-exp: one softmax over all, nothing for none, and no NaN is lost on the way."""

import jax.numpy as jnp
import numpy as np

from moc_jax.attention.pallas_gpu.attend import Part, merge

ROWS = np.random.default_rng(0).standard_normal((2, 1, 1, 4, 8)).astype(np.float32)
LSE = np.float32([[1.0, -300.0, 5.0, 700.0], [3.0, -300.5, np.nan, 699.0]])


def parts(*there, lse=LSE):
    """Two parts of four queries; part i is there for the queries of there[i], its other rows were never written."""
    found = []
    for rows, sums, mine in zip(ROWS, lse, there, strict=True):
        mine = np.asarray(mine, bool)
        rows = jnp.asarray(np.where(mine[:, None], rows, np.nan))
        sums = jnp.asarray(np.where(mine, sums, np.nan))[None, None]
        found.append(Part(rows, jnp.arange(4)[None, :, None], jnp.asarray(mine)[None, :, None], 0, sums))
    return found


def test_parts_weigh_by_their_share():
    out, lse = merge(parts([1, 1, 1, 1], [1, 1, 0, 1]), 1, jnp.float32)
    for query, used in ((0, (0, 1)), (1, (0, 1)), (2, (0,)), (3, (0, 1))):
        sums = np.float64([LSE[i, query] for i in used])
        weights = 2 ** (sums - sums.max())
        want = sum(w * ROWS[i, 0, 0, query] for w, i in zip(weights, used)) / weights.sum()
        np.testing.assert_allclose(out[0, query, 0], want, rtol=1e-6)
        np.testing.assert_allclose(lse[0, 0, query], sums.max() + np.log2(weights.sum()), rtol=1e-6)


def test_no_part_is_zero():
    out, lse = merge(parts([0, 0, 0, 1], [0, 0, 0, 0]), 1, jnp.float32)
    np.testing.assert_array_equal(out[0, :3], 0)
    np.testing.assert_array_equal(lse[0, 0, :3], -np.inf)


def test_a_part_that_is_nan_makes_its_query_nan():
    out, lse = merge(parts([1, 1, 1, 1], [1, 1, 1, 1]), 1, jnp.float32)
    assert np.isnan(out[0, 2]).all()
    assert np.isnan(lse[0, 0, 2])
    assert np.isfinite(out[0, [0, 1, 3]]).all()
