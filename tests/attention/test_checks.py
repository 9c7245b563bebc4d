"""What attention refuses, before any work: each message names the value, the limit and the fix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import api, parts, reference
from moc_jax.config import ChunkConfig, Config, MoCConfig
from moc_jax.scene import ChunkTable, SceneLengths, SceneShape, chunk_table
from tests.attention.scenes import HEAD_DIM, HEADS, TOKENS, cut, qkv, table_of

# Chunks: 0 and 1 captions, 2 to 4 video of shot 0, 5 a caption, 6 video of shot 1; then padding.
SCENES = [cut(1, (1, [4, 6, 3]), (2, [5]))] * 2
TABLE = table_of(SCENES)
CFG = MoCConfig(top_k=2, self_anchor="chunk", causal_routing=False)
Q, K, V = (jnp.asarray(x) for x in qkv(0, SCENES))
VIDEO_TOKEN = 12
ROUTES = np.full((2, HEADS, TOKENS, 2), -1)


def call(q=Q, k=K, v=V, table=TABLE, cfg=CFG, backend="xla", **options):
    return api.moc_attention(q, k, v, table, cfg, backend=backend, **options)


def table_with(**changes):
    """TABLE with one value of a field replaced: name=(chunk or token, value)."""
    fields = {name: getattr(TABLE, name).at[1, where].set(value) for name, (where, value) in changes.items()}
    return dataclasses.replace(TABLE, **fields)


def routes_with(*picks, token=VIDEO_TOKEN):
    routes = ROUTES.copy()
    routes[1, 0, token] = picks
    return routes


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(q=np.asarray(Q).tolist()), TypeError, r"q is a list; give an array: jnp.asarray\(q\)"),
        (dict(v=None), TypeError, "v is a NoneType; give an array"),
        (dict(k=K.astype(jnp.int32)), TypeError, "k is int32; .*float32, bfloat16, float16"),
        (dict(q=np.asarray(Q, np.float64)), TypeError, "q is float64; .*float32, bfloat16, float16"),
        (dict(q=Q[0]), ValueError, rf"q has shape \({TOKENS}, {HEADS}, {HEAD_DIM}\); it must be \[B, N, H, D\]"),
        (dict(v=V[..., :8]), ValueError, r"v has shape \(.*8\) and k \(.*16\); they must be equal"),
        (dict(cfg=Config()), TypeError, "cfg is a Config; give a MoCConfig"),
        (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; choose one of auto, reference, xla"),
        (dict(backend=reference), TypeError, "backend is a module; give a name or one of Reference"),
        (dict(table=None), TypeError, "table is a NoneType; make a ChunkTable with"),
        (dict(table=dataclasses.replace(TABLE, kind=[[1]])), TypeError, "table.kind is a list"),
        (
            dict(table=dataclasses.replace(TABLE, start=TABLE.start * 0.5)),
            TypeError,
            "table.start is .*float32; .*integers",
        ),
        (
            dict(table=dataclasses.replace(TABLE, length=TABLE.length[:, :3])),
            ValueError,
            r"table.length has shape \(2, 3\)",
        ),
        (dict(table=dataclasses.replace(TABLE, max_chunk=5)), ValueError, r"chunk 3 .* 6 in all, but .* more than 5"),
        (dict(table=table_with(length=(6, 99))), ValueError, r"chunk 6 of scene 1 .*\[25, 124\), 99 in all, but video"),
        (dict(table=table_with(length=(5, 30))), ValueError, r"chunk 5 of scene 1 .*but text lies in \[0, 12\)"),
        (dict(table=table_with(length=(6, -1))), ValueError, "chunk 6 of scene 1 .*no length is below 0"),
        (
            dict(table=table_with(chunk_of=(20, 16))),
            ValueError,
            "token 20 of scene 1 is in chunk 16; chunks are 0 to 15",
        ),
        (dict(key=jax.random.PRNGKey(0)), TypeError, r"key is an array of uint32; make it with jax.random.key"),
        (dict(key=3), TypeError, r"key is a int; make it with jax.random.key"),
        (dict(key=jax.random.split(jax.random.key(0), 5)), ValueError, rf"key has shape \(5,\); .*\(2, {HEADS}\)"),
        (dict(routes=ROUTES.tolist()), TypeError, "routes is a list"),
        (dict(routes=ROUTES * 1.0), TypeError, "routes is an array of float64; it must hold integers"),
        (dict(routes=ROUTES[:, :1]), ValueError, rf"routes have shape \(2, 1, .* must be \[2, {HEADS}, {TOKENS}, K\]"),
        (dict(routes=routes_with(4, 16)), ValueError, r"scene 1, head 0, token 12 .*\[4, 16\]: chunks are 0 to 15"),
        (dict(routes=routes_with(-2, 3)), ValueError, r"\[-2, 3\]: chunks are 0 to 15, and -1"),
        (dict(routes=routes_with(3, 3)), ValueError, r"\[3, 3\]: no chunk may be picked twice"),
        (dict(routes=routes_with(2, -1)), ValueError, r"\[2, -1\]: an anchor of the query"),
        (dict(routes=routes_with(3, -1, token=0)), ValueError, r"token 0 .*only tokens of video pick"),
    ],
)
def test_what_does_not_fit_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        call(**given)
    if not {"v", "routes"} & set(given):
        with pytest.raises(error, match=message):
            api.route(
                *(given.get(name, default) for name, default in zip("qk", (Q, K))),
                **{"table": TABLE, "cfg": CFG, **{name: x for name, x in given.items() if name not in ("q", "k")}},
            )


CHUNKS = np.asarray(TABLE.chunk_of)


def chunks_with(*changes):
    """The chunks of the video's first 16 tokens, with others at some rows of scene 1."""
    chunks = CHUNKS[:, VIDEO_TOKEN : VIDEO_TOKEN + 16].copy()
    for row, chunk in changes:
        chunks[1, row] = chunk
    return chunks


