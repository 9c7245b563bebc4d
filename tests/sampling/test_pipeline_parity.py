"""Whole pipelines make what diffusers' make, after 50 steps of each sampler."""

import pytest

from tests.parity.pipeline_cases import CASES, SHIFTS
from tests.parity.pipeline_figures import errors

pytest.importorskip("sentencepiece")
pytest.importorskip("ftfy")

PARITY = 1e-3


@pytest.mark.long
@pytest.mark.parametrize("solver", SHIFTS)
@pytest.mark.parametrize("name", CASES)
def test_latents_and_pixels_are_those_of_diffusers(name, solver):
    assert max(errors(name, solver)) < PARITY
