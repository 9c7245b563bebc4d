"""Queries that go to where their picks are held: routes of one device bit for bit, and no pick is lost."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import homes as rules
from moc_jax.attention.accounting import chosen_exchange, dispatch_exchange, exchange, group_pairs, uniform_shots
from moc_jax.attention.api import RoutedAttention
from moc_jax.attention.deal import Deal
from moc_jax.attention.homes import Homes
from moc_jax.attention.sharded import OverMesh, deal_of
from moc_jax.config import ChunkConfig, MeshConfig, MoCConfig
from moc_jax.planning.collectives import collectives
from moc_jax.scene import SceneLengths, SceneShape, chunk_table
from moc_jax.sharding import RULES, make_mesh

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs eight virtual CPU devices")

SHAPE = SceneShape(shots=3, frames=64, rows=1, columns=3, text_tokens=7)  # which four groups don't divide
HEADS, DIM = 2, 8
CFG = MoCConfig(chunk=ChunkConfig(size=16), top_k=2, drop_off_max=1.0, drop_in_rate=1.0)
LENGTHS = {"one long shot": (64, 0, 0), "uneven shots": (50, 7, 7), "padding": (20, 3, 0)}
MESHES = {"4x1, data": ({"data": 2, "context": 4}, 1), "4x2": ({"context": 8}, 2), "8x1": ({"context": 8}, 1)}
OTHERS = {
    "chunks": dict(self_anchor="chunk", causal_routing=False, text_anchor="own+global", descriptors=2),
    "sinks": dict(sink_chunks=1, descriptors=3),
    "dense": dict(mode="dense"),
    "past": dict(self_anchor="window", visibility="past", routing="random"),
}
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def lengths_of(*shots):
    """Two scenes: these shots, and one that differs."""
    text = np.where(np.array([1, *shots]) > 0, 2, 0) * [1, 1, 0, 1]
    return SceneLengths(jnp.array([shots, (30, 0, 11)]), jnp.array([text, [2, 3, 0, 2]]))


def vectors(seed=1):
    return [jax.random.normal(key, (2, SHAPE.tokens, HEADS, DIM)) for key in jax.random.split(jax.random.key(seed), 4)]


class Program:
    """Attention and its gradients, compiled once, for tokens in memory's order."""

    def __init__(self, mesh, groups, cfg, backend="xla"):
        attention = RoutedAttention(backend=backend, head_groups=groups, exchange="dispatch")
        self.mesh = None if mesh is None else make_mesh(MeshConfig(**{"data": 1, **mesh}))
        self.keys = jax.random.split(jax.random.key(2), (2, HEADS)) if cfg.mode == "moc" else None
        with self.set():
            self.deal = deal_of(SHAPE, HEADS, attention)

            def run(q, k, v, d_out, lengths, keys):
                table = chunk_table(lengths, SHAPE, cfg.chunk)
                over_mesh = OverMesh(attention, table, cfg, self.deal, True)
                out, back, routes = jax.vjp(lambda *x: over_mesh(*zip(*x), keys), q, k, v, has_aux=True)
                return out, routes, back(d_out)

            self.run = jax.jit(run).lower(*self.given(vectors()), lengths_of(64, 0, 0), self.keys).compile()

    def set(self):
        return jax.set_mesh(self.mesh) if self.mesh else jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))

    def given(self, arrays):
        """Text and video of each, on their devices."""
        size = SHAPE.text_tokens
        dealt = [(self.deal.text_dealt(x[:, :size]), self.deal.dealt(x[:, size:])) for x in arrays]
        if self.mesh is None:
            return dealt
        return jax.device_put(dealt, jax.NamedSharding(self.mesh, RULES.spec("batch", "tokens", "heads", "head_dim")))

    def back(self, text, video):
        return np.concatenate([text[:, : SHAPE.text_tokens], self.deal.restored(video)], axis=1)

    def __call__(self, arrays, shots):
        with self.set():
            out, routes, gradients = jax.device_get(self.run(*self.given(arrays), lengths_of(*shots), self.keys))
        return self.back(*out), routes, [self.back(*x) for x in gradients]


