"""Names of topologies, and how fast their links carry what."""

import pytest

from moc_jax.config import ConfigError
from moc_jax.planning.links import exchange
from moc_jax.planning.topology import topology


@pytest.mark.parametrize(
    ("name", "devices", "hosts"),
    [
        ("v5p:8x8x4", 256, 64),
        ("V5P:4x8x8", 256, 64),
        ("v6e:16x16", 256, 64),
        ("v5e:4x4", 16, 4),
        ("tpu7x:2x2x1", 8, 1),
        ("h200:4", 4, 1),
        ("h100:64", 64, 8),
    ],
)
def test_known_ones(name, devices, hosts):
    found = topology(name)
    assert (found.devices, found.hosts) == (devices, hosts)


@pytest.mark.parametrize(
    "name", ["", "v5p", "v5p:3x3x3", "v5p:16x16", "v6e:4x4x4", "h200:3", "h200:0", "h200:2x2", "tpu"]
)
def test_others_are_refused_with_the_list(name):
    with pytest.raises(ConfigError, match=r"v5p: 1x1x1 .* 4x4x4") as error:
        topology(name)
    assert "h200: 1, 2, 4, 8 and multiples of 8" in str(error.value)


def test_more_sides_of_a_torus_carry_more_and_lines_half():
    def seconds(name, size, inner=1, kind="all-gather"):
        return exchange("weights", kind, "fsdp", 90e9, size, inner, topology(name)).seconds

    assert seconds("v5p:4x4x4", 4) == pytest.approx(0.5)  # one ring, both ways
    assert seconds("v5p:4x4x4", 16) == pytest.approx(0.25)
    assert seconds("v5p:4x4x4", 64) == pytest.approx(1 / 6)
    assert seconds("v6e:4x4", 16) == pytest.approx(0.5)  # two lines
    assert seconds("v5p:4x4x4", 4, kind="all-to-all") == pytest.approx(0.5)
    assert seconds("v5p:8x8x8", 8, kind="all-to-all") == pytest.approx(1.0)


def test_gpus_of_several_hosts_use_the_network():
    def rate(name, size, inner):
        return 1 / exchange("weights", "all-gather", "fsdp", 1.0, size, inner, topology(name)).seconds

    assert rate("h200:4", 4, 1) == pytest.approx(233e9, rel=0.01)  # as measured
    assert rate("h200:16", 16, 1) < 50e9
    assert rate("h200:16", 2, 8) < 50e9 < rate("h200:16", 8, 1)
