"""The transformer as a whole: who influences whom, padding, depth, precision, and one program for all lengths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moc_jax.attention.api import RoutedAttention
from moc_jax.config import ChunkConfig, ConfigError, MMDiTConfig, MoCConfig
from moc_jax.config.presets import PRESETS
from moc_jax.models import matrix_flops, parameter_count
from moc_jax.models.mmdit import MMDiT
from moc_jax.scene import SceneLengths

CFG = MMDiTConfig(dim=48, depth=2, heads=3, latent_channels=4, text_dim=8, dtype="float32", remat="none")
MOC = MoCConfig(top_k=2, chunk=ChunkConfig(unit="frames", size=1))
SHOTS = 3


def _model(cfg=CFG):
    """Random weights everywhere: the zeros that training starts from would hide errors."""
    graph, state = nnx.split(MMDiT(cfg, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return graph, jax.tree.unflatten(tree, noisy)


GRAPH, WEIGHTS = _model()


@jax.jit(static_argnames=("moc", "backend"))
def _model_of(weights, video, text, t, lengths, moc, key=None, backend="auto"):
    attention = RoutedAttention(backend=backend)
    return nnx.merge(GRAPH, weights).routed(video, text, t, lengths, moc, key=key, attention=attention)


def _run(video, text, t, lengths, moc=MOC, key=None, **options):
    """The velocity, from the program that also gives routes: compiling is what takes these tests their time."""
    return _model_of(WEIGHTS, video, text, t, lengths, moc, key, **options).velocity


def _inputs(frames=10, seed=0):
    """Two scenes: of them, most tests look at the first, whose lengths are `_lengths`'s arguments."""
    keys = jax.random.split(jax.random.key(seed), 3)
    video = jax.random.normal(keys[0], (2, frames, 4, 6, 4))
    text = jax.random.normal(keys[1], (2, 12, 8))
    return video, text, jax.random.uniform(keys[2], (2, SHOTS))


def _lengths(shots=(4, 3, 2), captions=(2, 3, 2, 1)):
    return SceneLengths(jnp.array([shots, (1, 0, 6)]), jnp.array([captions, (0, 1, 4, 2)]))


def test_padding_changes_nothing():
    video, text, t = _inputs()
    lengths = _lengths()
    out = _run(video, text, t, lengths)
    other = _run(video.at[:, 9:].set(7.0), text.at[:, 8:].set(-3.0), t, lengths)
    np.testing.assert_array_equal(out[0, :9], other[0, :9])


@pytest.mark.long
def test_more_room_changes_nothing():
    video, text, t = _inputs()
    out = _run(video, text, t, _lengths())
    roomy = _run(jnp.pad(video, ((0, 0), (0, 6)) + ((0, 0),) * 3), text, t, _lengths())
    for b, used in enumerate((9, 7)):
        np.testing.assert_allclose(out[b, :used], roomy[b, :used], atol=2e-5)


def test_scenes_of_a_batch_do_not_meet():
    """Neither the other scene's content and lengths nor the place in the batch matter."""
    inputs, lengths = _inputs(), _lengths()
    both = _run(*inputs, lengths)
    for b, used in enumerate((9, 7)):
        alone = [x.at[1 - b].set(other[b]) for x, other in zip(inputs, _inputs(seed=1))]
        other = jax.tree.map(lambda x, b=b: x.at[1 - b].set(x[b]), lengths)
        np.testing.assert_array_equal(both[b, :used], _run(*alone, other)[b, :used])
    exchanged = _run(*(x[::-1] for x in inputs), jax.tree.map(lambda x: x[::-1], lengths))
    np.testing.assert_array_equal(both[0, :9], exchanged[1, :9])


def test_one_program_for_all_lengths():
    video, text, t = _inputs()
    before = _model_of._cache_size()
    _run(video, text, t, _lengths((1, 1, 1)))
    after_first = _model_of._cache_size()
    for shots in [(4, 3, 2), (0, 5, 5), (10, 0, 0)]:
        _run(video, text, t, _lengths(shots))
    assert _model_of._cache_size() == after_first <= before + 1


def test_a_shots_timestep_reaches_only_who_can_see_it():
    video, text, t = _inputs()
    past = dataclasses.replace(MOC, visibility="past")
    base = _run(video, text, t, _lengths(), past)
    later = _run(video, text, t.at[:, 2].set(0.9), _lengths(), past)
    np.testing.assert_array_equal(base[0, :7], later[0, :7])
    assert float(jnp.abs(base[0, 7:9] - later[0, 7:9]).max()) > 1e-3
    first = _run(video, text, t.at[:, 0].set(0.9), _lengths(), past)
    assert float(jnp.abs(base[0, :4] - first[0, :4]).max()) > 1e-3


