"""benchmarks/tpu_step: what a compiled program's operations read and write, and what they are for."""

import pytest

from benchmarks import tpu_step
from benchmarks.tables import traffic_table
from benchmarks.tpu.traffic import Program, kind_of

TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/src/moc_jax/models/rope.py"
2 "/src/moc_jax/models/mmdit/block.py"
3 "/site-packages/jaxtyping/_decorator.py"

FunctionNames
1 "rotate"
2 "StreamBlock.project"
3 "wrapped"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=5 end_line=5 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=3 parent_frame_id=1}
3 {file_location_id=1 parent_frame_id=2}

%turned (p.0: bf16[16,3,128], p.1: f32[4,8,64]) -> f32[16,128] {
  %p.0 = bf16[16,3,128]{2,0,1:T(8,128)(2,1)} parameter(0)
  %slice.1 = bf16[16,1,128]{2,0,1:T(8,128)(2,1)} slice(%p.0), slice={[0:16], [1:2], [0:128]}, metadata={stack_frame_id=1}
  %p.1 = f32[4,8,64]{2,1,0:T(8,128)} parameter(1)
  %mul.1 = f32[16,128]{1,0:T(8,128)} multiply(%slice.1, %p.1), metadata={op_name="mul" stack_frame_id=3}
  ROOT %add.1 = f32[16,128]{1,0:T(8,128)} add(%mul.1, %mul.1), metadata={op_name="add" stack_frame_id=3}
}

%stacked (p.2: f32[30,16,128], p.3: f32[16,128]) -> f32[30,16,128] {
  %p.2 = f32[30,16,128]{2,1,0:T(8,128)} parameter(0)
  %p.3 = f32[16,128]{1,0:T(8,128)} parameter(1)
  ROOT %dus = f32[30,16,128]{2,1,0:T(8,128)} dynamic-update-slice(%p.2, %p.3)
}

%multiplied (p.4: f32[16,128]) -> bf16[16,256] {
  %p.4 = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %dot = bf16[16,256]{1,0:T(8,128)(2,1)} convolution(%p.4, %p.4), metadata={op_name="jvp()/dot_general" stack_frame_id=1}
}

%body (arg: (s32[], bf16[16,3,128])) -> (s32[], bf16[16,3,128]) {
  %arg = (s32[], bf16[16,3,128]{2,0,1:T(8,128)(2,1)}) parameter(0)
  %qkv = bf16[16,3,128]{2,0,1:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %angles = f32[4,8,64]{2,1,0:T(8,128)} get-tuple-element(%arg), index=2
  %fusion.1 = f32[16,128]{1,0:T(8,128)} fusion(%qkv, %angles), kind=kLoop, calls=%turned, backend_config={"estimated_cycles":"100"}
  %copy.1 = f32[16,128]{0,1:T(8,128)} copy(%fusion.1), backend_config={"estimated_cycles":"9223372036854775807"}
  %near = f32[16,128]{1,0:T(8,128)S(1)} copy(%fusion.1), metadata={stack_frame_id=1}
  %stack = f32[30,16,128]{2,1,0:T(8,128)} get-tuple-element(%arg), index=3
  %fusion.2 = f32[30,16,128]{2,1,0:T(8,128)} fusion(%stack, %near), kind=kLoop, calls=%stacked
  %fusion.3 = bf16[16,256]{1,0:T(8,128)(2,1)} fusion(%copy.1), kind=kOutput, calls=%multiplied
  %moc_spread.1 = bf16[4,8,128]{2,1,0} custom-call(%copy.1), custom_call_target="tpu_custom_call"
}

ENTRY %main (q: bf16[16,3,128]) -> bf16[16,128] {
  %q = bf16[16,3,128]{2,0,1:T(8,128)(2,1)} parameter(0)
  %while.1 = (s32[]) while(%q), condition=%cond, body=%body, metadata={op_name="jit(step)/jvp()/while"}, backend_config={"known_trip_count":{"n":"30"}}
  %while.2 = (s32[]) while(%q), condition=%cond, body=%body, metadata={op_name="jit(step)/transpose(jvp())/while"}
}
"""  # noqa: E501


@pytest.fixture
def moved():
    """What a turn of the loop moves, by name."""
    return {x.name: x for x in Program(TEXT).walk("body")}


def test_bytes_are_those_in_hbm(moved):
    found = {name: (x.read, x.written) for name, x in moved.items()}
    rows, padded = 16 * 128, 4 * 8 * 128  # 64 columns fill half of a tile
    assert found["fusion.1"] == (2 * rows + 4 * padded, 4 * rows)  # a third of q, k and v
    assert found["copy.1"] == (4 * rows, 4 * 128 * 128)  # 16 columns fill an eighth
    assert found["near"] == (4 * rows, 0)
    assert found["fusion.2"] == (0, 4 * rows)  # in place
    assert set(found) == {"fusion.1", "copy.1", "near", "fusion.2", "fusion.3", "moc_spread.1"}
    assert sum(x.turns * x.read for x in Program(TEXT).walk() if x.name == "near") == 31 * 4 * rows


def test_operations_are_for_what_their_functions_are(moved):
    kinds = {name: kind_of(x, tpu_step.KINDS) for name, x in moved.items()}
    assert kinds["fusion.1"] == "rotary"  # most of its elements
    assert kinds["copy.1"] == "rotary"  # the compiler's own, of what it copies
    assert kinds["near"] == "q, k, v"
    assert kinds["fusion.2"] == "other"
    assert moved["fusion.1"].cycles == 100
    assert moved["copy.1"].cycles is None


def test_a_layer_is_a_turn_of_each_loop():
    entry = tpu_step.of_a_layer(TEXT, "v5p")
    assert entry["forward"] == entry["backward"]
    assert set(entry["forward"]) == {"rotary", "q, k, v", "other", "matrix products", "kernels"}
    (_, _, total, *rows) = traffic_table([{"entries": {"v5p": entry}}])
    assert total.startswith("| v5p | all but kernels and products | 0.0 GB | 0.0 ms |")
    unknown = tpu_step.of_a_layer(TEXT.replace('"100"', '"9223372036854775807"'), "v5p")
    assert unknown["forward"]["rotary"]["gb"] == entry["forward"]["rotary"]["gb"]
    assert "|  |" in traffic_table([{"entries": {"v5p": unknown}}])[2]  # no estimate before code is generated
    assert len(rows) == 3
    look_up = TEXT.replace("jvp()/dot_general", "jvp(bnp,bpm->bnm)/dot_general")
    assert "matrix products" not in tpu_step.of_a_layer(look_up, "v5p")["forward"]
    with pytest.raises(ValueError, match="one loop over layers"):
        tpu_step.of_a_layer(TEXT.replace("transpose(jvp())", "jvp()"), "v5p")
    with pytest.raises(ValueError, match="no entry"):
        Program("HloModule")


def test_unknown_chips_are_refused():
    with pytest.raises(ValueError, match="--chips v3:2x2: known are v4"):
        tpu_step.Arguments(chips=("v5p:4x4x4", "v3:2x2"))
