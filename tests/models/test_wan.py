"""WanDiT over scenes: who influences whom, what an expert is, and that routing is a switch on the same weights.

That it computes what Wan does is in test_wan_parity.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moc_jax.attention.api import RoutedAttention
from moc_jax.config import ChunkConfig, ConfigError, MoCConfig, WanConfig
from moc_jax.models import abstract, matrix_flops
from moc_jax.models.wan import WanDiT
from moc_jax.models.wan.model import _in_time
from moc_jax.scene import SceneLengths, SceneShape
from moc_jax.sharding import RULES, logical_axes

CFG = WanConfig(
    dim=36, depth=2, heads=2, mlp_dim=40, latent_channels=4, text_dim=8, text_rows=6, dtype="float32", remat="none"
)
MOC = MoCConfig(top_k=1, chunk=ChunkConfig(unit="frames", size=1))
SHOTS = 3


def model_of(cfg=CFG):
    """Random weights everywhere: the zeros that training starts from would hide errors."""
    graph, state = nnx.split(nnx.eval_shape(lambda: WanDiT(cfg, rngs=nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    return graph, jax.tree.unflatten(tree, [rng.normal(0.1, 0.2, x.shape).astype(np.float32) for x in leaves])


GRAPH, WEIGHTS = model_of()


@jax.jit(static_argnames=("moc", "backend"))
def _model_of(weights, video, text, t, lengths, moc, key=None, backend="auto"):
    attention = RoutedAttention(backend=backend)
    return nnx.merge(GRAPH, weights).routed(video, text, t, lengths, moc, key=key, attention=attention)


def run(video, text, t, lengths, moc=MOC, **options):
    return np.asarray(_model_of(WEIGHTS, video, text, t, lengths, moc, **options).velocity)


def assert_close(a, b):
    """To float32's rounding of the largest numbers."""
    assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    video = jax.random.normal(keys[0], (2, 10, 4, 6, 4))
    return video, jax.random.normal(keys[1], (2, 12, 8)), jax.random.uniform(keys[2], (2, SHOTS))


def lengths_of(shots=(4, 3, 2), captions=(2, 3, 2, 1)):
    return SceneLengths(jnp.array([shots, (1, 0, 6)]), jnp.array([captions, (0, 1, 4, 2)]))


def test_padding_changes_nothing_and_scenes_do_not_meet():
    video, text, t = inputs()
    out = run(video, text, t, lengths_of())
    other = run(video.at[:, 9:].set(7.0), text.at[0, 8:].set(-3.0), t, lengths_of())
    np.testing.assert_array_equal(out[0, :9], other[0, :9])
    other = run(video.at[1].add(1.0), text.at[1].add(1.0), t.at[1].set(0.2), lengths_of())
    np.testing.assert_array_equal(out[0, :9], other[0, :9])


@pytest.mark.long
def test_a_shot_reads_its_own_caption_and_the_scenes():
    """Where shots see no others' video, each caption reaches its own shot alone; the scene's reaches all."""
    video, text, t = inputs()
    apart = dataclasses.replace(MOC, top_k=0)
    out = run(video, text, t, lengths_of(), apart)
    frames = {"first": slice(0, 4), "second": slice(4, 7), "third": slice(7, 9)}
    for row, reached in ((0, ("first", "second", "third")), (2, ("first",)), (5, ("second",)), (7, ("third",))):
        changed = np.abs(run(video, text.at[0, row].add(1.0), t, lengths_of(), apart) - out)[0]
        for name, where in frames.items():
            assert (changed[where].max() > 1e-4) == (name in reached), (row, name)


@pytest.mark.long
def test_rows_of_zeros_count_as_rows():
    """Padding that is written into the captions gives what `text_rows` gives without."""
    video, text, t = inputs()
    want = run(video, text, t, lengths_of(), backend="reference")[0, :9]
    graph = nnx.split(nnx.eval_shape(lambda: WanDiT(dataclasses.replace(CFG, text_rows=0), rngs=nnx.Rngs(0))))[0]
    captions = [jnp.pad(x, ((0, 6 - len(x)), (0, 0))) for x in jnp.split(text[0, :8], [2, 5, 7])]
    padded = jnp.broadcast_to(jnp.concatenate(captions)[None], (2, 24, 8))
    lengths = SceneLengths(lengths_of().shot_frames, jnp.full((2, 4), 6))
    found = jax.jit(lambda weights: nnx.merge(graph, weights)(video, padded, t, lengths, MOC))(WEIGHTS)
    assert_close(found[0, :9], want)


@pytest.mark.long
def test_a_shots_noise_level_is_its_own():
    video, text, t = inputs()
    past = dataclasses.replace(MOC, visibility="past")
    out = run(video, text, t, lengths_of(), past)
    later = run(video, text, t.at[:, 2].set(0.9), lengths_of(), past)
    np.testing.assert_array_equal(out[0, :7], later[0, :7])
    assert np.abs(out - later)[0, 7:9].max() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_all_chunks_picked_is_dense_attention(backend):
    video, text, t = inputs()
    every = dataclasses.replace(MOC, top_k=9, causal_routing=False)
    dense = dataclasses.replace(MOC, mode="dense")
    found = [run(video, text, t, lengths_of(), moc, backend=backend) for moc in (every, dense, MOC)]
    assert_close(found[0][0, :9], found[1][0, :9])
    assert np.abs(found[2] - found[1])[0, :9].max() > 1e-3 * np.abs(found[1]).max()