@pytest.mark.parametrize(
    ("query_chunk", "error", "message"),
    [
        (None, ValueError, rf"q has 16 tokens and the chunk table {TOKENS}; .*give query_chunk"),
        (CHUNKS, ValueError, rf"query_chunk has shape \(2, {TOKENS}\); .*must be \(2, 16\)"),
        (chunks_with() * 1.0, TypeError, "query_chunk is an array of float64; it must hold integers"),
        (
            chunks_with((5, 16)),
            ValueError,
            "query token 5 of scene 1 is in chunk 16; chunks are 0 to 15",
        ),
        (chunks_with((0, -2)), ValueError, "query token 0 of scene 1 is in chunk -2"),
        (chunks_with((15, 2)), ValueError, "query tokens of chunk 2 of scene 1 lie apart"),
        (chunks_with((5, -1)), ValueError, "query tokens of chunk 3 of scene 1 lie apart"),
        (chunks_with((4, -1)), ValueError, r"shot 0 of scene 1 .* \[2, -1, 3, 4\]; they must follow each other"),
        (chunks_with(*((i, 3) for i in range(4)), *((i, 2) for i in range(4, 10))), ValueError, r"order \[3, 2, 4\]"),
    ],
)
def test_queries_that_are_not_in_runs_are_refused(query_chunk, error, message):
    q = Q[:, :16]
    with pytest.raises(error, match=message):
        call(q=q, query_chunk=query_chunk)
    with pytest.raises(error, match=message):
        api.route(q, K, TABLE, CFG, query_chunk=query_chunk, backend="xla")
    with pytest.raises(error, match=message):
        parts.anchor_part(q, K, V, TABLE, CFG, query_chunk=query_chunk, backend="xla")


@pytest.mark.parametrize("rows", [[0, 0, 6, 6], [-1, 3, 3, -1], [6, 2, 2, 3], [2, 3, 3, 4, 1], [2, 4, 4, 0]])
def test_any_runs_are_taken(rows):
    """Of some chunks, with text behind or between shots."""
    chunks = np.array([rows] * 2, np.int32).reshape(2, len(rows))
    assert jax.eval_shape(lambda q: call(q=q, query_chunk=chunks), Q[:, : len(rows)]).shape[1] == len(rows)


def test_no_queries_at_all_are_refused():
    with pytest.raises(ValueError, match="q has no tokens"):
        call(q=Q[:, :0], query_chunk=CHUNKS[:, :0])


def test_statistics_are_those_of_the_queries():
    q, chunks, lse = Q[:, :16], chunks_with(), np.zeros((2, HEADS, 16), np.float32)
    run = functools.partial(parts.anchor_gradients, q, K, V, table=TABLE, cfg=CFG, query_chunk=chunks, backend="xla")
    with pytest.raises(ValueError, match=rf"d_out has shape \(2, {TOKENS}, .* must be \(2, 16"):
        run(d_out=V, lse=lse, delta=lse)
    with pytest.raises(ValueError, match=rf"lse has shape \(2, 16, {HEADS}\); .* must be \(2, {HEADS}, 16\)"):
        run(d_out=q, lse=lse.swapaxes(1, 2), delta=lse)
    with pytest.raises(TypeError, match="delta is a float; give an array"):
        run(d_out=q, lse=lse, delta=0.0)


def test_numpy_arrays_are_arrays():
    numpy = [np.asarray(x) for x in (Q, K, V)]
    table = ChunkTable(*(np.asarray(x, np.int64) for x in jax.tree.leaves(TABLE)), *_static(TABLE))
    routes = np.asarray(api.route(*numpy[:2], table, CFG, backend="reference"), np.int64)
    np.testing.assert_array_equal(call(*numpy, table, routes=routes, backend="reference"), call(backend="reference"))


def _static(table):
    return table.text_tokens, table.max_chunk, table.max_shots


def test_values_are_not_looked_at_inside_jit():
    """Sizes are: they are known."""
    jax.jit(lambda routes: call(routes=routes)).trace(routes_with(3, 3))
    with pytest.raises(ValueError, match="routes have shape"):
        jax.jit(lambda routes: call(routes=routes)).trace(ROUTES[:, :1])
    with pytest.raises(ValueError, match="picked twice"):  # a constant of the program
        jax.jit(lambda q: call(q=q, routes=routes_with(3, 3))).trace(Q)


def test_a_table_cut_by_another_config_is_refused():
    shape = SceneShape(shots=2, frames=4, rows=1, columns=13, text_tokens=12)
    table = chunk_table(SceneLengths(jnp.array([[3, 1]] * 2), jnp.zeros((2, 3), jnp.int32)), shape, ChunkConfig(size=9))
    own = dataclasses.replace(CFG, chunk=ChunkConfig(size=9))
    assert jax.eval_shape(lambda q: call(q=q, table=table, cfg=own), Q).shape == Q.shape
    for other in (ChunkConfig(size=8), ChunkConfig(size=10), ChunkConfig(size=9, unit="frames")):
        cfg = dataclasses.replace(CFG, chunk=other)
        with pytest.raises(
            ValueError, match=r"cut by .*size=9.*but cfg.chunk is .*chunk_table\(lengths, shape, cfg.chunk"
        ):
            jax.jit(lambda q, cfg=cfg: call(q=q, table=table, cfg=cfg)).trace(Q)
        jax.eval_shape(lambda q, cfg=cfg: call(q=q, table=table, cfg=dataclasses.replace(cfg, mode="dense")), Q)
