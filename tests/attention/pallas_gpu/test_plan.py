"""The plan's promises in integers: tiles cover tokens once, and their runs are the anchors, chunk by chunk.

For all tokens as queries, and for slices of them that begin anywhere: in text, in the middle of a chunk, with padding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_jax.attention import routing
from moc_jax.attention.layout import ALIGN, queries_of
from moc_jax.attention.pallas_gpu import plan as planning
from moc_jax.attention.pallas_gpu.device import Hopper, HopperTiling
from moc_jax.attention.pallas_gpu.tiles import ROWS, TILE
from tests.attention.configs import COVERING, EVERY, MULTI_SHOT, PAST, name
from tests.attention.oracle import Chunk
from tests.attention.scenes import CHUNKS, LONGEST_CHUNK, TEXT_TOKENS, TOKENS, random_scenes, table_of

# Lengths times 23: up to 391 tokens, at any place within the alignment of 8 and within a tile.
STRETCH = 23
SLICE = 203
WHOLE = HopperTiling().text_readers


def stretched(scenes):
    scenes = [[Chunk(c.kind, c.shot, STRETCH * c.start, STRETCH * c.length) for c in scene] for scene in scenes]
    text, tokens = STRETCH * TEXT_TOKENS, STRETCH * TOKENS
    return table_of(scenes, text_tokens=text, tokens=tokens, chunks=CHUNKS, max_chunk=STRETCH * LONGEST_CHUNK)


def padded(x, most=TILE):
    """A table or queries with the rows that `attend` gives the kernels."""
    rows = x.chunk_of.shape[1]
    more = max(rows + -rows % ALIGN, most + -most % TILE) - rows
    return dataclasses.replace(x, chunk_of=jnp.pad(x.chunk_of, ((0, 0), (0, more)), constant_values=-1))


@functools.cache
def compiled(cfg, text_readers):
    def run(table, query_chunk):
        queries = padded(queries_of(table, query_chunk))
        backend = Hopper(multiprocessors=132, tiling=HopperTiling(text_readers=text_readers))
        made = planning.anchor_tiles(queries, padded(table, max(table.text_tokens, TILE)), cfg, 2, backend)
        there = [(x > 0)[:, None] for x in (queries.length, table.length)]
        seen = routing.anchor_chunks(table, cfg) & jnp.swapaxes(there[0], 1, 2) & there[1]
        return made, seen, queries.chunk_of

    return jax.jit(run)


def token_pairs(seen, query_chunk, chunk_of):
    """[Q, N] for one scene: chunks that see chunks as tokens that see tokens."""
    return seen[np.ix_(query_chunk, chunk_of)] & (query_chunk >= 0)[:, None] & (chunk_of >= 0)[None, :]


def covered(line, rows):
    """How often each of `rows` tokens is in a tile's runs; begin >= end is an empty run."""
    count = np.zeros(rows, int)
    for begin, end in line[1:].reshape(-1, 2):
        assert begin >= end or (begin >= 0 and end <= rows), f"run [{begin}, {end}) of {rows} rows"
        if begin < end:
            count[begin:end] += 1
    return count


def check_starts(lines, rows):
    used = lines[lines[:, 0] >= 0]
    assert (used[:, 0] % ALIGN == 0).all()
    assert (used[:, 0] + TILE <= rows).all()