@pytest.mark.slow  # MMDiT's kind stays
def test_blocks_without_a_loop_compute_the_same():
    def of(scan_layers):
        graph = model_of(dataclasses.replace(CFG, scan_layers=scan_layers))[0]

        def loss(weights):
            return jnp.mean(nnx.merge(graph, weights)(*inputs(), lengths_of(), MOC, key=jax.random.key(1)) ** 2)

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(WEIGHTS))

    for a, b in zip(of(True), of(False), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert float(jnp.abs(a).max()) > 0


@pytest.mark.long
def test_dense_layers_are_dense():
    """All of them: dense attention. One: its routes are empty, and the other's are not."""
    video, text, t = inputs()
    both = dataclasses.replace(MOC, dense_layers=(0, 1))
    dense = run(video, text, t, lengths_of(), dataclasses.replace(MOC, mode="dense"))
    assert_close(run(video, text, t, lengths_of(), both)[0, :9], dense[0, :9])
    routes = np.asarray(
        _model_of(WEIGHTS, video, text, t, lengths_of(), dataclasses.replace(MOC, dense_layers=(1,))).routes
    )
    assert (routes[0] >= 0).any()
    assert (routes[1] == -1).all()


def test_routes_are_of_video_alone():
    seen = _model_of(WEIGHTS, *inputs(), lengths_of(), MOC)
    routes, table = np.asarray(seen.routes), seen.table
    assert table.text_tokens == 0
    assert routes.shape == (CFG.depth, 2, CFG.heads, 60, MOC.top_k)
    assert (routes[:, 0, :, :24] == -1).all()  # the first shot has nothing before it
    assert (np.asarray(table.shot)[0][routes[:, 0, :, 24:42]] == 0).all()


def test_positions_are_inside_wans_grid():
    shape = SceneShape(shots=3, frames=9, rows=2, columns=3, text_tokens=0)
    lengths = SceneLengths(jnp.array([[4, 3, 2]]), jnp.zeros((1, 4), int), jnp.array([[False, False, True]]))
    t, h, w = np.moveaxis(np.asarray(_in_time(lengths, shape, 8)).reshape(9, 2, 3, 3), -1, 0)
    assert t[:, 0, 0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 16]
    assert h[5].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert w[5].tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.long
def test_diagonal_positions_are_others():
    video, text, t = inputs()
    graph = nnx.split(nnx.eval_shape(lambda: WanDiT(dataclasses.replace(CFG, positions="diagonal"), rngs=nnx.Rngs(0))))[
        0
    ]
    found = jax.jit(lambda weights: nnx.merge(graph, weights)(video, text, t, lengths_of(), MOC))(WEIGHTS)
    out = run(video, text, t, lengths_of())
    assert np.abs(found - out)[0, :9].max() > 1e-3 * np.abs(out).max()


def test_a_condition_must_be_there_where_one_is_read():
    model = nnx.eval_shape(lambda: WanDiT(dataclasses.replace(CFG, condition_channels=3), rngs=nnx.Rngs(0)))
    for condition in (None, jnp.zeros((2, 10, 4, 6, 2))):
        with pytest.raises(ConfigError, match=r"with model\.condition_channels = 3 and latents of \(2, 10, 4, 6, 4\)"):
            model(*inputs(), lengths_of(), MOC, condition=condition)
    with pytest.raises(ConfigError, match=r"must be None"):
        nnx.merge(GRAPH, WEIGHTS)(*inputs(), lengths_of(), MOC, condition=jnp.zeros((2, 10, 4, 6, 2)))


def test_every_weight_has_axes_that_the_rules_know():
    weights = abstract(dataclasses.replace(CFG, boundary=0.5))[1]
    logical = logical_axes(weights)
    for names in logical.values():
        RULES.spec(*names)
    assert logical["high", "blocks", "attention", "q", "kernel"] == ("layers", "embed", "heads", "head_dim")
    assert logical["low", "blocks", "cross", "k_norm", "scale"] == ("layers", "heads", "head_dim")


def test_a_fresh_model_predicts_zero_and_counts_its_products():
    fresh = nnx.split(WanDiT(CFG, rngs=nnx.Rngs(0)))[1]
    assert float(jnp.abs(_model_of(fresh, *inputs(), lengths_of(), MOC).velocity).max()) == 0
    per_token = sum(
        x.size for path, x in jax.tree.leaves_with_path(fresh) if "kernel" in str(path) and "time" not in str(path)
    )
    assert matrix_flops(CFG, 10, 10) == 20 * per_token


@pytest.mark.long
def test_a_clean_first_frame_is_a_shot_of_its_own_that_the_next_continues():
    """Where all is seen anyway; and at t = 0 it is as all others."""
    video, text, t = inputs()
    dense = dataclasses.replace(MOC, mode="dense")
    whole = SceneLengths(jnp.array([(7, 0, 0), (7, 0, 0)]), jnp.array([(2, 3, 0, 0)] * 2))
    given = dataclasses.replace(whole, clean_first=jnp.array([[True, False, False]] * 2))
    out = run(video, text, t, given, dense)[:, :7]
    apart = SceneLengths(
        jnp.array([(1, 6, 0)] * 2),
        jnp.array([(2, 3, 3, 0)] * 2),
        jnp.array([[False, True, False]] * 2),
    )
    again = jnp.concatenate([text[:, :5], text[:, 2:5], text[:, 8:]], axis=1)
    levels = jnp.concatenate([jnp.zeros((2, 1)), t[:, :1], t[:, :1]], axis=1)
    assert_close(out, run(video, again, levels, apart, dense)[:, :7])
    assert np.abs(out - run(video, text, t, whole, dense)[:, :7]).max() > 0.01
    still = 0 * t
    assert_close(run(video, text, still, given, dense), run(video, text, still, whole, dense))
