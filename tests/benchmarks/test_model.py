"""benchmarks/model.py end to end on a small model, and that both its columns are the same model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import model
from moc_jax.attention.api import RoutedAttention
from moc_jax.config import ChunkConfig, MMDiTConfig, MoCConfig
from moc_jax.models import parameter_count
from moc_jax.models.mmdit import MMDiT

TINY = MMDiTConfig(dim=16, depth=2, heads=2, latent_channels=4, text_dim=8, dtype="float32")
MOC = MoCConfig(chunk=ChunkConfig(size=8), top_k=1)
ARGUMENTS = model.Arguments(model=TINY, moc=MOC, shots=3, frames=2, rows=8, columns=8, caption=2)


@pytest.mark.slow
def test_both_steps_are_stored(tmp_path):
    size = ["--shots", "2", "--frames", "2", "--rows", "4", "--columns", "4", "--caption", "2", "--repeats", "1"]
    network = ["--model.dim", "16", "--model.depth", "1", "--model.heads", "2", "--model.text-dim", "8"]
    model.run([*size, *network, "--moc.chunk.size", "4", "--attention.backend", "xla", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("model-*.json")
    entries = json.loads(file.read_text())["entries"]
    assert [name.endswith(", remat attention+mlp") for name in entries] == [False, True]  # what a run would choose here
    denoising, entry = entries.values()
    assert entry["model"]["remat"] == "attention+mlp"
    assert entry["tokens"] == denoising["tokens"] == 2 * 2 * 2 * 2 + 3 * 2
    assert [*denoising["steps"], *entry["steps"]] == ["denoising", "training"]
    for step in (denoising["steps"]["denoising"], entry["steps"]["training"]):
        assert step["ratio"] == pytest.approx(step["dense"]["median_ms"] / step["moc"]["median_ms"])
        assert step["moc"]["memory"]["peak"] > 4 * entry["parameters"]
    # Weights, gradients and two moments.
    assert entry["steps"]["training"]["moc"]["memory"]["arguments"] > 12 * entry["parameters"]


@pytest.mark.long
def test_the_baseline_is_the_same_model_dense():
    scene = model.make_scene(ARGUMENTS)
    graph, weights = nnx.split(MMDiT(TINY, rngs=nnx.Rngs(0)))
    # Fresh weights hold zeros that switch attention off.
    random = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: 0.3 * random.standard_normal(x.shape).astype(x.dtype), weights)
    t = jnp.full(scene.lengths.shot_frames.shape, 0.5)

    def velocity(attention, moc):
        network = nnx.merge(graph, weights)
        run = jax.jit(lambda z: network(z, scene.text, t, scene.lengths, moc, attention=attention))
        return np.asarray(run(scene.video))

    routed = RoutedAttention(backend="xla")
    ours = velocity(routed, MoCConfig(mode="dense"))
    np.testing.assert_allclose(velocity(model.dense, MOC), ours, rtol=2e-3, atol=2e-4)
    assert np.abs(velocity(routed, MOC) - ours).max() > 1e-2


def test_the_sizes_are_wans_and_the_parameters_those_of_two_streams():
    assert (model.TWO_STREAMS.mlp_dim, model.TWO_STREAMS.head_dim) == (8960, 128)
    per_stream = 4 * 1536**2 + 2 * 1536 * 8960 + 6 * 1536**2  # attention, MLP, modulation
    assert parameter_count(model.TWO_STREAMS) == pytest.approx(30 * 2 * per_stream, rel=0.02)


@pytest.mark.parametrize(
    ("case", "parameters", "tokens"),
    [
        ("base", 759e6, 2 * 9_648),
        pytest.param("small", 115e6, 4 * 2_448, marks=pytest.mark.long),
    ],
)
def test_a_case_is_a_model_and_its_scenes(case, parameters, tokens):
    args = model.CASES[case]
    described = model._describe(args, model.make_scene(args))
    assert (described["parameters"], described["tokens"]) == (pytest.approx(parameters, rel=0.01), tokens)
    assert described["forward_flops"]["moc"] < described["forward_flops"]["dense"]


def test_what_does_not_fit_is_told(monkeypatch):
    class Small:
        @staticmethod
        def memory_stats():
            return {"bytes_limit": 1 << 10}

    lowered = jax.jit(lambda x: x @ x).lower(np.zeros((64, 64), np.float32))
    monkeypatch.setattr(jax, "devices", lambda: [Small])
    with pytest.raises(model.DoesNotFit, match=r"step of 2 layers needs .* try --model.depth 1"):
        model.fitting(lowered, TINY)
