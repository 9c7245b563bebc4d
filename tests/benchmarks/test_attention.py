"""benchmarks/attention.py end to end on a small scene, and what its figures rest on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention
from benchmarks.inputs import make_inputs, union_ratio
from benchmarks.settings import SETTINGS
from moc_jax.attention.accounting import account
from moc_jax.attention.api import route
from moc_jax.config import ChunkConfig, MoCConfig

HEADS, DIM, SHRINK = 2, 8, 450
SMALL = ["--shrink", str(SHRINK), "--heads", str(HEADS), "--head-dim", str(DIM), "--repeats", "2", "--backend", "xla"]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """What one run stores, by setting and inputs."""
    folder = tmp_path_factory.mktemp("results")
    chosen = ["--settings", "multi_shot", "scaling", "--scaling-shots", "1", "2", "8", "--profile"]
    attention.run([*chosen, *SMALL, "--out", str(folder)])
    (file,) = folder.glob("*.json")
    stored = json.loads(file.read_text())
    assert stored["card"] == jax.devices()[0].device_kind
    return {(e["setting"], e["inputs"]): e for e in stored["entries"].values()}


@pytest.mark.parametrize("kind", ["random", "correlated"])
def test_ratios_are_those_of_the_medians(entries, kind):
    e = entries["multi_shot", kind]
    for way in ("forward", "forward_backward"):
        ours, dense = (e[way][name]["median_ms"] for name in ("moc", "dense"))
        assert ours > 0
        assert e[way]["ratio"] == pytest.approx(dense / ours)
        assert e[way]["moc"]["low_ms"] <= ours <= e[way]["moc"]["high_ms"]
    routing = e["routing"]["median_ms"] + e["sorting"]["median_ms"]
    assert e["routing_share"] == pytest.approx(routing / e["forward"]["moc"]["median_ms"])


def test_dense_is_measured_once_per_number_of_tokens(entries):
    assert (
        entries["multi_shot", "random"]["forward"]["dense"] == entries["multi_shot", "correlated"]["forward"]["dense"]
    )


def test_bound_counts_the_pairs(entries):
    setting = SETTINGS["multi_shot"].shrunk(SHRINK)
    cost = account(setting.table(), setting.moc, DIM)
    e = entries["multi_shot", "random"]
    assert e["tokens"] == setting.shape.tokens == 8 * 25 * 2 + 9
    assert e["pairs"]["dense"] == e["tokens"] ** 2
    # All chunks have the same length, so that what is picked makes no difference.
    assert e["pairs"]["bound"] == pytest.approx(cost.dense_pairs / cost.pairs)


def test_memory_is_counted_in_tensors(entries):
    e = entries["multi_shot", "random"]["memory"]
    tensor = 2 * entries["multi_shot", "random"]["tokens"] * HEADS * DIM
    both = e["forward_backward"]
    assert e["tensors"] == 8 * tensor
    assert both["outputs"] == pytest.approx(4 * tensor, rel=0.02)  # out, dq, dk, dv
    assert both["peak"] >= both["arguments"] + both["outputs"] + both["temporary"]
    assert e["peak_over_tensors"] == pytest.approx(both["peak"] / (8 * tensor))


def test_parts(entries):
    e = entries["multi_shot", "random"]
    parts = {part["part"]: part for part in e["parts"]}
    assert list(parts)[:3] == ["pooling", "pooling + routing", "sorting"]
    # Anchors and routed part together are the pairs of the whole; what captions see belongs to either.
    flops = parts["anchors"]["gflop"] + parts["routed (sorting to merge)"]["gflop"]
    captions = 9 * 9 + 8 * 50
    assert flops * 1e9 == pytest.approx(4 * DIM * HEADS * (e["pairs"]["attended"] + captions))
    rate = e["ceilings"]["measured_flops"], e["ceilings"]["measured_bytes"]
    for part in parts.values():
        floor = max(part["gflop"] * 1e9 / rate[0], part["gigabytes"] * 1e9 / rate[1])
        assert part["measured_floor_ms"] == pytest.approx(1e3 * floor)
        assert part["time"]["median_ms"] > 0


def test_scaling_is_relative_to_eight_shots(entries):
    points = {p["shots"]: p for p in entries["scaling", "random"]["points"]}
    assert list(points) == [1, 2, 8]
    each = {shots: p["moc"]["median_ms"] / p["tokens"] for shots, p in points.items()}
    for shots, p in points.items():
        assert p["per_token_over_base"] == pytest.approx(each[shots] / each[8])
    assert points[8]["dense"]["median_ms"] > 0


def test_correlated_routes_are_alike(entries):
    assert entries["multi_shot", "correlated"]["union_ratio"] < entries["multi_shot", "random"]["union_ratio"]

    setting = SETTINGS["routed_256_k3"].shrunk(1)
    table, tokens = setting.table(), setting.shape.tokens
    ratios = {}
    for kind in ("random", "correlated"):
        q, k, v, d_out = make_inputs(kind, tokens, 1, 32)
        for x in (q, k, v, d_out):
            assert np.asarray(x, np.float32).std() == pytest.approx(1, abs=0.2)
        routes = jax.jit(route, static_argnames=("cfg", "backend"))(q, k, table, setting.moc, backend="xla")
        ratios[kind] = union_ratio(routes, 0)
    chunks, k = 24, 3
    assert ratios["random"] == pytest.approx(chunks / k, rel=0.02)  # 128 random queries pick all chunks
    assert ratios["correlated"] < ratios["random"] / 2


def test_union_ratio():
    same = jnp.broadcast_to(jnp.array([1, 5, -1]), (1, 2, 16, 3))
    assert union_ratio(same, 4, tile=4) == 1
    own = jnp.arange(16)[None, None, :, None]  # every query its own chunk
    assert union_ratio(own, 0, tile=4) == 4
    assert union_ratio(jnp.full((1, 2, 16, 3), -1), 0) is None


@pytest.mark.parametrize(
    ("name", "tokens", "bound"),
    [
        ("multi_shot", 180_504, 6.344),
        ("routed_1280_k5", 184_320, 144 / 5),
        ("routed_512_k8", 184_320, 360 / 8),
        ("routed_1536_k3", 32_704, 32_704 / (3 * 1486.5)),
        ("routed_256_k3", 6_144, 24 / 3),
        ("wan", 32_760, 21 / 4),
        ("single_shot", 6_304, 6_304**2 / (6_000 * (4 * 250 + 304) + 304 * 304 + 152 * 6_000)),
    ],
)
def test_settings_are_the_published_ones(name, tokens, bound):
    setting = SETTINGS[name]
    cost = account(setting.table(), setting.moc, 128)
    assert cost.tokens == setting.shape.tokens == tokens
    assert cost.dense_pairs / cost.expected_pairs == pytest.approx(bound, rel=2e-3)


def test_nothing_is_quoted_for_shrunk_settings():
    assert SETTINGS["wan"].quoted is None
    assert SETTINGS["routed_256_k3"].quoted.forward_ms == 1.4
    assert SETTINGS["routed_256_k3"].shrunk(2).quoted is None


def test_quoted_figures_stand_beside_their_own_size_only(tmp_path):
    theirs = dataclasses.replace(SETTINGS["routed_256_k3"].quoted, heads=2, head_dim=DIM)
    setting = dataclasses.replace(SETTINGS["routed_256_k3"], frame_tokens=96, quoted=theirs)
    for heads, quoted in ((2, True), (1, False)):
        bench = attention.Bench(
            attention.Arguments(heads=heads, head_dim=DIM, repeats=1, dense=False, backend="xla", out=tmp_path)
        )
        entry = bench.measure(setting, "random")
        assert ("quoted" in entry) == quoted
        if quoted:
            ours = entry["forward_backward"]["moc"]["median_ms"]
            assert entry["forward_backward"]["quoted_ratio"] == pytest.approx(2.0 / ours)


def test_unknown_settings_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"single_shoot: known are multi_shot, .*scaling"):
        attention.Arguments(settings=("single_shoot",), out=tmp_path)


def test_slow_points_are_left_out():
    bench = attention.Bench(attention.Arguments(limit_seconds=1.0))
    last = {"pairs": {"attended": 10, "dense": 10}, "moc": {"median_ms": 400.0}, "dense": {"median_ms": 600.0}}
    point = {"pairs": {"attended": 20, "dense": 20}}
    assert bench._affordable([last], "moc", point, "attended")
    assert not bench._affordable([last], "dense", point, "dense")
    assert not bench._affordable([{"pairs": last["pairs"]}], "moc", point, "attended")


def test_small_settings_keep_their_kind():
    small = SETTINGS["wan"].shrunk(10)
    assert small.moc == MoCConfig(
        chunk=ChunkConfig(unit="frames", size=1), top_k=3, self_anchor="chunk", causal_routing=False
    )
    assert small.shape.tokens == 21 * 156
