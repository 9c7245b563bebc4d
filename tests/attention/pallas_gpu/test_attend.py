"""The whole operation by the Hopper kernels, interpreted: routes, output and gradients against the oracle.

A kernel takes about as long to interpret as it has steps, so a few scenes carry all facts. Where there is a GPU, the
conformance suite and test_hopper.py run the kernels themselves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import api, backends, parts
from moc_jax.attention.layout import head_groups
from moc_jax.attention.pallas_gpu.device import HopperTiling
from moc_jax.config import MoCConfig
from moc_jax.scene import VIDEO
from tests.attention import oracle, test_conformance
from tests.attention.configs import COVERING, name
from tests.attention.scenes import cut, qkv, table_of
from tests.attention.tolerances import GRADIENT, OUTPUT, assert_close

# Chunks around the sizes of warpgroups (64) and tiles (128), a shot without a caption, 16 of 21 words and 9 tokens of
# padding; 503 tokens are no multiple of 8.
UNEVEN = [cut(5, (9, [1, 7, 129]), (0, [64, 65, 9]), (2, [127, 8, 63]), text_tokens=21)]
UNEVEN_SIZES = dict(text_tokens=21, tokens=503, chunks=13, max_chunk=129)
# Two scenes of other shots, one of them empty, and with padding.
TWO = [cut(2, (3, [9, 5]), (0, [12, 7, 3])), cut(0, (1, [17]), (2, []), (0, [4, 8]))]
TWO_SIZES = dict(tokens=58, chunks=9)
ONE = TWO[:1]
THREE_PARTS = HopperTiling(text_readers=200)  # of the tiles of text keys


@dataclasses.dataclass(frozen=True)
class Case:
    cfg: MoCConfig
    scenes: list = dataclasses.field(default_factory=lambda: ONE)
    heads: int = 1
    head_dim: int = 64
    dtype: type = jnp.bfloat16
    sizes: dict = dataclasses.field(default_factory=lambda: TWO_SIZES)
    key: bool = False  # context drop-off and drop-in
    change: object = None  # of the routes, before they are given
    tiling: HopperTiling | None = None

    @property
    def table(self):
        return table_of(self.scenes, **self.sizes)


def run(case, hopper, seed=0, inputs=None):
    """((routes, given, output, dq, dk, dv), the inputs q, k, v, dout) of one program."""
    table = case.table
    shape = (table.chunk_of.shape[1], case.heads, case.head_dim)
    draw = [qkv(seed + i, case.scenes, shape=shape, dtype=case.dtype) for i in range(2)]
    q, k, v, dout = inputs or (*draw[0], draw[1][0])
    backend = dataclasses.replace(hopper, tiling=case.tiling)
    key = jax.random.key(3) if case.key else None

    @jax.jit
    def program(q, k, v, dout):
        routes = api.route(q, k, table, case.cfg, key=key, backend=backend)
        given = routes if case.change is None else case.change(routes, table)
        attention = functools.partial(api.moc_attention, table=table, cfg=case.cfg, routes=given, backend=backend)
        out, vjp = jax.vjp(attention, q, k, v)
        return (routes, given, out, *vjp(dout))

    return jax.tree.map(np.asarray, program(q, k, v, dout)), (q, k, v, dout)


def check(case, hopper):
    scenes, table, dtype = case.scenes, case.table, np.dtype(case.dtype).name
    (routes, given, out, *grads), (q, k, v, dout) = run(case, hopper)
    key = jax.random.key(3) if case.key else None
    plain = api.route(jnp.asarray(q), jnp.asarray(k), table, case.cfg, key=key, backend="reference")
    np.testing.assert_array_equal(routes, plain)
    if case.cfg.mode == "moc" and not case.key:
        want_routes = [oracle.route(q[b], k[b], scene, case.cfg) for b, scene in enumerate(scenes)]
        np.testing.assert_array_equal(routes, want_routes)
    want = oracle.moc(q, k, v, scenes, case.cfg, given)
    assert out.dtype == v.dtype
    assert_close(out, want.out, "output", table=OUTPUT, dtype=dtype)
    padding = np.asarray(table.chunk_of) < 0
    assert padding.any()
    for x in (out, *grads):
        assert not x[padding].any(), "padding must get 0"
    want_grads = oracle.moc_gradients(q, k, v, want.mask, dout)
    for grad, expected, which in zip(grads, want_grads, ("dq", "dk", "dv")):
        assert grad.dtype == v.dtype
        assert_close(grad, expected, which, table=GRADIENT, dtype=dtype)
    return given, out, grads


# ------------------------------------------------------------------------------------------------ what CI runs


@pytest.mark.long
def test_uneven_chunks(hopper):
    """Own shot and all text as anchors; the tiles of text keys in three parts."""
    check(Case(MoCConfig(top_k=2), UNEVEN, sizes=UNEVEN_SIZES, tiling=THREE_PARTS), hopper)


@pytest.mark.slow
def test_uneven_chunks_one_by_one(hopper):
    """The own chunk as anchor, captions of other shots shut out, float16."""
    cfg = MoCConfig(top_k=2, self_anchor="chunk", text_anchor="own+global", causal_routing=False, visibility="past")
    check(Case(cfg, UNEVEN, sizes=UNEVEN_SIZES, dtype=jnp.float16), hopper)


@pytest.mark.long
def test_groups_of_heads_and_routes_with_holes(hopper):
    """Two heads one after the other; some queries' first pick or all picks are missing."""

    def holes(routes, table):
        token = jnp.arange(routes.shape[2])[None, None, :]
        first = jnp.where(token % 3 == 0, -1, routes[..., 0])
        second = jnp.where(token % 2 == 0, -1, routes[..., 1])
        return jnp.stack([first, second], axis=-1)

    cfg = MoCConfig(top_k=2, self_anchor="window", window=1, causal_routing=False, visibility="past")
    given, _, _ = check(Case(cfg, heads=2, change=holes, tiling=HopperTiling(group_bytes=1)), hopper)
    assert ((given[..., 0] < 0) & (given[..., 1] >= 0)).any()
    assert (head_groups(2, 64, 1024), head_groups(12, 256, 1024), head_groups(5, 2048, 1024)) == (1, 3, 5)