@functools.cache
def program(name=None, other=None, backend="xla"):
    cfg = CFG if other is None else MoCConfig(chunk=CFG.chunk, top_k=2, **OTHERS[other])
    return Program(*(MESHES[name] if name else (None, 0)), cfg, backend)


def check(name, arrays, shots, **which):
    found, expected = (program(mesh, **which)(arrays, shots) for mesh in (name, None))
    if expected[1] is not None:
        np.testing.assert_array_equal(found[1], expected[1])
    close(found[0], expected[0])
    jax.tree.map(close, found[2], expected[2])
    return found


@pytest.mark.long
@pytest.mark.parametrize(("name", "backend"), [("4x1, data", "reference"), *((name, "xla") for name in MESHES)])
def test_routes_are_bit_for_bit_those_of_one_device_and_no_pick_is_lost(name, backend):
    for shots in LENGTHS.values():
        found = check(name, vectors(), shots, backend=backend)
    jax.tree.map(np.testing.assert_array_equal, program(name, backend=backend)(vectors(), shots), found)
    zeros, *others = vectors()
    check(name, [0 * zeros, *others], (20, 24, 20), backend=backend)  # all picks are at the first chunks' holders


@pytest.mark.long
@pytest.mark.parametrize("other", OTHERS)
def test_other_anchors_and_routers(other):
    for shots in LENGTHS.values():
        check("4x2", vectors(), shots, other=other)


def test_no_more_is_moved_than_is_counted():
    """Of the forward and the backward pass, what goes whatever the lengths, and each kind of round."""
    moved, groups, of = collections.Counter(), 4, program("4x1, data", backend="reference")
    for each in collectives(of.run.as_text()):
        if each.element == "s32":  # routes of all tokens, and how many rounds there are
            continue
        loop = next((loop for loop in ("moc_around", "moc_served") if loop in each.loop), "always")
        passed = each.kind == "collective-permute"
        moved[loop, passed] += each.bytes if passed else each.bytes * (groups - 1) // groups
    table = jax.eval_shape(lambda: chunk_table(lengths_of(64, 0, 0), SHAPE, CFG.chunk))
    picks = of(vectors(), (64, 0, 0))[1].shape[-1]
    counted = dispatch_exchange(of.deal, table, CFG, HEADS, DIM, picks=picks, element_bytes=4)
    (around, served), (around_back, served_back) = counted.of_round, counted.of_round_backward
    assert moved == {
        ("always", False): counted.keys + counted.keys_backward,
        ("moc_served", False): served + served_back,
        ("moc_around", True): around + around_back // 2 * (1 + groups // 2),  # one of so many distances, to go back
    }


# ------------------------------------------------------------------------------------------------ who has what


