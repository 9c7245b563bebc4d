"""benchmarks/model.py end to end on a small model, and that both its columns are the same model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import model
from moc_jax.attention.api import RoutedAttention
from moc_jax.cli import load_config
from moc_jax.config import ChunkConfig, LoraConfig, MeshConfig, MMDiTConfig, MoCConfig, OptimizerConfig, TrainConfig
from moc_jax.models import matrix_flops, parameter_count
from moc_jax.models.mmdit import MMDiT
from moc_jax.sharding import make_mesh
from moc_jax.training.held import state_bytes
from moc_jax.training.state import make_blueprint

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


@pytest.mark.slow
def test_of_adapters_nothing_else_is_trained(tmp_path, capsys):
    size = ["--frames", "2", "--rows", "4", "--columns", "4", "--caption", "2", "--repeats", "1", "--attend", "moc"]
    network = ["--model.dim", "16", "--model.depth", "1", "--model.heads", "2", "--model.mlp-dim", "32"]
    network += ["--model.text-dim", "8", "--model.text-rows", "4", "--model.remat", "full", "--moc.top-k", "1"]
    rank = ["--case", "wan21-1.3b", "--model.lora.rank", "2"]
    model.run([*rank, *size, *network, "--attention.backend", "xla", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("model-*.json")
    entries = json.loads(file.read_text())["entries"]
    sizes = "wan, 1 layers of 16, 8 tokens, LoRA of rank 2, top 1, xla"
    assert [*entries] == [f"denoising, {sizes}", f"training, {sizes}, remat full"]
    entry = entries[f"training, {sizes}, remat full"]
    # Of ten maps in the block: eight of 16 to 16, and those of the MLP.
    assert entry["trained"] == 8 * 2 * (16 + 16) + 2 * 2 * (16 + 32)
    assert entry["parameters"] > 2 * entry["trained"]
    held, count = entry["state_bytes"], 4 * entry["trained"]
    assert (held["weights"], held["average"]) == (count, 0)
    assert 2 * count <= held["optimizer"] < 2 * count + 64  # and steps
    assert 2 * entry["parameters"] <= held["frozen"] < 4 * entry["parameters"]
    assert held["frozen"] < entry["steps"]["training"]["moc"]["memory"]["arguments"]
    assert entry["training_flops"]["moc"] < 3 * entry["forward_flops"]["moc"]
    assert "| training | Wan, LoRA of rank 2, top 1 | 1 | 16 |" in capsys.readouterr().out


def test_adapters_are_measured_as_the_shipped_config_trains_them():
    case, shipped = model.CASES["wan21-1.3b"], load_config(["--config", "wan21_1_3b_lora"])
    lora, picks = LoraConfig(rank=32), dataclasses.replace(case.moc, top_k=5)
    args = dataclasses.replace(case, model=dataclasses.replace(case.model, lora=lora), moc=picks)
    assert (args.moc, lora.targets, lora.scale) == (shipped.moc, shipped.model.lora.targets, shipped.model.lora.scale)
    described, plain = (model._describe(a, model.make_scene(a)) for a in (args, case))
    assert described["trained"] == 43_745_280
    assert described["parameters"] == plain["parameters"] == plain["trained"]
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    blueprint = make_blueprint(args.model, OptimizerConfig(), TrainConfig(ema_decay=0.0), mesh)
    held = state_bytes(blueprint.abstract)
    assert held["optimizer"] == pytest.approx(8 * described["trained"], rel=1e-3)
    assert held["frozen"] < 2.1 * described["parameters"]
    # Frozen matrices have no gradients.
    flops = {name: plain["training_flops"][name] - described["training_flops"][name] for name in ("moc", "dense")}
    shape = case.caption * (case.shots + 1), case.frames * case.rows * case.columns // 4
    assert flops["dense"] == pytest.approx(matrix_flops(args.model, *shape))


@pytest.mark.parametrize(
    ("case", "changed", "name"),
    [
        ("multi_shot", {}, "30 layers"),
        ("multi_shot", {"shots": 16}, "30 layers, 360952 tokens"),
        ("base", {"moc": MoCConfig(top_k=5)}, "20 layers of 1024, 2 scenes, top 5, chunks of 1280 tokens"),
        ("wan21-1.3b", {}, "wan, 30 layers of 1536, 32760 tokens"),
    ],
)
def test_what_is_not_the_cases_own_is_in_the_name(case, changed, name):
    of_case = model.CASES[case]
    args = dataclasses.replace(of_case, **changed)
    tokens = {"multi_shot": args.shots * 22_500 + (args.shots + 1) * 56, "wan21-1.3b": 32_760}.get(case)
    assert model._name(args, of_case, {"tokens": tokens, "variant": model._variant(args, of_case)}) == name


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
