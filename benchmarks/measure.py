"""Compiled programs, their memory and their time."""

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp

from moc_jax.chips import chip_of
from moc_jax.compilation import mesh_options
from moc_jax.timing import Effort, Timing, time_launches
from moc_jax.training.state import Blueprint, TrainState, create_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one program, as the compiler laid it out."""

    arguments: int
    outputs: int
    temporary: int
    peak: int  # everything that lives during a launch; donated arguments count once


class Program:
    """A function, compiled for the mesh in context as the library compiles its own."""

    def __init__(self, lowered: jax.stages.Lowered) -> None:
        self._compiled = lowered.compile(compiler_options=mesh_options(jax.sharding.get_mesh()))
        self.memory = _memory(self._compiled)

    def __call__(self, *inputs: Any) -> Any:
        return self._compiled(*inputs)

    def time(self, inputs: tuple[Any, ...], effort: Effort) -> Timing:
        """Milliseconds per launch on these inputs."""
        return time_launches(lambda: self._compiled(*inputs), effort)


def compile_all(functions: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> dict[str, Program]:
    """Compiles name -> (function, inputs or their shapes), several at a time: compiling costs more than measuring."""
    lowered = {name: jax.jit(function).lower(*inputs) for name, (function, inputs) in functions.items()}
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(lowered, pool.map(Program, lowered.values())))


def _memory(compiled: jax.stages.Compiled) -> Memory:
    stats: Any = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    peak = arguments + outputs + stats.temp_size_in_bytes - stats.alias_size_in_bytes
    return Memory(arguments=arguments, outputs=outputs, temporary=stats.temp_size_in_bytes, peak=peak)


def begun(blueprint: Blueprint) -> TrainState:
    """A state before its first step, whose weights are nowhere 0.

    Maps that start as 0, gates and the last layer's above all, make the gradients of all layers zeros in a run's first
    two steps; and products of zeros are faster than others, as they take less power.
    """
    state = create_state(blueprint)

    def filled(params):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noisy = [x + 0.02 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys)]
        return jax.tree.unflatten(tree, noisy)

    places = blueprint.shardings.params, blueprint.shardings.frozen
    params, frozen = jax.jit(filled, out_shardings=places, donate_argnums=0)((state.params, state.frozen))
    return dataclasses.replace(state, params=params, frozen=frozen)


def both_ways(forward: Callable[..., Any]) -> Callable[..., Any]:
    """(d_out, q, k, v, *rest) -> (out, dq, dk, dv), for forward(q, k, v, *rest)."""

    def run(d_out, q, k, v, *rest):
        out, vjp = jax.vjp(lambda *x: forward(*x, *rest), q, k, v)
        return out, *vjp(d_out)

    return run


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The baseline: cuDNN's flash attention on a GPU, XLA's attention elsewhere; every token sees every token."""
    return jax.nn.dot_product_attention(q, k, v, implementation=dense_implementation())


def dense_implementation() -> Literal["cudnn", "xla"]:
    """What `dense_attention` is computed by."""
    return "cudnn" if jax.default_backend() == "gpu" else "xla"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device could do at best (None where no data sheet is known) and what it was seen to do."""

    peak_flops: float | None
    peak_bytes: float | None
    measured_flops: float
    measured_bytes: float

    def floor_ms(self, flops: float, moved: float) -> float | None:
        """The least time that the data sheet allows."""
        if self.peak_flops is None or self.peak_bytes is None:
            return None
        return 1e3 * max(flops / self.peak_flops, moved / self.peak_bytes)

    def measured_ms(self, flops: float, moved: float) -> float:
        """The least time at the rates of `measure_ceilings`."""
        return 1e3 * max(flops / self.measured_flops, moved / self.measured_bytes)


def measure_ceilings(effort: Effort) -> Ceilings:
    """A large bf16 matrix product on random numbers, and a copy of an array that no cache holds."""
    gpu = jax.default_backend() == "gpu"
    size, length = (8192, 1 << 30) if gpu else (256, 1 << 18)
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    x = jnp.zeros(length, jnp.float32)
    programs = compile_all({"product": (jnp.matmul, (a, b)), "copy": (lambda x: x + 1, (x,))})
    product = programs["product"].time((a, b), effort).median_ms
    copy = programs["copy"].time((x,), effort).median_ms
    chip = chip_of(jax.devices()[0].device_kind)
    return Ceilings(
        peak_flops=None if chip is None else chip.flops,
        peak_bytes=None if chip is None else chip.bandwidth,
        measured_flops=2e3 * size**3 / product,
        measured_bytes=2e3 * x.nbytes / copy,
    )
