"""How tokens are dealt to devices: everybody's share is equal, nothing is lost, and queries are runs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.accounting import account, group_pairs
from moc_jax.attention.deal import Deal, head_groups
from moc_jax.attention.layout import queries_of
from moc_jax.config import ChunkConfig, ConfigError, MoCConfig
from moc_jax.scene import SceneLengths, SceneShape, chunk_table

SIZES = [(7, 9), (16, 8), (1, 1)]  # frames, tokens of each
FRAMES = np.arange(16)[None]
SPLITS = [(1, 4, 1), (1, 4, 2), (2, 2, 2), (4, 1, 1), (8, 2, 1)]  # groups of tokens and heads, sharing


def deal_of(frames, frame, groups, heads, sharing, text=11):
    shape = SceneShape(shots=3, frames=frames, rows=1, columns=frame, text_tokens=text)
    return Deal.of(shape, groups=groups, head_groups=heads, sharing=sharing)


def dealt_of(deal, video, frames):
    dealt = deal.dealt(video)
    return dealt, deal.restored(dealt), deal.of_pieces(frames)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("split", SPLITS)
def test_what_is_dealt_comes_back_and_shares_are_equal(sizes, split):
    deal = deal_of(*sizes, *split)
    video = np.arange(math.prod(sizes))[None] + 100
    dealt, back, frames = (
        np.asarray(x) for x in jax.jit(lambda x, f: dealt_of(deal, x, f))(video, FRAMES[:, : sizes[0]])
    )
    assert dealt.shape == (1, deal.video_rows)
    assert deal.video_rows % math.prod(split) == 0
    assert deal.text_rows % math.prod(split) == 0
    np.testing.assert_array_equal(back, video)
    # Pieces are of one frame each, so that what frames have is given to pieces.
    of_tokens = np.repeat(frames[0], deal.video_rows // frames.shape[1])
    real = dealt[0] > 0
    np.testing.assert_array_equal(of_tokens[real], (dealt[0][real] - 100) // sizes[1])


@pytest.mark.parametrize(
    ("sizes", "split", "rows"), [((200, 900), (8, 8, 1), 200 * 904), ((200, 900), (1, 4, 1), 180_000)]
)
def test_little_is_added(sizes, split, rows):
    assert deal_of(*sizes, *split).video_rows == rows


@pytest.mark.parametrize("chunk", [ChunkConfig(unit="frames", size=1), ChunkConfig(size=7, remainder="tail")])
@pytest.mark.parametrize("groups", [4, 16])
def test_a_groups_queries_are_found_as_from_their_chunks(chunk, groups):
    shape = SceneShape(shots=3, frames=7, rows=3, columns=3, text_tokens=11)
    lengths = SceneLengths(jnp.array([[4, 1, 1], [7, 0, 0]]), jnp.array([[3, 2, 0, 5], [1, 10, 0, 0]]))
    table = chunk_table(lengths, shape, chunk)
    deal = Deal.of(shape, groups=groups, head_groups=2, sharing=1)
    seen = np.zeros(shape.tokens, int)

    @jax.jit
    def both(group):
        queries = deal.queries(table, group)
        return queries, queries_of(table, queries.chunk_of)

    for group in range(groups):
        queries, expected = jax.device_get(both(group))
        held = np.asarray(expected.length) > 0
        np.testing.assert_array_equal(queries.length, expected.length)
        np.testing.assert_array_equal(np.asarray(queries.start)[held], np.asarray(expected.start)[held])
        rows = np.asarray(queries.row)
        assert (np.diff(rows[queries.first_video :]) > 0).all()
        np.add.at(seen, rows[rows < shape.tokens], 1)
    assert (seen > 0).all()


@pytest.mark.parametrize("shots", [(64, 0, 0), (50, 7, 7), (20, 20, 10)], ids=str)  # the last: with padding
@pytest.mark.parametrize("groups", [4, 32])
def test_groups_attend_to_as_many_pairs_whatever_the_shots(shots, groups):
    shape = SceneShape(shots=3, frames=64, rows=30, columns=30, text_tokens=504)
    cfg = MoCConfig(chunk=ChunkConfig(size=1280))
    table = uniform_table(shape, shots, cfg.chunk)
    pairs = group_pairs(table, cfg, Deal.of(shape, groups=groups, head_groups=8, sharing=1))
    assert pairs.shape == (1, groups)
    assert pairs.max() < 1.01 * pairs.mean()
    alone = group_pairs(table, cfg, Deal.of(shape, groups=1, head_groups=8, sharing=1))
    assert alone.item() == pytest.approx(account(table, cfg, 128).expected_pairs, rel=1e-9)
    added = groups * Deal.of(shape, groups=groups, head_groups=8, sharing=1).part / 900
    assert pairs.sum() == pytest.approx(added * alone.item(), rel=2e-2)


def uniform_table(shape, shots, chunk):
    lengths = SceneLengths(jnp.array([shots]), jnp.array([[100, 100, 50, 50]]))
    return jax.jit(chunk_table, static_argnums=(1, 2))(lengths, shape, chunk)


def test_heads_are_cut_into_as_many_groups_as_divide_them_and_the_devices():
    found = {heads: [head_groups(heads, devices) for devices in (8, 12, 64)] for heads in (8, 10, 12, 14, 24, 40)}
    assert found == {8: [8, 4, 8], 10: [2, 2, 2], 12: [4, 12, 4], 14: [2, 2, 2], 24: [8, 12, 8], 40: [8, 4, 8]}
    assert head_groups(24, 8, wanted=2) == 2
    with pytest.raises(ConfigError, match=r"attention.head_groups = 5 must divide the 12 heads .* = 8; 0 takes 4"):
        head_groups(12, 8, wanted=5)