@pytest.mark.long
def test_everyone_picks_one_chunk(hopper):
    """No anchors for video: who picks nothing gives 0, and chunks that nobody picks are read by their caption alone."""

    def one_chunk(routes, table):
        return jnp.where(routes >= 0, 2, -1)

    cfg = MoCConfig(top_k=1, self_anchor="none", text_anchor="none", causal_routing=True)
    given, out, (dq, *_) = check(Case(cfg, TWO, head_dim=128, change=one_chunk), hopper)
    table = table_of(TWO, **TWO_SIZES)
    lonely = (given < 0).all(axis=(1, 3)) & (np.asarray(table.token_kind) == VIDEO)
    assert lonely.any()
    assert not out[lonely].any()
    assert not dq[lonely].any()


@pytest.mark.long  # which picks there are is routing.drop's work on all backends; holes in routes are tested above
def test_drop_off_and_drop_in(hopper):
    """With a key, picks are those of the other backends with that key."""
    cfg = MoCConfig(top_k=2, self_anchor="chunk", causal_routing=False, drop_off_max=0.9, drop_in_rate=1.5)
    given, _, _ = check(Case(dataclasses.replace(cfg, max_drop_in=1), key=True), hopper)
    assert (given[..., :2] < 0).any()
    assert (given[..., 2] >= 0).any()


def test_dense(hopper):
    check(Case(MoCConfig(mode="dense"), TWO, head_dim=128, dtype=jnp.float16), hopper)


@pytest.mark.long
def test_no_picks(hopper):
    check(Case(MoCConfig(top_k=0, text_anchor="own+global", visibility="past")), hopper)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*encountered in matmul:RuntimeWarning")  # the interpreter's
def test_padding_may_hold_anything_finite(hopper):
    """The largest numbers, with which products overflow, and NaN for output gradients: every bit stays."""
    case = Case(MoCConfig(top_k=1, self_anchor="chunk", causal_routing=False))
    (_, _, *want), inputs = run(case, hopper)
    padding = np.asarray(case.table.chunk_of) < 0
    largest = jnp.finfo(case.dtype).max
    for x, filling in zip(inputs, (largest, -largest, largest, np.nan)):
        x[padding] = filling
    (_, _, *got), _ = run(case, hopper, inputs=inputs)
    for a, b, which in zip(got, want, ("output", "dq", "dk", "dv")):
        np.testing.assert_array_equal(a, b, which)


ROWS = 138


