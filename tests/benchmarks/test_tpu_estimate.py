"""benchmarks/tpu_estimate: what XLA's text says, loops and their turns, and what is added up from them."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import tpu_estimate
from benchmarks.settings import SETTINGS
from benchmarks.tables import estimate_parts_table, estimate_table
from benchmarks.tpu import compiler, hlo, listing, walks
from benchmarks.tpu.counting import Call, Turns, turns
from benchmarks.tpu.real_sizes import SceneProgram
from moc_jax.attention.pallas_tpu import tuning
from moc_jax.attention.pallas_tpu.device import Chip
from tests.benchmarks.test_tpu_schedule import _guarded, _listings, _schedule

TEXT = """HloModule jit_run, is_scheduled=true

%body (arg: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %arg = (s32[], f32[8,128]) parameter(0)
  %slice.1 = f32[8,128]{1,0} fusion(%arg), kind=kLoop, backend_config={"estimated_cycles":"100"}
  %moc_spread.1 = bf16[4,8,128]{2,1,0} custom-call(%slice.1), custom_call_target="tpu_custom_call"
}

%cond (arg: (s32[], f32[8,128])) -> pred[] {
  ROOT %lt = pred[] compare(%arg, %arg), backend_config={"estimated_cycles":"5"}
}

%offloaded (p: bf16[16,128]) -> bf16[16,128] {
  ROOT %g = bf16[16,128]{1,0} fusion(%p), kind=kCustom, backend_config={"estimated_cycles":"9223372036854775807"}
}