@pytest.mark.parametrize(
    ("groups", "chunk"),
    [
        pytest.param(4, ChunkConfig(unit="frames", size=2), marks=pytest.mark.long),
        (16, ChunkConfig(size=7, remainder="tail")),
    ],
)
def test_keys_come_to_their_holders_and_back(chunk, groups):
    shape = SceneShape(shots=3, frames=9, rows=2, columns=3, text_tokens=4)
    lengths = SceneLengths(jnp.array([[4, 1, 1], [9, 0, 0]]), jnp.array([[1, 1, 0, 1], [2, 2, 0, 0]]))
    table = chunk_table(lengths, shape, chunk)
    deal = Deal.of(shape, groups=groups, head_groups=1, sharing=1)
    homes = Homes.of(deal, table, MoCConfig(chunk=chunk))
    video = np.arange(2 * shape.video_tokens).reshape(2, -1) + 1
    mine = np.stack([video[:, np.asarray(deal.rows(g))[homes.text_run :] - 4] for g in range(groups)])
    who, split = rules.holders(table, homes), (2, groups, homes.slots * homes.part)

    @jax.jit
    def ways_of(group):
        return rules.copies(table, who, homes, group), rules.held_table(table, who, homes, group)

    def taken(x, way):
        return np.where(way[1], np.take_along_axis(x, way[0], axis=1), 0)

    ways, tables = zip(*(jax.device_get(ways_of(group)) for group in range(groups)))
    sent = np.stack([taken(x, way.sent).reshape(split) for x, way in zip(mine, ways)])  # [from, B, to, rows]
    held = [taken(sent[:, :, g].swapaxes(0, 1).reshape(2, -1), way.held) for g, way in enumerate(ways)]
    total = np.zeros_like(video)
    for x, of in zip(held, tables):
        for b in range(2):
            for start, length in zip(of.start[b], of.length[b]):
                run = x[b, start : start + length]
                assert (np.diff(run) == 1).all()
                total[b] += np.isin(video[b], run)
    np.testing.assert_array_equal(total, np.asarray(table.chunk_of[:, 4:]) >= 0)

    returned = np.stack([taken(x, way.returned).reshape(split) for x, way in zip(held, ways)])
    back = [taken(returned[:, :, g].swapaxes(0, 1).reshape(2, -1), way.kept) for g, way in enumerate(ways)]
    total[:] = 0
    for x, rows in zip(back, mine):
        assert ((x == rows) | (x == 0)).all()
        for b in range(2):
            np.add.at(total[b], x[b][x[b] > 0] - video[b, 0], 1)
    np.testing.assert_array_equal(total, np.asarray(table.chunk_of[:, 4:]) >= 0)  # each once


def exchanges(shots, groups, heads=12, **cfg):
    """Of shots of 25 frames of 900 tokens over 4 groups of heads: gather, dispatch, and what `auto` takes."""
    cfg = MoCConfig(chunk=ChunkConfig(size=1280), **cfg)
    table = jax.eval_shape(lambda: uniform_shots(shots, 22500, cfg.chunk, frame=900))
    shape = SceneShape(shots=shots, frames=25 * shots, rows=30, columns=30, text_tokens=0)
    deal = Deal.of(shape, groups=groups, head_groups=4, sharing=1)
    found = [chosen_exchange(deal, table, cfg, kind, heads, 128) for kind in ("gather", "dispatch", "auto")]
    assert found[0] == exchange(deal, heads, 128)
    return found


def test_auto_takes_what_moves_fewer_bytes():
    for shots, groups, kind in ((8, 4, "gather"), (8, 64, "dispatch"), (64, 4, "gather"), (64, 16, "dispatch")):
        gather, dispatch, auto = exchanges(shots, groups)
        assert auto.kind == kind
        assert auto.forward + auto.backward == min(x.forward + x.backward for x in (gather, dispatch))
    assert exchanges(8, 64, mode="dense")[2].kind == "gather"
    assert exchanges(8, 64)[1].rounds == (6, 6)  # shots of 25 frames over homes of 4


def test_pairs_are_all_counted_once():
    shape = SceneShape(shots=3, frames=64, rows=30, columns=30, text_tokens=504)
    cfg = MoCConfig(chunk=ChunkConfig(size=1280), sink_chunks=1)
    lengths = SceneLengths(jnp.array([(20, 24, 20)]), jnp.array([[100, 100, 50, 50]]))
    table = jax.jit(chunk_table, static_argnums=(1, 2))(lengths, shape, cfg.chunk)
    whole = group_pairs(table, cfg, Deal.of(shape, groups=1, head_groups=8, sharing=1)).sum()
    pairs = group_pairs(table, cfg, Deal.of(shape, groups=16, head_groups=8, sharing=1), "dispatch")
    assert pairs.sum() == pytest.approx(whole, rel=1e-9)
