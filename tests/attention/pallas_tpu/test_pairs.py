"""Rows to slots and back, in the interpreter, against numpy's sort."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.layout import Heads
from moc_jax.attention.pallas_tpu import device, pairs
from moc_jax.attention.pallas_tpu.device import Chip
from moc_jax.attention.pallas_tpu.placement import STEP, span_size, step_rows
from moc_jax.attention.pallas_tpu.placement import place as place_pairs
from tests.attention.interpreter import interpreted, row_by_row

BATCH, HEADS, ROWS, PICKS, CHUNKS, DIM, TILE = 2, 2, 96, 3, 7, 16, 16
CHIP = Chip("v5e")
ALL_HEADS = Heads(0, HEADS)
EMPTY = 4  # a chunk of no length, which some pick


def draw_routes(seed, rows=ROWS):
    rng = np.random.default_rng(seed)
    routes = np.argsort(rng.random((BATCH, HEADS, rows, CHUNKS)), axis=-1)[..., :PICKS]
    routes[rng.random(routes.shape) < 0.3] = -1
    routes[0, 0, : rows // 2] = np.arange(PICKS)  # a crowd
    routes[1, 1] = -1  # nobody
    return routes.astype(np.int32)


def place(routes, span=64, step=32, buffers=2):
    lengths = jnp.where(jnp.arange(CHUNKS) == EMPTY, 0, 1)[None].repeat(BATCH, 0)
    most = routes.shape[2] * PICKS
    return place_pairs(jnp.swapaxes(routes, 2, 3), lengths, TILE, most, span=span, step=step, buffers=buffers)


def slots_of(placement, routes):
    """Slot of each pair [B, H, R, K], -1 for none, from runs and places as kernels read them."""
    p = placement
    slot = np.full(routes.shape, -1)
    places = np.asarray(p.places).reshape(BATCH, HEADS, -1, p.spans.picks, p.spans.step)
    runs = np.asarray(p.runs).reshape(BATCH, HEADS, -1, CHUNKS, 3)
    span = p.spans.steps * p.spans.step
    for b, h, n, k in np.ndindex(routes.shape):
        chunk = routes[b, h, n, k]
        at = places[b, h, n // p.spans.step, k, n % p.spans.step]
        if chunk < 0 or chunk == EMPTY:
            assert at == p.spans.room - 8
            continue
        rows, first, to = runs[b, h, n // span, chunk]
        assert first <= at < first + rows
        slot[b, h, n, k] = to + at - first
    return slot


def test_slots_are_a_sort_by_chunk(interpreter):
    routes = draw_routes(0)
    p = jax.jit(place)(jnp.asarray(routes))
    slot = slots_of(p, routes)
    for b, h in np.ndindex(BATCH, HEADS):
        used = slot[b, h][slot[b, h] >= 0]
        assert len(np.unique(used)) == len(used)
        for chunk in range(CHUNKS):
            mine = slot[b, h][(routes[b, h] == chunk) & (slot[b, h] >= 0)]
            assert (np.diff(mine) > 0).all(), "queries stay in order"
            begin, end = int(p.chunk_begin[b, h, chunk]), int(p.chunk_end[b, h, chunk])
            assert begin % TILE == 0
            assert ((mine >= begin) & (mine < end)).all()
            tiles = np.asarray(p.tile_chunk[b, h])[begin // TILE : -(-end // TILE)]
            assert (tiles == chunk).all()
        assert (np.asarray(p.tile_chunk[b, h]) >= 0).sum() == sum(
            -(-(int(e) - int(s)) // TILE) for s, e in zip(p.chunk_begin[b, h], p.chunk_end[b, h])
        )


@contextlib.contextmanager
def moved(one_by_one):
    with row_by_row() if one_by_one else contextlib.nullcontext(), interpreted():
        yield


@pytest.mark.long_for.with_args(jnp.float32)
@pytest.mark.parametrize(("one_by_one", "buffers"), [(False, 2), (True, 2), (False, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_spread(interpreter, dtype, one_by_one, buffers):
    """Every pair's row is at its slot, and what the tiles hold beyond is filled."""
    rows = 32 if one_by_one else ROWS
    spans = {32: 32, ROWS: 64 if buffers == 2 else ROWS}
    routes = draw_routes(1, rows)
    x = np.random.default_rng(2).standard_normal((BATCH, HEADS, rows, DIM)).astype(dtype)

    @jax.jit
    def run(routes, x):
        p = place(routes, span=spans[rows], buffers=buffers)
        return p, pairs.spread(x, p, ALL_HEADS, chip=CHIP, fill_first_lane=np.inf)

    with moved(one_by_one):
        p, got = run(routes, x)
    slot, got = slots_of(p, routes), np.asarray(got)
    for b, h in np.ndindex(BATCH, HEADS):
        want = np.zeros((p.slots, DIM), dtype)
        want[:, 0] = np.inf
        for n, k in np.argwhere(slot[b, h] >= 0):
            want[slot[b, h, n, k]] = x[b, h, n]
        used = np.repeat(np.asarray(p.tile_chunk[b, h]) >= 0, TILE)
        np.testing.assert_array_equal(got[b, h][used], want[used])


