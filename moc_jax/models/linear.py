"""Linear maps: what most weights are in, and how their gradients are summed."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moc_jax.config import ModelConfig
from moc_jax.models.weight_parts import copies, parted, placed, staying, whole
from moc_jax.shapes import Array, Float, Float32
from moc_jax.sharding import key_path, tokens_are_split

_init = nnx.initializers.xavier_uniform()
Axes = Mapping[str, int]  # an axis of a weight: what it is, which the sharding rules go by -> its size


class Linear(nnx.Module):
    """A linear map of the last axes, `inputs`, to `outputs`: Linear({"embed": M}, {"heads": H, "head_dim": D}).

    Starts as the matrix from all inputs to all outputs would (Glorot), or with `zero` as a map to nothing (adaLN-Zero,
    DiT, section 3.2).
    """

    def __init__(
        self,
        inputs: Axes,
        outputs: Axes,
        *,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
        zero: bool = False,
        gradient_dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        """`gradient_dtype`: what the weights' gradients are summed in, over tokens and over devices."""
        self.dtype, self.gradient_dtype = dtype, gradient_dtype
        shape = math.prod(inputs.values()), math.prod(outputs.values())
        kernel = jnp.zeros(shape) if zero else _init(rngs.params(), shape)
        sizes = *inputs.values(), *outputs.values()
        self.kernel = nnx.Param(kernel.reshape(sizes), logical=(*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values())), logical=(*outputs,))
        self.frozen = False

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        names = tuple(self.kernel.get_metadata("logical"))
        if not self.frozen:
            return affine(x, self.kernel[...], self.bias[...], names, self.dtype, self.gradient_dtype)
        # Not `affine`, whose rule has gradients of the weights, for which nobody asks.
        out = _affine(x, self.kernel[...], self.bias[...], names, self.dtype)
        return out if self.lora is None else out + self.lora(x)

    def freeze(self, adapter: "Callable[[Array], Array] | None") -> None:
        """From now on its weights don't change; what is trained is `adapter`, if there is one (lora.py)."""
        self.frozen, self.lora = True, adapter
        self.kernel.set_value(self.kernel[...].astype(self.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def affine(
    x: Float[Array, "..."],
    kernel: Float32[Array, "..."],
    bias: Float32[Array, "..."],
    names: tuple[str, ...],
    dtype: jax.typing.DTypeLike,
    gradient_dtype: jax.typing.DTypeLike,
) -> Float[Array, "..."]:
    """x kernel + bias in `dtype`; `names` are those of the kernel's axes.

    The weights' gradients leave their products in `gradient_dtype`, and so are summed over devices in it:
    differentiation by itself would round what each device has to `dtype` before.

    Tokens and features are one axis each: products of more axes, and their gradients' above all, make compilers lay
    tokens out innermost, and transpose everything around them. The bias is added to the axes asked for: the TPU
    compiler writes a product as these only where nothing stands between.
    """
    return _affine(x, kernel, bias, names, dtype)


def _affine(x, kernel, bias, names, dtype):
    matrix = _matrix(kernel, bias, names, dtype)
    leading = x.shape[: x.ndim - (kernel.ndim - bias.ndim)]
    out = x.astype(dtype).reshape(*_rows(leading), matrix.shape[0]) @ matrix
    return out.reshape(*leading, *bias.shape) + bias.astype(dtype).reshape(*(1 for _ in leading), *bias.shape)


class Staying(Linear):
    """The same for few vectors, those of captions: devices send each other these and what comes of them, not weights.

    A weight that is split by its outputs needs nothing of other devices then, and neither does its gradient.
    """

    def __call__(self, x: Float[Array, "B P inputs"]) -> Float[Array, "..."]:
        """Outputs of each layer, of weights that are a stack of layers: all of them are given the same vectors."""
        names, kernel, bias = tuple(self.kernel.get_metadata("logical")), self.kernel[...], self.bias[...]
        outputs = len(names) - 1 - ("layers" in names)
        stack = kernel.reshape(-1, *kernel.shape[-outputs - 1 :]).astype(self.dtype)
        place = staying(names, stack.shape, len(x))
        rows = placed(x.astype(self.dtype), place.vectors)
        rows = jnp.broadcast_to(rows[None, None, None], (len(stack), *place.parts, *x.shape))
        parts = stack.reshape(*stack.shape[:2], -1, *place.parts, stack.shape[-1] // math.prod(place.parts))
        out = placed(jnp.einsum("lrsbpi,licrso->lrsbpco", rows, parts), place.parts_of_results)
        out = jnp.moveaxis(placed(out, place.results), (1, 2), (4, 5))
        layers, sizes = bias.shape[: bias.ndim - outputs], bias.shape[bias.ndim - outputs :]
        out = out.reshape(*layers, *x.shape[:2], *sizes) + bias.astype(self.dtype).reshape(*layers, 1, 1, *sizes)
        if not self.frozen or self.lora is None:
            return out
        if not layers:
            return out + self.lora(x)
        graph, stack = nnx.split(self.lora)
        stack = jax.tree.map(jnp.asarray, stack)  # vmap with a rule for gradients takes no NumPy arrays
        return out + jax.vmap(lambda layer: nnx.merge(graph, layer)(x))(stack)


def linear_of(cfg: ModelConfig, rngs: nnx.Rngs) -> Callable[[Axes, Axes], Linear]:
    """Makes a `Linear` of these axes as most of the model's are: computed in what `cfg` says."""
    dtypes = jnp.dtype(cfg.dtype), jnp.dtype(cfg.gradient_dtype)
    return functools.partial(Linear, dtype=dtypes[0], gradient_dtype=dtypes[1], rngs=rngs)


def cast_once(stack: nnx.State, cfg: ModelConfig) -> nnx.State:
    """The weights of a stack of layers as a loop over them reads them: matrices in the type of their products.

    Cast by the layers, they are read in float32 in each of a step's passes. But what is cast here has gradients of that
    type, rounded before devices sum them: where there are several and `gradient_dtype` says otherwise, layers cast.
    """
    mesh, dtype = jax.sharding.get_abstract_mesh(), jnp.dtype(cfg.dtype)
    if not mesh.empty and mesh.size > 1 and jnp.dtype(cfg.gradient_dtype) != dtype:
        return stack
    return jax.tree.map_with_path(lambda path, x: x.astype(dtype) if "kernel" in key_path(path) else x, stack)


def _rows(leading: tuple[int, ...]) -> tuple[int, ...]:
    """Scenes and tokens as axes of a product; both split over devices, they can't be one."""
    return leading if tokens_are_split() else (math.prod(leading),)


def _matrix(kernel, bias, names, dtype):
    return whole(kernel.astype(dtype), names).reshape(kernel.size // bias.size, bias.size)


def _affine_gradients(names, dtype, gradient_dtype, saved, d_out):
    x, kernel, bias = saved
    summed = dtype if kernel.dtype == dtype else gradient_dtype  # the first: `cast_once` did, and rounds it anyway
    matrix, rows = _matrix(kernel, bias, names, dtype), _rows(d_out.shape[: d_out.ndim - bias.ndim])
    tokens, d = x.astype(dtype).reshape(*rows, -1), d_out.reshape(*rows, bias.size)
    d_x = (d @ matrix.T).reshape(x.shape).astype(x.dtype)
    d_bias = jnp.sum(d, axis=tuple(range(len(rows))), dtype=gradient_dtype).reshape(bias.shape)
    groups, parts = copies(names, kernel.shape, len(d_out))
    batch = (0,) if groups > 1 else ()
    if batch:
        tokens, d = (each.reshape(groups, -1, *each.shape[1:]) for each in (tokens, d))
    over = tuple(range(len(batch), d.ndim - 1))
    d_matrix = jax.lax.dot_general(tokens, d, ((over, over), (batch, batch)), preferred_element_type=summed)
    d_kernel = placed(d_matrix.reshape(-1, *kernel.shape), parts).sum(axis=0) if batch else d_matrix
    d_kernel = d_kernel.reshape(kernel.shape)
    d_kernel = parted(d_kernel, names) if batch or tokens_are_split() else d_kernel
    return d_x, d_kernel.astype(kernel.dtype), d_bias.astype(bias.dtype)


# Not `affine` itself, whose product policies of `jax.checkpoint` wouldn't see.
affine.defvjp(lambda *inputs: (_affine(*inputs[:5]), inputs[:3]), _affine_gradients)
