"""Where a launch's time on the device goes, by what its kernels do."""

import collections
import dataclasses
import itertools
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.profiler import ProfileData, ProfileEvent, ProfileOptions

from moc_jax.attention.pallas_gpu import flash, flash_backward

# By the names of kernels: our attention and cuDNN's, and matrix products of cuBLAS and of XLA's own making. Routing,
# sorting, gathers and merges are none of these.
_ATTENTION = re.compile(rf"{flash.NAME}|{flash_backward.NAME}|cudnn.*(prop|sdpa|flash)|fmha|flash")
_PRODUCT = re.compile(r"gemm|nvjet|cutlass|cublas|splitK|^dot|_dot_", re.IGNORECASE)
_KINDS = "attention", "products", "other"
_LONGEST = 24  # kernels that are listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Milliseconds of one launch on the device. Where kernels run at once, the time is the first kind's of these that
    is among them: a copy beside attention costs nothing."""

    attention: float
    products: float
    other: float
    kernels: int
    longest: dict[str, float]  # of the others, by name; each as long as it ran, whatever else did


def traced(launch: Callable[[], object]) -> Split:
    """Traces one launch, which must be compiled and warm.

    Raises:
        ValueError: the profiler saw nothing of a GPU.
    """
    return split_of(profiled(launch))


def profiled(launch: Callable[[], object]) -> ProfileData:
    """A profile of all that the devices do for a launch."""
    options = ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        jax.block_until_ready(launch())
        jax.profiler.stop_trace()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return ProfileData.from_file(str(file))


def kernels(profile: ProfileData) -> Iterator[ProfileEvent]:
    """What ran on the streams of the first GPU, copies included."""
    for plane in profile.planes:
        if plane.name == "/device:GPU:0":
            for line in plane.lines:
                if (line.name or "").startswith("Stream"):
                    yield from line.events


def split_of(profile: ProfileData) -> Split:
    """The kernels on the streams of the first GPU.

    Raises:
        ValueError: there is none.
    """
    longest, found = collections.Counter(), list(kernels(profile))
    if not found:
        raise ValueError("the profiler saw no kernel of a GPU")
    for kernel in found:
        if kind_of(kernel.name) == "other":
            longest[kernel.name] += kernel.duration_ns / 1e6
    return Split(
        **dict(zip(_KINDS, apart(found, len(_KINDS), lambda name: _KINDS.index(kind_of(name))), strict=True)),
        kernels=len(found),
        longest={name: round(ms, 4) for name, ms in longest.most_common(_LONGEST)},
    )


def apart(found: Sequence[ProfileEvent], kinds: int, kind: Callable[[str], int]) -> list[float]:
    """Milliseconds in which each kind ran and none before it did; `kind` tells it by a kernel's name, from 0 on."""
    ends = [(kernel.start_ns, 1, kind(kernel.name)) for kernel in found]
    ends += [(kernel.start_ns + kernel.duration_ns, -1, of) for kernel, (_, _, of) in zip(found, ends)]
    ends.sort()
    running, spent = [0] * kinds, [0.0] * kinds
    for (time, change, of), (following, _, _) in itertools.pairwise(ends):
        running[of] += change
        first = next((i for i, count in enumerate(running) if count > 0), None)
        if first is not None:
            spent[first] += (following - time) / 1e6
    return spent


def kind_of(kernel: str) -> str:
    """`attention`, `products` or `other`."""
    return "attention" if _ATTENTION.search(kernel) else "products" if _PRODUCT.search(kernel) else "other"
