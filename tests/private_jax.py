"""The private parts of jax that tests touch: all of them, each with its reason. No other file of the tests has any.

What jax changes here fails by name in test_private_jax.py, which also says whether a part does what it is there for.
"""

import dataclasses
import importlib
import inspect
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Something of jax without a public name."""

    module: str
    attribute: str
    reason: str
    parameters: tuple[str, ...] = ()
    """Of a function that is replaced, those that the replacement counts on."""

    @property
    def owner(self) -> Any:
        """What it is an attribute of."""
        found = importlib.import_module(f"jax._src.{self.module}")
        for name in self.attribute.split(".")[:-1]:
            found = getattr(found, name)
        return found

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.attribute.split(".")[-1])

    def replace(self, new: Any) -> Any:
        """Puts something else in its place, and returns what was there."""
        old = self.value
        setattr(self.owner, self.attribute.split(".")[-1], new)
        return old

    @property
    def missing(self) -> list[str]:
        """Parameters that it ought to have."""
        return [name for name in self.parameters if name not in inspect.signature(self.value).parameters]


_INTERPRET = "pallas.mosaic.interpret"
io_callback_impl = Part(
    module="callback",
    attribute="io_callback_impl",
    parameters=("args", "callback"),
    reason="JAX puts the arguments of a callback on a device before it calls. The interpreter's callbacks are numpy's, "
    "and take five times as long for that: here they get what comes as it is.",
)
interpret_pallas_call = Part(
    module=f"{_INTERPRET}.interpret_pallas_call",
    attribute="interpret_pallas_call",
    parameters=("args", "grid_mapping"),
    reason="Half of all accesses are index maps' to prefetched scalars, which nothing writes: here they are known.",
)
compute_start_indices = Part(
    module=f"{_INTERPRET}.interpret_pallas_call",
    attribute="_compute_start_indices",
    parameters=("block_mapping", "loop_idx", "args", "ctx", "token"),
    reason="The same: index maps are computed with those scalars instead of by callbacks.",
)
jaxpr_as_fun = Part(module="core", attribute="jaxpr_as_fun", reason="Computes an index map.")
discharge_state = Part(
    module="state.discharge",
    attribute="discharge_state",
    parameters=("strip_memory_space",),
    reason="An index map reads references; this makes a function of arrays of it.",
)
ordered = Part(
    module=f"{_INTERPRET}.vector_clock",
    attribute="NpVectorClock.ordered",
    parameters=("self", "other"),
    reason="Each access is compared with all earlier ones of its buffer; a faster comparison halves the tests' time.",
)
summarize = Part(
    module="source_info_util",
    attribute="summarize",
    reason="The interpreter asks where an access is in the source at each of them; the answer is kept.",
)
race_detection_state = Part(
    module=f"{_INTERPRET}.race_detection_state",
    attribute="RaceDetectionState",
    reason="Before jax 0.12 a race was printed and noted; tests want an error.",
)
remat_allowed_effects = Part(
    module="effects",
    attribute="remat_allowed_effects",
    reason="The interpreter's callbacks are effects, which kernels on a TPU don't have and jax.checkpoint refuses. "
    "Every run of a kernel makes memory of its own, so that running it again in the backward pass is harmless.",
)
io_effect = Part(module="callback", attribute="IOEffect", reason="One of those effects.")
ordered_io_effect = Part(module="callback", attribute="OrderedIOEffect", reason="One of those effects.")
reset_gpu_interpreter = Part(
    module="pallas.mosaic_gpu.interpret.gpu_callbacks",
    attribute="reset_gpu_interpret_mode_state",
    reason="A failed kernel leaves state behind, which users are told to reset; there is no public name yet.",
)

PARTS = {name: part for name, part in globals().items() if isinstance(part, Part)}
SINCE_0_12 = {"reset_gpu_interpreter"}


def here() -> dict[str, Part]:
    """Those that this version of jax has."""
    old = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12)
    return {name: part for name, part in PARTS.items() if not (old and name in SINCE_0_12)}
