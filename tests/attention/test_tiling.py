"""The XLA backend gives the same whatever the sizes of its steps."""

import jax
import jax.numpy as jnp
import pytest

from moc_jax.attention import xla
from moc_jax.attention.api import moc_attention, route
from moc_jax.config import ChunkConfig, MoCConfig
from moc_jax.scene import SceneLengths, SceneShape, chunk_table
from tests.attention.tolerances import GRADIENT, OUTPUT, assert_close

SHAPE = SceneShape(shots=3, frames=12, rows=4, columns=5, text_tokens=20)
LENGTHS = SceneLengths(jnp.array([[5, 1, 4]]), jnp.array([[3, 4, 0, 5]]))


@pytest.mark.parametrize(
    "tiling",
    [
        pytest.param(  # each larger than the scene
            xla.XlaTiling(anchor_tile=512, anchor_block=1024, routed_tile=256, routed_block=640), marks=pytest.mark.long
        ),
        pytest.param(
            xla.XlaTiling(anchor_tile=16, anchor_block=48, routed_tile=32, routed_block=16), marks=pytest.mark.long
        ),
        xla.XlaTiling(anchor_tile=7, anchor_block=5, routed_tile=9, routed_block=33),
    ],
)
def test_output_and_gradients_do_not_depend_on_the_tiling(tiling):
    cfg = MoCConfig(chunk=ChunkConfig(size=33), top_k=2, causal_routing=False)
    q, k, v, d_out = jax.random.normal(jax.random.key(0), (4, 1, SHAPE.tokens, 2, 16))
    table = chunk_table(LENGTHS, SHAPE, cfg.chunk)

    def run(backend):
        out, back = jax.vjp(lambda q, k, v: moc_attention(q, k, v, table, cfg, backend=backend), q, k, v)
        return {"out": out, **dict(zip(("dq", "dk", "dv"), back(d_out), strict=True))}

    expected = run("reference")
    for name, value in run(xla.Xla(tiling=tiling)).items():
        assert_close(value, expected[name], name, table=OUTPUT if name == "out" else GRADIENT)


@pytest.mark.long_for("bfloat16", "float16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("offset", [0, 300, -300])
def test_neither_large_nor_very_negative_scores_overflow(offset, dtype):
    """The same scores, all shifted by far more than exp can take."""
    cfg = MoCConfig(chunk=ChunkConfig(size=33), top_k=2, causal_routing=False)
    q, k, v, d_out = jax.random.normal(jax.random.key(0), (4, 1, SHAPE.tokens, 2, 16))
    q, k = q.at[..., 0].set(4 * offset / 16), k.at[..., 0].set(16)
    q, k, v, d_out = (x.astype(dtype) for x in (q, k, v, 16 * d_out))
    table = chunk_table(LENGTHS, SHAPE, cfg.chunk)
    routes = route(q, k, table, cfg)

    def run(backend, *inputs):
        out, back = jax.vjp(lambda *x: moc_attention(*x, table, cfg, routes=routes, backend=backend), *inputs[:3])
        return {"out": out, **dict(zip(("dq", "dk", "dv"), back(inputs[3]), strict=True))}

    expected = run("reference", *(x.astype(jnp.float32) for x in (q, k, v, d_out)))
    for name, value in run("xla", q, k, v, d_out).items():
        # What was set is left out: in dq and dk it is a sum that cancels, times the offset.
        got, want = value[..., 1:], expected[name][..., 1:]
        scale = abs(offset) / 8 if dtype == "float32" and offset else 1  # float32 rounds scores of this size
        table_of, rounding = OUTPUT if name == "out" else GRADIENT, "float32" if dtype == "float32" else "bfloat16"
        assert_close(got, want, name, table=table_of, dtype=rounding, scale=scale)


@pytest.mark.parametrize(
    ("tokens", "chunk", "picks", "tile", "block"),
    [
        (2_000, 80, 3, 128, 80),
        (2_000, 300, 3, 128, 112),
        (180_512, 1_280, 5, 2_048, 1_280),
        (180_512, 10_240, 5, 2_048, 2_560),
    ],
)
def test_chunks_are_walked_in_equal_blocks_by_tiles_that_fill(tokens, chunk, picks, tile, block):
    tiling = xla.default_tiling(tokens, chunk, picks, MoCConfig())
    assert (tiling.routed_tile, tiling.routed_block) == (tile, block)
    waste = -(-chunk // block) * block - chunk
    assert 0 <= waste < 16 * -(-chunk // block)


@pytest.mark.parametrize(
    ("cfg", "tile", "block"),
    [
        (MoCConfig(), 2_048, 2_560),
        (MoCConfig(self_anchor="chunk"), 1_568, 1_568),
        (MoCConfig(self_anchor="window", window=1), 1_568, 2_352),
        (MoCConfig(mode="dense", self_anchor="chunk"), 2_048, 2_560),
    ],
)
def test_anchors_of_single_chunks_are_walked_in_equal_parts(cfg, tile, block):
    tiling = xla.default_tiling(32_760, 1_560, 3, cfg)
    assert (tiling.anchor_tile, tiling.anchor_block) == (tile, block)


@pytest.mark.parametrize(("chunk", "size"), [(80, 80), (300, 112), (16, 128)])
def test_shots_of_small_scenes_are_walked_in_parts_of_chunks(chunk, size):
    tiling = xla.default_tiling(1_503, chunk, 3, MoCConfig())
    assert (tiling.anchor_tile, tiling.anchor_block) == (size, size)


def test_a_tiling_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        xla.XlaTiling(routed_tile=0)