def packed(out, lse):
    bits = out.astype(np.float32).view(np.uint32) & 0xFFFF0000
    bits[..., : DIM // 2] |= lse.view(np.uint32)[..., None] >> 16
    bits[..., DIM // 2 :] |= lse.view(np.uint32)[..., None] & 0xFFFF
    return bits.view(np.float32)


def wide(out, lse):
    gap = np.zeros((*out.shape[:3], 128 - DIM), np.float32)
    return np.concatenate([out, gap, np.repeat(lse[..., None], 128, axis=-1)], axis=-1)


@pytest.mark.long_for.with_args(jnp.float32)
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize(
    ("dtype", "one_by_one", "buffers"),
    [(jnp.float32, False, 2), (jnp.bfloat16, False, 2), (jnp.bfloat16, False, 1), (jnp.bfloat16, True, 2)],
    ids=str,
)
def test_merge_and_add(interpreter, dtype, one_by_one, buffers, anchored):
    rows = 32 if one_by_one else ROWS
    routes, rng = draw_routes(3, rows), np.random.default_rng(4)
    p = jax.jit(lambda r: place(r, span=32 if one_by_one else 64, buffers=buffers))(routes)
    out = rng.standard_normal((BATCH, HEADS, p.slots, DIM)).astype(dtype).astype(np.float32)
    lse = 8 * rng.standard_normal((BATCH, HEADS, p.slots)).astype(np.float32)
    own = rng.standard_normal((BATCH, HEADS, rows, DIM)).astype(dtype)
    own_lse = 8 * rng.standard_normal((BATCH, HEADS, rows)).astype(np.float32)
    own_lse[:, :, ::5] = -np.inf
    own[:, :, ::5] = np.nan  # rows of nobody may hold anything

    @jax.jit
    def run(rows_, plain, own, own_lse, p):
        anchors = (own, own_lse) if anchored else None
        merged = pairs.merge(rows_, p, ALL_HEADS, anchors=anchors, dim=DIM, dtype=dtype, chip=CHIP)
        numbers = jnp.nan_to_num(own)
        return *merged, pairs.add(
            plain, p, ALL_HEADS, anchors=numbers if anchored else None, dtype=jnp.float32, chip=CHIP
        )

    with moved(one_by_one):
        got, got_lse, total = run((wide if dtype == jnp.float32 else packed)(out, lse), out, own, own_lse, p)

    slot = slots_of(p, routes)
    flat = np.maximum(slot, 0).reshape(BATCH, HEADS, -1)
    lses = np.where(slot >= 0, np.take_along_axis(lse, flat, 2).reshape(slot.shape), -np.inf)
    outs = np.take_along_axis(out, flat[..., None], 2).reshape(*slot.shape, DIM)
    if anchored:
        lses = np.concatenate([lses, own_lse[..., None]], axis=-1)
        outs = np.concatenate([outs, np.nan_to_num(own.astype(np.float32))[:, :, :, None]], axis=3)
    base = np.where(np.isfinite(lses.max(-1)), lses.max(-1), 0).astype(np.float64)
    weights = np.exp2(lses - base[..., None])
    sums = weights.sum(-1)
    want = (outs * (weights / np.where(sums == 0, 1, sums)[..., None])[..., None]).sum(3)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=1e-6 if dtype == jnp.float32 else 2e-2)
    some = sums > 0
    assert (np.asarray(got_lse)[~some] == -np.inf).all()
    np.testing.assert_allclose(np.asarray(got_lse)[some], (base + np.log2(np.where(some, sums, 1)))[some], atol=1e-5)
    there = np.where(slot[..., None] >= 0, outs[..., :PICKS, :], 0).sum(3)
    np.testing.assert_allclose(total, there + (np.nan_to_num(own.astype(np.float32)) if anchored else 0), atol=1e-5)


@pytest.mark.parametrize("chip", sorted(set(device.CHIPS.values())))
def test_windows_fit_the_chip(chip):
    for picks, width, chunks in ((5, 128, 154), (5, 256, 154), (8, 128, 400), (24, 128, 1161), (5, 128, 1253)):
        rows, buffers = span_size(200_000, picks, width, chunks, Chip(chip))
        assert rows % step_rows(200_704, rows) == 0
        assert step_rows(200_704, rows) in (512, STEP)
        buffer = 4 * width * (rows * picks + chunks * 7)
        assert buffers * buffer < Chip(chip).vmem_limit - 2**21


def test_many_chunks_have_one_buffer_where_vector_memory_is_short():
    """64 shots, 1.44 M tokens in chunks of 1 250: v4 has a quarter of the others' vector memory, or less."""
    assert span_size(1_500_000, 5, 128, 1253, Chip("v5e")) == (8192, 2)
    assert span_size(200_000, 5, 128, 154, Chip("v4")) == (2048, 2)
    assert span_size(1_500_000, 5, 128, 1253, Chip("v4")) == (2048, 1)


def test_more_chunks_than_vector_memory_has_room_for_are_refused():
    assert span_size(3_000_000, 5, 128, 2800, Chip("v4")) == (256, 1)
    with pytest.raises(NotImplementedError, match=r"3100 chunks and top_k 5 need 12\.\d MiB.* TPU v4 has 12\.0"):
        span_size(3_000_000, 5, 128, 3100, Chip("v4"))