ENTRY %main (q: bf16[16,128]) -> bf16[16,128] {
  %q = bf16[16,128]{1,0} parameter(0)
  %pad = bf16[24,128]{1,0} pad(%q, %q), backend_config={"estimated_cycles":"1000"}
  %start = ((), (), (s32[1]{0})) call-start(), to_apply=%offloaded
  %gather.2 = bf16[16,128]{1,0} call-done(%start)
  %copy-start = (s32[64]{0}, s32[64]{0}, u32[]) copy-start(%q)
  %copy-done = s32[64]{0} copy-done(%copy-start)
  %empty = f32[1024]{0} custom-call(), custom_call_target="AllocateBuffer"
  %while.3 = (s32[], f32[8,128]) while(%pad), condition=%cond, body=%body
  %moc_merge.4 = bf16[16,128]{1,0} custom-call(%q), custom_call_target="tpu_custom_call"
}
"""


def test_operations_of_xla():
    """Each as often as it runs; kernels, and what takes no time, left out; async ones once."""
    found = {x.name: x for x in hlo.operations(TEXT, turns=3)}
    assert {name: (x.cycles, x.turns) for name, x in found.items()} == {
        "pad": (1000, 1), "gather.2": (None, 1), "copy-start": (None, 1), "slice.1": (100, 3), "lt": (5, 3)
    }  # fmt: skip
    assert found["gather.2"].bytes == 2 * 16 * 128
    assert found["copy-start"].bytes == 4 * 64
    with pytest.raises(ValueError, match="no entry"):
        hlo.operations("HloModule")


def test_loops_count_what_is_theirs():
    rows = [("LB: > { a }", 0), ("LB: >> { b }", 2), ("LB: >>> { c }", 1), ("  : >>> { d }", 0), ("  : >> { e }", 0),
            ("LB: >> { f }", 0), ("  : > { g }", 4), ("  :  { h }", 0)]  # fmt: skip
    found = listing.loops(*_listings(*rows))
    assert [(loop.depth, loop.cycles) for loop in found] == [(1, 2), (2, 2), (3, 2), (2, 1)]


def test_a_schedule_knows_its_inner_loops():
    inner = [("LB: > > { b }", 3), ("  : > > { c }", 3)]
    rows = [("LB: > { a }", 0), *_guarded(8, ("  : > { d }", 4), ("  : > { e }", 4), *inner), ("  : > { g }", 0)]
    assert listing.read(*_listings(*rows), granule=32).inner_cycles == (2,)


def test_cycles_of_a_walk():
    schedule = _schedule(alternative_cycles=(4500,), inner_cycles=(60, 700))  # tile 5000, step 5400, sometimes 400
    walk = walks.Walk(tiles=10, steps=100, idle=20, others=(8, 30), other_steps=25)
    assert walks.walk_cycles(schedule, walk) == 120 * 400 + 75 * 4500 + 8 * 60 + 30 * 700 + 10 * 400
    with pytest.raises(ValueError, match="2 inner loops"):
        walks.walk_cycles(_schedule(), walk)


SETTING = SETTINGS["multi_shot"].shrunk(50)


@pytest.fixture(scope="module")
def counted():
    """Turns of each kernel of a fiftieth of the reference scene, the first of its name."""
    calls = walks.scene_calls(SceneProgram(setting=SETTING, heads=2), "forward", "v5p")
    assert {call.times for call in calls} == {1}
    return {call.name: turns(call) for call in reversed(calls)}


@pytest.mark.long
@pytest.mark.parametrize("kernel", ["moc_forward_text", "moc_forward_anchors", "moc_forward_picks"])
def test_walks_cover_all_pairs(counted, kernel):
    blocks = tuning.blocks(SETTING.moc, SETTING.table(), 128, jnp.bfloat16, Chip("v5p"))
    found, tiling = walks.walk(kernel, counted[kernel]), getattr(blocks, kernel.split("_")[2])
    video, shape = SETTING.frames * SETTING.frame_tokens, SETTING.shape
    pairs = {
        "moc_forward_text": SETTING.caption * (shape.tokens + SETTING.shots * (video + shape.text_tokens)),
        "moc_forward_anchors": SETTING.shots * video * (video + shape.text_tokens),
        "moc_forward_picks": int((walks.random_routes(SETTING, 128) >= 0).sum()) * video // 18,
    }[kernel]
    computed = found.steps * tiling.queries * tiling.keys
    assert computed >= 2 * pairs
    segments = {"moc_forward_text": SETTING.shots + 1, "moc_forward_anchors": SETTING.shots}
    if kernel in segments:  # each within a tile
        assert found.tiles == 2 * segments[kernel]
    assert 0 <= found.other_steps <= found.steps
    assert found.tiles <= found.steps


@pytest.mark.long
def test_picks_come_from_earlier_shots(counted):
    routes = walks.random_routes(SETTING, 128)
    video = SETTING.frames * SETTING.frame_tokens
    assert (routes >= 0).sum() == SETTING.moc.top_k * video * (SETTING.shots - 1)


@pytest.mark.long
def test_loops_are_counted_by_the_kernels_own_code(counted):
    """Of two heads and two spans of 8192 rows, whose second reaches beyond the queries."""
    chunks, spans = SETTING.table().kind.shape[1], 2
    spread, merge = counted["moc_spread"], counted["moc_merge"]
    rows = spread.branches[2] * 512 // 16  # of steps with pairs, in groups of 16
    tails, runs = 2 * chunks, 2 * spans * chunks
    assert (spread.grid, spread.loops[:3], spread.loops[4:]) == (64, [tails, runs, rows], [runs, tails])
    assert merge.loops[:2] == [tails, runs - tails]  # of the first span, and of the next ones while one is worked on
    assert 0 < spread.branches[2] <= 64


def test_what_the_compiler_did_without_does_not_count():
    found = Turns(grid=9, loops=[7, 100, 0, 3], optional=[True, False, False, True], branches=[])
    assert found.of_loops(4) == [7, 100, 0, 3]
    assert found.of_loops(2) == [100, 0]
    assert found.of_loops(1) == [100]
    with pytest.raises(ValueError, match="0 loops, but 1 of the kernel's"):
        found.of_loops(0)


@pytest.mark.long
def test_other_loops_and_kernels_are_refused(counted):
    listings = _listings(("LB: > { a }", 1), ("  : > { b }", 1))
    with pytest.raises(ValueError, match="kernel moc_merge: 0 loops, but 5"):
        walks.cycles("moc_merge", counted["moc_merge"], *listings, 32)
    call = Call({"name": "moc_move"}, [], 1)
    assert list(tpu_estimate.pair(["moc_move.11.refs", "moc_move.2"], [call] * 2)) == [
        ("moc_move.2", call),
        ("moc_move.11.refs", call),
    ]
    with pytest.raises(ValueError, match="moc_move: 1 calls are traced"):
        list(tpu_estimate.pair(["moc_move.1", "moc_move.2"], [call]))


def test_equal_kernels_are_listed_once():
    one, other = (Call({"name": "moc_ranks", "jaxpr": code, "grid_mapping": ()}, [], 1) for code in "ab")
    pairs = list(tpu_estimate.pair(["moc_ranks.2", "moc_ranks.10", "moc_ranks.3"], [one, other, one]))
    assert pairs == [("moc_ranks.2", one), ("moc_ranks.3", other), ("moc_ranks.10", one)]
    found = tpu_estimate.listings(pairs, ["moc_ranks.3", "moc_ranks.10"])
    assert [name for _, name in found] == ["moc_ranks.10", "moc_ranks.3", "moc_ranks.10"]
    with pytest.raises(ValueError, match=r"moc_ranks\.3 is compiled, but listed are"):
        list(tpu_estimate.listings(pairs, ["moc_ranks.2"]))


def test_splash_at_its_best(tmp_path):
    entries = {}
    for q, kv, cycles in ((1024, 1024, 5000), (2048, 1024, 9000), (512, 512, 1500)):
        blocks = {"q": q, "kv": kv, "compute": kv}
        entry = {"kernel": "splash", "pass": "forward", "blocks": blocks, "step_cycles": cycles}
        entries[f"{q}"] = {**entry, "conditional_cycles": [300]}
    entries["none"] = {"kernel": "splash", "pass": "forward", "blocks": blocks, "error": "too large"}
    (tmp_path / "tpu_schedule-tpu-v5p.json").write_text(json.dumps({"chip": "TPU v5p", "entries": entries}))
    ms, (best,) = tpu_estimate.splash_ms("v5p", "forward", tmp_path)
    assert (best["q"], best["kv"]) == (2048, 1024)
    cycles = 12 * 89 * (177 * 9000 + 300)  # 180 504 tokens in tiles of 2048 and steps of 1024
    assert ms == pytest.approx(1e3 * cycles / 2 / compiler.CHIPS["v5p"].clock)
    with pytest.raises(RuntimeError, match=r"run benchmarks\.tpu_schedule first"):
        tpu_estimate.splash_ms("v4", "forward", tmp_path)


def test_tables():
    times = {"forward_anchors": 60.0, "forward_text": 1.0, "forward_picks": 17.0, "add": 4.0}
    kernels = {f"moc_{name}": {"calls": 1, "cycles": 1e6, "ms": ms} for name, ms in times.items()}
    entry = {"kernels": kernels, "xla_ms": 2.5, "xla_without_estimate_ms": 0.5, "cores": 2}
    entry |= {"total_ms": 85.0, "splash_ms": 425.0, "ratio": 5.0}
    file = {"chip": "TPU v5p", "entries": {"forward": entry}}
    (_, _, row) = estimate_table([file])
    times = "61.0 ms | 17.0 ms | 4.0 ms | 3.0 ms |"
    assert row == f"| v5p | 2 | forward | 85.0 ms | 425.0 ms | 5.00x | {times}"
    rows = estimate_parts_table(file)[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| moc_forward_anchors", "| moc_forward_picks", "| moc_add", "| moc_forward_text", "| XLA's operations",
        "| those without its estimate",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_every_kernel_is_counted(way):
    """Kernels have the loops whose turns are counted, and each one of the program is there."""
    found = tpu_estimate.estimate("v5e", way, timeout=1800)
    assert {"moc_router", "moc_ranks", "moc_spread", "moc_merge", "moc_forward_picks"} <= set(found["kernels"])
    assert all(kernel["ms"] > 0 for kernel in found["kernels"].values())
    assert found["ratio"] > 1
