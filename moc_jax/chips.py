"""What data sheets say of accelerators, by device as jax counts them: a TPU7x chip is two, a v4 or v5p chip one."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A device of one kind, and how such devices are joined."""

    name: str
    kinds: tuple[str, ...]
    """`device_kind`, as jax has it."""
    flops: float
    """Of dense products in bfloat16, per second."""
    memory: int
    """Bytes of HBM that programs may use."""
    bandwidth: float
    """Bytes per second from and to HBM."""
    torus: int = 0
    """Dimensions of the torus of links between TPUs; 0: all are joined to all, through switches."""
    link: float
    """Bytes per second that a device sends over one link of the torus, or through its switch."""
    network: float
    """Bytes per second that a device's share of its host's network carries."""
    per_host: int
    """Devices of a host."""
    per_chip: int = 1
    """Devices of a chip."""


_GIB = 2**30
CHIPS = (
    Chip(
        name="v4",
        kinds=("TPU v4",),
        flops=275e12,
        memory=int(31.25 * _GIB),
        bandwidth=1.23e12,
        torus=3,
        link=45e9,
        network=6.25e9,
        per_host=4,
    ),
    Chip(
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        memory=int(15.75 * _GIB),
        bandwidth=8.2e11,
        torus=2,
        link=45e9,
        network=3.1e9,
        per_host=4,
    ),
    Chip(
        name="v5p",
        kinds=("TPU v5", "TPU v5p"),
        flops=459e12,
        memory=int(95.74 * _GIB),
        bandwidth=2.765e12,
        torus=3,
        link=90e9,
        network=6.25e9,
        per_host=4,
    ),
    Chip(
        name="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        memory=int(31.25 * _GIB),
        bandwidth=1.64e12,
        torus=2,
        link=90e9,
        network=6.25e9,
        per_host=4,
    ),
    Chip(
        name="tpu7x",
        kinds=("TPU7x", "TPU v7x"),
        flops=1153.5e12,
        memory=int(94.74 * _GIB),
        bandwidth=3.69e12,
        torus=3,
        link=90e9,
        network=6.25e9,
        per_host=8,
        per_chip=2,
    ),
    Chip(
        name="a100",
        kinds=("NVIDIA A100-SXM4-40GB",),
        flops=312e12,
        memory=int(39.4 * _GIB),
        bandwidth=1.555e12,
        link=300e9,
        network=25e9,
        per_host=8,
    ),
    Chip(
        name="a100-80gb",
        kinds=("NVIDIA A100-SXM4-80GB",),
        flops=312e12,
        memory=int(79.2 * _GIB),
        bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        per_host=8,
    ),
    Chip(
        name="h100",
        kinds=("NVIDIA H100 80GB HBM3",),
        flops=989e12,
        memory=int(79.1 * _GIB),
        bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        per_host=8,
    ),
    Chip(
        name="h200",
        kinds=("NVIDIA H200",),
        flops=989e12,
        memory=int(139.8 * _GIB),
        bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        per_host=8,
    ),
    Chip(
        name="b200",
        kinds=("NVIDIA B200",),
        flops=2250e12,
        memory=int(178.3 * _GIB),
        bandwidth=8e12,
        link=900e9,
        network=50e9,
        per_host=8,
    ),
)
_BY_KIND = {kind: chip for chip in CHIPS for kind in chip.kinds}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so; None for one that is not listed."""
    return _BY_KIND.get(device_kind)
