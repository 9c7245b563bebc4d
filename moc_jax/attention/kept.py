"""What is kept of a scene's finished shots, for attention of later ones (continued.py): bytes, and where they lie."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.deal import Deal
from moc_jax.attention.layout import round_up
from moc_jax.scene import SceneShape
from moc_jax.shapes import Array, Float, Float32, Int
from moc_jax.sharding import RULES, batch_shards, divided

_UNIT = 128  # of the rows of a layer: blocks of keys start where they would in a layer by itself
SMALL = "float8_e4m3fn"  # of 8 bits: 3 of them say where between two powers of two a number lies
_SMALLEST = 1e-12  # of a row's largest number, so that rows of zeros divide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Keys or values of video, layer after layer, a row for each video token of the scene and some to fill up.

    X devices share a scene and have heads of their own each. `scale`: what each row of 8-bit numbers is multiplied by.
    """

    values: Float[Array, "X B rows H D"]
    scale: Float32[Array, "X B rows H"] | None = None

    def layer(self, index: Int[Array, ""], depth: int, dtype: jnp.dtype) -> Float[Array, "B _ H D"]:
        """One layer's rows of this device."""
        rows = self.values.shape[2] // depth
        values = lax.dynamic_slice_in_dim(self.values[0], index * rows, rows, axis=1)
        if self.scale is None:
            return values
        scale = lax.dynamic_slice_in_dim(self.scale[0], index * rows, rows, axis=1)
        return (values.astype(jnp.float32) * scale[..., None]).astype(dtype)

    def written(self, new: Float[Array, "depth X B V H D"], first: Int[Array, " B"], count: Int[Array, " B"]) -> "Rows":
        """With `count` rows of each layer in their place from row `first` on, in place if this is donated."""
        depth = new.shape[0]
        if self.scale is None:
            return Rows(_written(self.values, new.astype(self.values.dtype), first, count))
        most = float(jnp.finfo(self.values.dtype).max)
        scale = jnp.maximum(jnp.max(jnp.abs(new.astype(jnp.float32)), axis=-1), _SMALLEST) / most
        values = (new.astype(jnp.float32) / scale[..., None]).astype(self.values.dtype)
        assert depth == scale.shape[0]
        return Rows(_written(self.values, values, first, count), _written(self.scale, scale, first, count))


def _written(x: Array, new: Array, first: Array, count: Array) -> Array:
    """x [X, B, depth * rows, ...] with new [depth, X, B, V, ...]; rows beyond `count` stay as they were."""
    depth, _, batch, size = new.shape[:4]
    rows = x.shape[2] // depth

    def one(i, x):
        layer, scene = i // batch, i % batch
        begin = jnp.minimum(first[scene], rows - size)  # the last shots may end before a slice of the largest would
        index = begin - first[scene] + jnp.arange(size)
        mine = (index >= 0) & (index < count[scene])
        start = [jnp.int32(0)] * x.ndim
        start[1], start[2] = scene, layer * rows + begin
        shape = (x.shape[0], 1, size, *x.shape[3:])
        old = lax.dynamic_slice(x, start, shape)
        of_scene = lax.dynamic_index_in_dim(new[layer], scene, axis=1)
        taken = of_scene.at[:, :, index].get(mode="clip")
        mine = mine.reshape(1, 1, size, *[1] * (x.ndim - 3))
        return lax.dynamic_update_slice(x, jnp.where(mine, taken, old), start)

    return lax.fori_loop(0, depth * batch, one, x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What is kept of the finished shots of scenes, in all layers; anything finite where none is finished."""

    k: Rows
    v: Rows
    text_k: Float[Array, "X B depth L H D"]
    text_v: Float[Array, "X B depth L H D"]
    phi: Float32[Array, "X B depth H C D"]

    @property
    def depth(self) -> int:
        """Layers."""
        return self.phi.shape[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The size of what is kept of a batch of scenes."""

    batch: int
    """Scenes; with guidance, twice as many."""
    shape: SceneShape
    """Text tokens are those of all captions, if they are keys."""
    depth: int
    heads: int
    head_dim: int
    dtype: str
    """What the model computes in."""
    columns: int
    """Of phi, for each scene."""
    deal: Deal
    """How tokens of the given shots lie on the mesh in context."""
    small: bool = False
    """Keys and values of video have 8 bits."""

    def zeros(self) -> Kept:
        """Nothing finished, to be traced."""
        heads, video = self.heads // self.deal.head_groups, round_up(max(self.shape.video_tokens, 1), _UNIT)

        def array(dtype: str, *sizes: int) -> Array:
            return jnp.zeros((self.deal.devices, self.batch, *sizes), dtype)

        def rows() -> Rows:
            sizes = self.depth * video, heads
            values = array(SMALL if self.small else self.dtype, *sizes, self.head_dim)
            return Rows(values, array("float32", *sizes) if self.small else None)

        text = self.depth, self.shape.text_tokens, heads, self.head_dim
        phi = array("float32", self.depth, heads, self.columns, self.head_dim)
        return Kept(rows(), rows(), array(self.dtype, *text), array(self.dtype, *text), phi)

    def empty(self) -> Kept:
        """Nothing finished, where it lies on the mesh in context."""
        return _maker(self, jax.sharding.get_mesh())()

    @property
    def device_bytes(self) -> int:
        """On each device of the mesh in context."""
        leaves, mesh = jax.tree.leaves(jax.eval_shape(self.zeros)), jax.sharding.get_mesh()
        total = sum(x.size * x.dtype.itemsize for x in leaves)
        if mesh.empty:
            return total
        scenes = batch_shards(mesh) if self.batch % batch_shards(mesh) == 0 else 1
        return total // (scenes * mesh.shape["context"] * mesh.shape["tensor"])


@functools.lru_cache
def _maker(size: Size, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """What makes it, once for all scenes of a size: a new function would be compiled again."""
    if mesh.empty:
        return jax.jit(size.zeros)
    specs = specs_of(jax.eval_shape(size.zeros), divided(RULES.spec("batch"), size.batch, mesh)[0])
    return jax.jit(size.zeros, out_shardings=jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs))


def specs_of(kept: Kept, scenes) -> Kept:
    """Where the leaves lie on the mesh in context: on each device its own heads, and whole rows."""

    def spec(x) -> jax.P:
        of_heads = 4 if x.ndim == 6 and x is not kept.phi else 3
        return jax.P(*(("context", scenes, *[None] * 4)[:of_heads]), *RULES.spec("heads"))

    return jax.tree.map(spec, kept)