def check_plan(table, cfg, text_readers, part=slice(None)):
    """Of the queries in a slice of the table's tokens."""
    made, seen, query_chunk = jax.tree.map(
        np.asarray, compiled(cfg, text_readers)(table, None if part == slice(None) else table.chunk_of[:, part])
    )
    table = padded(table, max(table.text_tokens, TILE))
    if made is None:
        assert not seen.any()
        return made
    rows, tokens = query_chunk.shape[1], table.chunk_of.shape[1]
    assert np.array_equal(made.queries.table.shape[1:2], [1])
    for b, chunk_of in enumerate(np.asarray(table.chunk_of)):
        want = token_pairs(seen[b], query_chunk[b], chunk_of)

        lines = made.queries.table[b, 0]
        check_starts(lines, rows)
        reads = {g: covered(line, tokens) for g, line in enumerate(lines) if line[0] >= 0}
        assert all(read.any() for read in reads.values()), "a used tile of queries has at least one key"
        np.testing.assert_array_equal(made.anchored[b], want.any(axis=1))
        for query in np.flatnonzero(made.anchored[b]):
            tile, row = divmod(int(made.query_row[b, query]), TILE)
            assert lines[tile, 0] + row == query
            np.testing.assert_array_equal(reads[tile], want[query], err_msg=f"keys of query {query}")
        assert (made.query_row[b] >= 0).all()
        assert (made.query_row[b] < len(lines) * TILE).all()

        lines = made.keys.table[b, 0]
        check_starts(lines, tokens)
        read_by = {g: covered(line[:-4], rows) for g, line in enumerate(lines) if line[0] >= 0}
        check_turns(made, b, read_by)
        text_end = max((c.start + c.length for c in chunks_of(table, b) if c.kind == 1), default=0)
        for token in np.flatnonzero(chunk_of >= 0):
            tile, row = divmod(int(made.key_row[b, token]), TILE)
            assert lines[tile, 0] + row == token
            assert lines[tile, -2] <= token < lines[tile, -1]
            readers = read_by[tile]
            if token < text_end:  # its other readers are in the same tile of the other parts
                readers = sum(
                    (read_by[tile + p * made.text_tiles] for p in range(1, made.text_shares)), start=readers.copy()
                )
            np.testing.assert_array_equal(readers, want[:, token], err_msg=f"readers of token {token}")
        assert (made.key_row[b] < len(lines) * TILE).all()
    return made


