"""Every kernel, in programs of real sizes, by the compiler for real chips. No TPU is needed, and nothing runs."""

import itertools

import pytest

from benchmarks import tpu_memory
from benchmarks.tpu.compiler import CHIPS
from moc_jax.attention.pallas_tpu import device

pytestmark = pytest.mark.tpu_compiler

ROUTING = ["moc_pool", "moc_router"]
ANCHORS = ["moc_forward_anchors", "moc_forward_text", "moc_move"]
PICKS = ["moc_forward_picks", "moc_merge", "moc_move_lanes", "moc_ranks", "moc_spread"]
FORWARD = {*ROUTING, *ANCHORS, *PICKS}
KERNELS = {
    "forward": FORWARD,
    "gradients": {*FORWARD, "moc_add", "moc_columns", "moc_gradients_anchors", "moc_gradients_picks"},
}
LONG = ["multi_shot/gradients", "minutes/gradients"]  # 180 504 and 1 443 640 tokens
LONG_CASES = list(itertools.product(CHIPS, LONG))
# Minutes each. Between them, each of two chips and each of two lengths.
UNMARKED = [("v5e", LONG[0]), ("v5p", LONG[1])]
OTHERS = [
    "multi_shot/forward",
    "minutes/forward",
    "single_shot/gradients",
    "wan/gradients",
    "float32/gradients",
    "wide_heads/gradients",
    "narrow_heads/gradients",
]


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        pytest.param(*case, id="-".join(case), marks=() if case in UNMARKED else pytest.mark.slow)
        for case in [*LONG_CASES, *itertools.product(("v5e", "v5p"), OTHERS)]
    ],
)
def test_it_compiles_and_fits_the_chip(chip, name):
    found = tpu_memory.ask(chip, name, timeout=1200)
    assert "error" not in found, found["error"]
    scene, part = name.split("/")
    no_text = {"moc_forward_text"} if scene in ("wan", "float32", "wide_heads", "narrow_heads") else set()
    assert set(found["kernels"]) == KERNELS[part] - no_text
    assert found["memory"]["total"] <= device.Chip(chip).memory