def test_past_visibility_hides_later_shots_and_scene_visibility_does_not():
    video, text, t = _inputs()
    changed = video.at[:, 7:9].add(1.0), text.at[:, 7:8].add(1.0), t
    past = dataclasses.replace(MOC, visibility="past")
    np.testing.assert_array_equal(
        _run(video, text, t, _lengths(), past)[0, :7], _run(*changed, _lengths(), past)[0, :7]
    )
    seen = _run(video, text, t, _lengths())[0, :7] - _run(*changed, _lengths())[0, :7]
    assert float(jnp.abs(seen).max()) > 1e-4


def test_dense_attention_is_a_switch_on_the_same_weights():
    video, text, t = _inputs()
    dense = _run(video, text, t, _lengths(), dataclasses.replace(MOC, mode="dense"))
    sparse = _run(video, text, t, _lengths())
    assert dense.shape == sparse.shape
    assert float(jnp.abs(dense - sparse)[0, :9].max()) > 1e-4


@pytest.mark.parametrize("mode", ["moc", "dense"])
def test_the_backends_agree_through_the_whole_model(mode):
    video, text, t = _inputs()
    moc = dataclasses.replace(MOC, mode=mode)
    out = [_run(video, text, t, _lengths(), moc, backend=backend) for backend in ("xla", "reference")]
    for b, used in enumerate((9, 7)):
        np.testing.assert_allclose(out[0][b, :used], out[1][b, :used], atol=5e-5)


def test_routes_are_those_of_video_queries_and_follow_the_rules():
    video, text, t = _inputs()
    seen = _model_of(WEIGHTS, video, text, t, _lengths(), MOC)
    routes, table = seen.routes, seen.table
    alone = jax.jit(lambda weights: nnx.merge(GRAPH, weights)(video, text, t, _lengths(), MOC))(WEIGHTS)
    np.testing.assert_array_equal(seen.velocity, alone)
    assert routes.shape == (CFG.depth, 2, CFG.heads, 60, MOC.top_k)
    routes, chunk_of = np.asarray(routes)[:, :1], np.asarray(table.chunk_of)[0, 12:]
    assert (routes[:, :, :, :24] == -1).all()  # the first shot has nothing before it
    assert (routes[:, :, :, 24:54] >= 0).any()
    picked_shot = np.where(routes >= 0, np.asarray(table.shot)[0][routes], -1)
    own_shot = np.asarray(table.shot)[0][chunk_of]
    assert (picked_shot[:, :, :, :54] < own_shot[:54, None]).all()


@pytest.mark.long
def test_drop_off_and_drop_in_change_training_only():
    video, text, t = _inputs()
    plain = _run(video, text, t, _lengths())
    dropped = _run(video, text, t, _lengths(), key=jax.random.key(0))
    again = _run(video, text, t, _lengths(), key=jax.random.key(0))
    np.testing.assert_array_equal(dropped, again)
    assert float(jnp.abs(plain - dropped)[0, 4:9].max()) > 1e-5