def check_turns(made, b, read_by):
    """A tile's turn at each block of dq comes after those of all tiles before it that read some of the block."""
    before = np.zeros(made.earlier.shape[2], int)
    for tile in read_by:
        line = made.keys.table[b, 0, tile]
        group, place, first, last = line[-4:]
        reads = np.zeros(len(before), bool)
        for run, (begin, end) in enumerate(line[1:-4].reshape(-1, 2)):
            if begin < end:
                blocks = np.arange(begin // ROWS, -(-end // ROWS)) + run
                assert not reads[blocks].any(), "a tile reads a block once"
                reads[blocks] = True
                d_q_row = made.d_q_row[b, begin:end]
                assert set(d_q_row // ROWS) <= set(blocks)
                np.testing.assert_array_equal(d_q_row % ROWS, np.arange(begin, end) % ROWS)
        np.testing.assert_array_equal((made.earlier[b, group] + place)[reads], before[reads])
        before += reads
        assert max(line[0], first) < min(line[0] + TILE, last)
    read = made.d_q_row[b][made.anchored[b]]
    assert len(np.unique(read)) == len(read)


def chunks_of(table, b):
    return [
        Chunk(*(int(np.asarray(x)[b, c]) for x in (table.kind, table.shot, table.start, table.length)))
        for c in range(table.kind.shape[1])
    ]


PARTS = pytest.mark.parametrize("text_readers", [WHOLE, 500], ids=["whole", "parts"])


@pytest.mark.long_for(*(cfg for cfg in COVERING if cfg not in (MULTI_SHOT, PAST[1])))
@PARTS
@pytest.mark.parametrize("cfg", COVERING, ids=name)
@settings(deadline=None, max_examples=8)
@given(scenes=random_scenes())
def test_tiles_and_runs_are_the_anchors(cfg, text_readers, scenes):
    made = check_plan(stretched(scenes), cfg, text_readers)
    all_text = cfg.visibility == "scene" and (cfg.mode == "dense" or cfg.text_anchor == "all")
    if made is not None:
        assert made.text_shares == (0 if not all_text else 1 if text_readers == WHOLE else 3)


@pytest.mark.long_for(*(cfg for cfg in COVERING if cfg not in (MULTI_SHOT, PAST[1])))
@pytest.mark.parametrize("cfg", COVERING, ids=name)
@settings(deadline=None, max_examples=8)
@given(scenes=random_scenes(), begin=st.integers(0, STRETCH * TOKENS - SLICE))
def test_slices_that_begin_anywhere(cfg, scenes, begin):
    check_plan(stretched(scenes), cfg, 100, slice(begin, begin + SLICE))


@pytest.mark.parametrize("cfg", COVERING[::4], ids=name)
@settings(deadline=None, max_examples=8)
@given(scenes=random_scenes())
def test_scenes_smaller_than_a_tile(cfg, scenes):
    check_plan(table_of(scenes), cfg, WHOLE)


@pytest.mark.slow
@PARTS
@pytest.mark.parametrize("cfg", EVERY, ids=name)
@settings(deadline=None, max_examples=50)
@given(scenes=random_scenes(), begin=st.none() | st.integers(0, STRETCH * TOKENS - SLICE))
def test_every_config(cfg, text_readers, scenes, begin):
    check_plan(stretched(scenes), cfg, text_readers, slice(None) if begin is None else slice(begin, begin + SLICE))


# ------------------------------------------------------------------------------------------------ picks


@jax.jit
def picks_plan(table, routes):
    return planning.pick_tiles(routes, table)


@settings(deadline=None, max_examples=15)
@given(scenes=random_scenes())
def test_sorted_tiles_read_the_picked_chunks_and_chunks_their_pickers(scenes):
    """Whatever the routes are, those to empty chunks among them."""
    table = padded(stretched(scenes), STRETCH * TEXT_TOKENS)
    heads, picks, rows = 2, 3, table.chunk_of.shape[1]
    video = np.asarray(table.kind) == 2
    rng = np.random.default_rng(0)
    routes = rng.integers(-1, CHUNKS, (len(scenes), heads, rows, picks))
    for b in range(len(scenes)):
        routes[b][~np.isin(routes[b], np.flatnonzero(video[b]))] = -1
    made = jax.tree.map(np.asarray, picks_plan(table, jnp.asarray(routes, jnp.int32)))
    tiles, readers = made.queries, made.keys
    for b, h in np.ndindex(len(scenes), heads):
        lines, slots = tiles.table[b, h], made.slot_of_pair[b, ..., h].T
        placed = slots >= 0
        length = np.asarray(table.length)[b]
        np.testing.assert_array_equal(placed, (routes[b, h] >= 0) & (length[np.maximum(routes[b, h], 0)] > 0))
        assert len(np.unique(slots[placed])) == placed.sum(), "each pair has a slot of its own"
        chunk = routes[b, h][placed]
        its_line = lines[slots[placed] // TILE]
        np.testing.assert_array_equal(its_line[:, 0], slots[placed] // TILE * TILE)
        np.testing.assert_array_equal(its_line[:, 1], np.asarray(table.start)[b, chunk])
        np.testing.assert_array_equal(its_line[:, 2], its_line[:, 1] + length[chunk])

        lines = readers.table[b, h]
        check_starts(lines, rows)
        for token in np.flatnonzero(np.asarray(table.token_kind)[b] == 2):
            tile, row = divmod(int(made.key_row[b, token]), TILE)
            assert lines[tile, 0] + row == token
            own = int(np.asarray(table.chunk_of)[b, token])
            begin, end, group, place, first, last = lines[tile, 1:]
            assert first <= token < last
            same = (lines[:tile, 0] >= 0) & (lines[:tile, 1:3] == (begin, end)).all(axis=1)
            assert begin == end or (group, place) == (0, same.sum())
            assert set(range(begin, end)) == set(slots[placed][chunk == own].tolist())
