"""Where the devices of a mesh lie, so that the axes that exchange most lie on the fastest links."""

import collections
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from moc_jax.config import ConfigError

AXES = ("data", "fsdp", "context", "tensor")  # of a mesh, by how much is exchanged over them


def mesh_sizes(asked: Sequence[int], count: int) -> tuple[int, ...]:
    """The size of each axis, where one that is asked for as -1 takes what is left of `count` devices.

    Raises:
        ConfigError: no such mesh has `count` devices; names the nearest that do.
    """
    given = math.prod(size for size in asked if size != -1)
    sizes = tuple(count // given if size == -1 else size for size in asked)
    if math.prod(sizes) == count:
        return sizes

    def distance(sizes: tuple[int, ...]) -> tuple[int, float, tuple[int, ...]]:
        ratios = [size / wanted for size, wanted in zip(sizes, asked) if wanted != -1]
        return sum(ratio != 1 for ratio in ratios), sum(abs(math.log(ratio)) for ratio in ratios), sizes[::-1]

    divisors = [n for n in range(1, count + 1) if count % n == 0]
    firsts = itertools.product(divisors, repeat=len(AXES) - 1)
    possible = [(*first, count // math.prod(first)) for first in firsts if count % math.prod(first) == 0]
    raise ConfigError(
        f"mesh {shown_mesh(asked)} does not match {count} devices: the product must be {count}. Nearest are "
        f"{', or '.join(map(shown_mesh, sorted(possible, key=distance)[:3]))}; one axis may be -1, to take what is left"
    )


def shown_mesh(sizes: Sequence[int]) -> str:
    """As messages have it: data 2 x fsdp 4."""
    named = [f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True) if size != 1]
    return " x ".join(named or [f"{AXES[0]} 1"])


def device_array(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in an array of these sizes, so that the axes that exchange most lie on the fastest links.

    Within a slice of TPUs, tensor, then context, then fsdp are boxes of neighbours; where no whole axis of the torus
    fits, it is split. Of several slices, or hosts of GPUs, data takes as many as it can, then fsdp, then context.

    Raises:
        ConfigError: the devices of a slice have gaps between them.
    """
    slices = hasattr(devices[0], "slice_index")  # GPUs have it, too: those that NVLink joins are one
    one = devices[0].platform == "tpu" and not slices
    groups = collections.Counter(
        0 if one else getattr(device, "slice_index" if slices else "process_index") for device in devices
    )
    apart, outer = len(groups) if len(set(groups.values())) == 1 else 1, []
    for size in sizes:
        outer.append(math.gcd(size, apart))
        apart //= outer[-1]
    inner, split = [size // parts for size, parts in zip(sizes, outer)], {"allow_split_physical_axes": True}
    try:
        if math.prod(outer) == 1:
            return mesh_utils.create_device_mesh(inner, devices, **split)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, process_is_granule=not slices, **split)
    except AssertionError as error:
        raise ConfigError(f"no mesh of these {len(devices)} devices can be: {error}") from error