def slice_program(cfg, table, backend):
    """Of ROWS query rows: routes, output and gradients, and the same from anchors and picks as parts."""
    by = dict(table=table, cfg=cfg, backend=backend)

    @jax.jit
    def program(q, k, v, dout, query_chunk):
        given = dict(query_chunk=query_chunk, **by)
        routes = api.route(q, k, **given)
        out, vjp = jax.vjp(lambda *x: api.moc_attention(*x, routes=routes, **given), q, k, v)
        whole = out, *vjp(dout)
        merged, lse = parts.merge(parts.anchor_part(q, k, v, **given), parts.pick_part(q, k, v, routes, **given))
        delta = parts.delta_of(out, dout)
        of_anchors = parts.anchor_gradients(q, k, v, dout, lse, delta, **given)
        of_picks = parts.pick_gradients(q, k, v, routes, dout, lse, delta, **given)
        added = (a.astype(jnp.float32) + b for a, b in zip(of_anchors, of_picks, strict=True))
        return routes, whole, (merged, *added)

    return lambda *x: jax.tree.map(np.asarray, program(*x))


@pytest.mark.slow
def test_slices_are_the_whole_bit_for_bit_and_the_sum_of_their_parts(hopper):
    """Queries of a shot, from a multiple of 128 rows on, in the middle of a chunk; the rest is padding, NaN too.

    At last those of a device that has some of all frames (deal.py), which are no slice.
    """
    case = Case(MoCConfig(top_k=2), UNEVEN, sizes=UNEVEN_SIZES, tiling=HopperTiling(text_readers=100))
    (routes, _, out, dq, dk, dv), (q, k, v, dout) = run(case, hopper)
    table = case.table
    program = slice_program(case.cfg, table, dataclasses.replace(hopper, tiling=case.tiling))
    chunk_of, tokens = np.asarray(table.chunk_of), table.chunk_of.shape[1]
    sums = np.zeros((2, *k.shape), np.float32)
    cuts = [np.arange(*ends) for ends in ((0, 128), (128, 158), (158, 296), (296, 430), (430, tokens))]
    of_frames = 21 + np.arange(482)[:480].reshape(20, 24)[:, 6:12].ravel()
    for place in (*cuts, np.concatenate([np.arange(7, 14), of_frames])):
        begin, count = place[0], len(place)
        q_rows, chunks, d_rows = (
            np.zeros_like(q[:, :ROWS]),
            np.full((1, ROWS), -1, np.int32),
            np.full_like(dout[:, :ROWS], np.nan),
        )
        for rows, x in ((q_rows, q), (chunks, chunk_of), (d_rows, dout)):
            rows[:, :count] = x[:, place]
        some, of_all, of_parts = program(q_rows, k, v, d_rows, chunks)
        np.testing.assert_array_equal(some[:, :, :count], routes[:, :, place])
        for got, want, which in zip(of_all, (out, dq), ("output", "dq")):
            np.testing.assert_array_equal(got[:, :count], want[:, place], f"{which} from {begin} on")
            assert not got[:, count:].any(), "padding must get 0"
        for got, want, which in zip(of_parts, of_all, ("output", "dq", "dk", "dv")):
            assert_close(got, want, f"{which} of parts", table=GRADIENT, dtype="bfloat16")
        if begin != 7:
            sums += np.stack(of_all[2:]).astype(np.float32)
    for got, want, which in zip(sums, (dk, dv), ("dk", "dv")):
        assert_close(got, want, which, table=GRADIENT, dtype="bfloat16")


@pytest.mark.slow
def test_a_second_run_is_bitwise_equal(hopper):
    case = Case(MoCConfig(top_k=1, self_anchor="none", text_anchor="none", causal_routing=False))
    for first, second in zip(run(case, hopper)[0], run(case, hopper)[0], strict=True):
        np.testing.assert_array_equal(first, second)


FACTS = [
    test_conformance.test_gradient_to_an_unselected_chunk_is_exactly_zero,
    test_conformance.test_routes_can_be_given,
]


@pytest.mark.slow
@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.__name__[5:])
def test_conformance_runs_on_the_kernels(fact, hopper, monkeypatch):
    """Two facts of the suite, which runs in full where there is a GPU: its small heads fit the kernels."""
    monkeypatch.setitem(backends.BY_NAME, "pallas_gpu", lambda: hopper)  # the suite knows backends by their names
    fact("pallas_gpu")


# ------------------------------------------------------------------------------------------------ slow: all of them


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("cfg", COVERING, ids=name)
def test_every_config(cfg, head_dim, dtype, hopper):
    check(Case(cfg, UNEVEN, sizes=UNEVEN_SIZES, head_dim=head_dim, dtype=dtype, tiling=THREE_PARTS), hopper)
