"""WanDiT computes what diffusers' WanTransformer3DModel computes, with random weights and their gradients."""

import hashlib

import numpy as np
import pytest

from moc_jax.config.presets import WAN
from moc_jax.models import parameter_count
from moc_jax.models.wan.names import tensors
from tests.parity.wan_cases import FULL_SIZE
from tests.parity.wan_figures import GOLDEN, errors

FORWARD, GRADIENT = 1e-4, 1e-3
COUNTS = {
    "wan21-1.3b": (825, 1_418_996_800),
    "wan21-14b": (1095, 14_288_491_584),
    "wan22-5b": (825, 4_999_787_712),
}

_LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("name", "captions"),
    [
        ("wan2.2-ti2v-5b", "own"),
        pytest.param("wan2.2-i2v-a14b", "own", marks=_LONG),
        pytest.param("wan2.1-t2v", "own", marks=_LONG),
        pytest.param("wan2.2-t2v-a14b", "own", marks=_LONG),
        pytest.param("wan2.1-t2v", "both", marks=_LONG),
    ],
)
def test_velocity_and_gradients_are_those_of_diffusers(name, captions):
    forward, gradients = errors(name, captions)
    assert forward < FORWARD
    assert not {key: error for key, error in gradients.items() if error >= GRADIENT}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_at_full_size_are_those_of_diffusers(name):
    cfg = WAN[name]
    heads, depth, mlp_dim, channels_in, channels_out = FULL_SIZE[name]
    assert (cfg.heads, cfg.head_dim, cfg.depth, cfg.mlp_dim) == (heads, 128, depth, mlp_dim)
    assert (cfg.latent_channels + cfg.condition_channels, cfg.latent_channels) == (channels_in, channels_out)
    found = list(tensors(cfg))
    lines = sorted(f"{tensor.name('diffusers')} {tensor.shape}" for tensor in found)
    golden = np.load(GOLDEN / "wan-names.npz")
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == str(golden[name])
    if name in COUNTS:
        assert (len(found), parameter_count(cfg)) == COUNTS[name]
