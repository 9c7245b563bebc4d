"""Attention over a mesh: routes and outputs are those of one device, bit for bit, whatever lengths and groups."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.accounting import exchange
from moc_jax.attention.api import RoutedAttention, luck_keys
from moc_jax.attention.sharded import OverMesh, deal_of
from moc_jax.config import ChunkConfig, MeshConfig, MoCConfig
from moc_jax.scene import SceneLengths, SceneShape, chunk_table
from moc_jax.sharding import RULES, make_mesh

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs eight virtual CPU devices")

SHAPE = SceneShape(shots=3, frames=8, rows=2, columns=5, text_tokens=7)
HEADS, DIM = 4, 8
CFG = MoCConfig(chunk=ChunkConfig(size=6), top_k=2, drop_off_max=1.0, drop_in_rate=1.0)
LENGTHS = {"one long shot": (8, 0, 0), "uneven shots": (6, 1, 1), "padding": (2, 2, 1)}
# Groups of tokens x of heads, exchanged in so many parts. On a CPU, XLA multiplies one head by itself in another way
# than several at a time, on a mesh or not, so bits are compared where a device has two.
TWO_HEADS = "4x2", "8x1, parts"
MESHES = {
    "4x2": ({"context": 8}, 2, 1),
    "4x2, parts": ({"context": 8}, 2, 2),
    "8x1, parts": ({"context": 8}, 1, 3),  # two of the four heads at a time
    "1x4, data": ({"data": 2, "context": 4}, 0, 1),
    "2x2, tensor": ({"context": 4, "tensor": 2}, 0, 1),
}


def lengths_of(*shots):
    """Two scenes: these shots, and one that differs."""
    text = np.where(np.array([1, *shots]) > 0, 2, 0) * [1, 1, 0, 1]
    return SceneLengths(jnp.array([shots, (3, 0, 1)]), jnp.array([text, [2, 3, 0, 2]]))


def vectors():
    keys = jax.random.split(jax.random.key(1), 3)
    return [jax.random.normal(key, (2, SHAPE.tokens, HEADS, DIM)) for key in keys]


@functools.cache
def program(name, cfg=CFG, drop=True):
    """(vectors, lengths) -> outputs and routes of all tokens, and the gradients of the vectors."""
    _, groups, parts = ({}, 0, 1) if name is None else MESHES[name]
    attention = RoutedAttention(backend="xla", head_groups=groups, exchange_parts=parts, exchange="gather")

    def attend(q, k, v, lengths):
        table, deal = chunk_table(lengths, SHAPE, cfg.chunk), deal_of(SHAPE, HEADS, attention)
        text = [deal.text_dealt(x[:, : SHAPE.text_tokens]) for x in (q, k, v)]
        video = [deal.dealt(x[:, SHAPE.text_tokens :]) for x in (q, k, v)]
        keys = jax.random.split(jax.random.key(2), (2, HEADS)) if drop else None
        (text, video), routes = OverMesh(attention, table, cfg, deal, True)(text, video, keys)
        out = jnp.concatenate([text[:, : SHAPE.text_tokens], deal.restored(video)], axis=1)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), (out, routes)

    return jax.jit(jax.value_and_grad(attend, argnums=(0, 1, 2), has_aux=True))


close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def run(name, shots, **which):
    if name is None:
        (_, found), gradients = program(None, **which)(*vectors(), lengths_of(*shots))
    else:
        with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, **MESHES[name][0]}))):
            (_, found), gradients = program(name, **which)(*vectors(), lengths_of(*shots))
    return jax.device_get((*found, gradients))


of_meshes = pytest.mark.parametrize(
    "name", [n if n == "2x2, tensor" else pytest.param(n, marks=pytest.mark.long) for n in MESHES]
)


@of_meshes
def test_routes_and_outputs_are_bit_for_bit_those_of_one_device_in_one_compilation(name):
    for shots in LENGTHS.values():
        (out, routes, gradients), (out_one, routes_one, of_one) = run(name, shots), run(None, shots)
        np.testing.assert_array_equal(routes, routes_one)
        (np.testing.assert_array_equal if name in TWO_HEADS else close)(out, out_one)
        for x, x_one in zip(gradients, of_one):
            np.testing.assert_allclose(x, x_one, rtol=1e-5, atol=1e-5)
    assert program(name)._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, run(name, shots), (out, routes, gradients))


@pytest.mark.long
@pytest.mark.parametrize("drop", [True, False])
def test_random_picks_are_those_of_one_device(drop):
    cfg = MoCConfig(chunk=CFG.chunk, top_k=2, routing="random")
    (_, routes, _), (_, of_one, _) = (run(name, (6, 1, 1), cfg=cfg, drop=drop) for name in ("4x2", None))
    np.testing.assert_array_equal(routes, of_one)
    assert luck_keys(2, 4).shape == (2, 4)


def test_attention_of_another_kind_serves_heads_alone():
    def attend(q, k, v, table, cfg, *, key=None):
        return v, None

    table = chunk_table(lengths_of(6, 1, 1), SHAPE, CFG.chunk)
    x = jax.ShapeDtypeStruct((2, 8, HEADS, DIM), jnp.float32), jax.ShapeDtypeStruct((2, 80, HEADS, DIM), jnp.float32)
    for context, refused in ((4, False), (8, True)):
        with jax.set_mesh(make_mesh(MeshConfig(context=context))):
            call = OverMesh(attend, table, CFG, deal_of(SHAPE, HEADS, attend), False)
            if not refused:
                (_, video), _ = jax.eval_shape(call, (x[0],) * 3, (x[1],) * 3, None)
                assert video.shape == x[1].shape
                continue
            with pytest.raises(NotImplementedError, match="2 groups of tokens need RoutedAttention"):
                jax.eval_shape(call, (x[0],) * 3, (x[1],) * 3, None)


# ------------------------------------------------------------------------------------------------ what is moved

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf"= (\(?\S.*?) ({_KINDS})\(.*?replica_groups=\{{\{{([\d,]+)\}}", re.MULTILINE)


def received(program):
    """Bytes that a device receives by each kind of collective of a compiled program."""
    found = {}
    for shapes, kind, group in _COLLECTIVE.findall(program.as_text()):
        devices = group.count(",") + 1
        sizes = [4 * math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", shapes)]
        found[kind] = found.get(kind, 0) + sum(sizes) * (devices - 1) // devices
    return found


@of_meshes
def test_no_more_is_moved_than_is_counted(name):
    """Forward, and forward and backward, by the kinds that sharded.py says."""
    sizes, groups, parts = MESHES[name]
    attention = RoutedAttention(backend="reference", head_groups=groups, exchange_parts=parts, exchange="gather")
    table = jax.eval_shape(lambda: chunk_table(lengths_of(6, 1, 1), SHAPE, CFG.chunk))
    with jax.set_mesh(mesh := make_mesh(MeshConfig(**{"data": 1, **sizes}))):
        deal = deal_of(SHAPE, HEADS, attention)
        place = jax.NamedSharding(mesh, RULES.spec("batch", "tokens", "heads", "head_dim"))
        text, video = (
            (jax.ShapeDtypeStruct((2, rows, HEADS, DIM), jnp.float32, sharding=place),) * 3
            for rows in (deal.text_rows, deal.video_rows)
        )

        def attend(text, video, table):
            return OverMesh(attention, table, CFG, deal, False)(text, video, None)[0]

        def gradients(text, video, table):
            out, vjp = jax.vjp(lambda *x: attend(*x, table), text, video)
            return vjp(out)

        forward, both = (received(jax.jit(f).lower(text, video, table).compile()) for f in (attend, gradients))
    scenes = 2 // mesh.shape["data"]
    counted = exchange(deal, HEADS // deal.sharing, DIM, scenes=scenes, element_bytes=4)
    assert forward == {k: x for k, x in (("all-to-all", counted.heads), ("all-gather", counted.keys)) if x}
    assert sum(both.values()) == counted.forward + counted.backward
    assert both.get("all-gather", 0) == counted.keys  # gradients of gathered keys are exchanged, and added up there
