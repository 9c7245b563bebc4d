"""Adapters that we export load in diffusers and compute there what they do here; see tests/parity."""

import pytest

from tests.parity.lora_figures import FILES, GOLDEN, golden, velocity, write
from tests.parity.numbers import relative


def test_what_diffusers_loaded_is_what_is_exported(tmp_path):
    write(tmp_path)
    for file in FILES.values():
        assert (tmp_path / file).read_bytes() == (GOLDEN / file).read_bytes()


@pytest.mark.parametrize(
    ("names", "merge"),
    [("diffusers", False), *(pytest.param(*x, marks=pytest.mark.long) for x in (("comfyui", True),))],
)
def test_diffusers_computes_the_same(names, merge):
    assert relative(velocity(GOLDEN / FILES[names], merge), golden()[names]) < 1e-4
    assert relative(golden()["none"], golden()[names]) > 0.1