@pytest.mark.long
@pytest.mark.parametrize(
    "remat",
    [
        "full",
        "qkv+attention+mlp",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("attention", "attention+mlp", "dots")),
    ],
)
def test_rematerialisation_changes_no_gradient(remat):
    video, text, t = _inputs()

    def gradient(cfg):
        graph, _ = nnx.split(nnx.eval_shape(lambda: MMDiT(cfg, rngs=nnx.Rngs(0))))

        def loss(weights):
            return jnp.mean(nnx.merge(graph, weights)(video, text, t, _lengths(), MOC)[0, :9] ** 2)

        return jax.jit(jax.grad(loss))(WEIGHTS)

    plain, recomputed = gradient(CFG), gradient(dataclasses.replace(CFG, remat=remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert float(jnp.abs(a).max()) > 0


@pytest.mark.long
@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow)])
def test_blocks_without_a_loop_compute_the_same(remat):
    """Velocity and gradients, with a key for each layer's drop-in, and one layer dense."""
    video, text, t = _inputs()
    moc = dataclasses.replace(MOC, dense_layers=(1,))

    def of(scan_layers):
        cfg = dataclasses.replace(CFG, remat=remat, scan_layers=scan_layers)
        graph = nnx.split(nnx.eval_shape(lambda: MMDiT(cfg, rngs=nnx.Rngs(0))))[0]

        def loss(weights):
            return jnp.mean(nnx.merge(graph, weights)(video, text, t, _lengths(), moc, key=jax.random.key(1))[0] ** 2)

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(WEIGHTS))

    for a, b in zip(of(True), of(False), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert float(jnp.abs(a).max()) > 0


@pytest.mark.long
def test_bfloat16_computes_near_float32():
    video, text, t = _inputs()
    graph, _ = nnx.split(nnx.eval_shape(lambda: MMDiT(dataclasses.replace(CFG, dtype="bfloat16"), rngs=nnx.Rngs(0))))
    low = jax.jit(lambda weights: nnx.merge(graph, weights)(video, text, t, _lengths(), MOC))(WEIGHTS)
    high = _run(video, text, t, _lengths())
    assert low.dtype == jnp.float32
    error = jnp.linalg.norm((low - high)[0, :9]) / jnp.linalg.norm(high[0, :9])
    assert 1e-4 < float(error) < 0.05


def test_a_fresh_model_predicts_zero_and_depth_does_not_grow_the_program():
    args = (*_inputs(), _lengths())
    fresh = nnx.split(MMDiT(CFG, rngs=nnx.Rngs(0)))[1]
    assert float(jnp.abs(_model_of(fresh, *args, MOC).velocity).max()) == 0

    def size(depth, **more):
        cfg = dataclasses.replace(CFG, depth=depth, **more)
        graph, state = nnx.split(nnx.eval_shape(lambda: MMDiT(cfg, rngs=nnx.Rngs(0))))
        run = jax.jit(lambda state, *args: nnx.merge(graph, state)(*args, MOC))
        return len(run.lower(state, *args).as_text())

    assert size(6) < 1.05 * size(2)
    assert size(2, scan_layers=False) > 1.05 * size(2)  # each block has its own part


def test_patches_across_frames_and_sizes_that_do_not_divide():
    cfg = dataclasses.replace(CFG, patch=(2, 2, 2))
    model = MMDiT(cfg, rngs=nnx.Rngs(0))
    video, text, t = _inputs()
    out = jax.eval_shape(lambda: model(video, text, t, _lengths((4, 2, 2)), MOC))
    assert out.shape == video.shape
    with pytest.raises(ConfigError, match=r"9 frames.*pieces of 2; use 8 or 10"):
        model(video[:, :9], text, t, _lengths(), MOC)
    with pytest.raises(ConfigError, match=r"condition has shape .* it must be None"):
        model(video, text, t, _lengths((4, 2, 2)), MOC, condition=video)


def test_presets_reach_from_the_demo_to_three_billion_parameters():
    counts = {name: parameter_count(cfg) for name, cfg in PRESETS.items() if cfg.name == "mmdit"}
    assert counts["demo"] < 5e6
    assert 2.9e9 < counts["3b"] < 3.1e9
    assert list(counts.values()) == sorted(counts.values())


def test_matrix_flops_are_what_the_compiler_counts():
    """Two FLOPs per weight and token, against XLA's own count of one block's matrices."""
    cfg = dataclasses.replace(CFG, depth=1)
    x = jnp.zeros((100, cfg.dim))
    w = [jnp.zeros((cfg.dim, n * cfg.dim)) for n in (3, 1, 4, 4)]
    counted = sum(jax.jit(jnp.dot).lower(x, m).compile().cost_analysis()["flops"] for m in w)
    ends = 2 * 2 * cfg.dim * 16 * 100
    assert matrix_flops(cfg, 0, 100) == pytest.approx(counted + ends, rel=1e-6)


@pytest.mark.long
def test_dense_layers_are_dense():
    """Captions included. All of them: dense attention. One: its routes are empty, and the other's are not."""
    video, text, t = _inputs()
    dense = _run(video, text, t, _lengths(), dataclasses.replace(MOC, mode="dense"))
    every = _run(video, text, t, _lengths(), dataclasses.replace(MOC, dense_layers=(0, 1)))
    np.testing.assert_allclose(every[0, :9], dense[0, :9], atol=2e-5)
    seen = _model_of(WEIGHTS, video, text, t, _lengths(), dataclasses.replace(MOC, dense_layers=(1,)))
    assert (np.asarray(seen.routes[0]) >= 0).any()
    assert (np.asarray(seen.routes[1]) == -1).all()
    assert np.abs(seen.velocity - every)[0, :9].max() > 1e-3


@pytest.mark.long
def test_a_clean_first_frame_stands_at_no_noise():
    """Its shot's level reaches it no more than a clean shot's."""
    video, text, t = _inputs()
    lengths = _lengths((9, 0, 0), (2, 3, 0, 0))
    given = dataclasses.replace(lengths, clean_first=jnp.array([[True, False, False], [False] * 3]))
    still = t.at[0, 0].set(0.0)
    np.testing.assert_allclose(_run(video, text, still, given)[0], _run(video, text, still, lengths)[0], atol=2e-5)
    assert np.abs(_run(video, text, t, given) - _run(video, text, t, lengths))[0, :9].max() > 1e-3
