"""The MMDiT's blocks: two streams, text and video, each with its weights, joined by one attention over the scene."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import lax

from moc_jax.config import MMDiTConfig
from moc_jax.models.layers import (
    QKV,
    HeadNorm,
    Linear,
    Mlp,
    Modulation,
    gated_sum,
    modulated_norm,
    normed_heads,
    of_groups,
)
from moc_jax.models.rope import Turns
from moc_jax.shapes import Array, Float, Float32, Int, Key, typed

Slots = tuple[Float32[Array, "B L P"], Float32[Array, "B F P"]]  # whose caption each text token and frame is under
Modulations = tuple[Float32[Array, "B P count M"], Float32[Array, "B P count M"]]  # of text and video, for each caption
Attended = tuple[Float[Array, "B N H D"], Int[Array, "B H N K"] | None]  # with routes, where they are asked for
Attend = Callable[[Array, Array, Array, Key[Array, ""] | None], Attended]  # of q, k and v


class StreamBlock(nnx.Module):
    """One block's weights for one stream, text or video."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        embed, heads = {"embed": cfg.dim}, {"heads": cfg.heads, "head_dim": cfg.head_dim}
        # One matrix product, not three: fewer gathers of split weights and less memory, for as much time (2.5 % by the
        # TPU compiler's estimate of a block's step).
        self.qkv = Linear(embed, {"heads": cfg.heads, "qkv": 3, "head_dim": cfg.head_dim}, dtype=dtype, rngs=rngs)
        self.q_norm = HeadNorm(cfg.head_dim)
        self.k_norm = HeadNorm(cfg.head_dim)
        self.out = Linear(heads, embed, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(cfg, rngs=rngs)

    @typed
    def before(
        self,
        x: Float[Array, "B N M"],
        shift: Float32[Array, "B groups M"],
        scale: Float32[Array, "B groups M"],
        turns: Turns,
    ) -> QKV:
        """Normed and turned q and k, and v, of the modulated tokens."""
        return self.project(modulated_norm(x, scale, shift, x.dtype), turns)

    @typed
    def project(self, x: Float[Array, "B N M"], turns: Turns) -> QKV:
        """Normed and turned q and k, and v. Heads have nothing in common, so devices can have some of them each."""
        return normed_heads(self.qkv(x), self.q_norm.scale[...], self.k_norm.scale[...], turns)

    @typed
    def after(
        self, x: Float[Array, "B N M"], attended: Float[Array, "B N H D"], rest: list[Float32[Array, "B groups M"]]
    ) -> Float[Array, "B N M"]:
        """The two residual steps: attention's output, then the MLP."""
        gate, shift, scale, mlp_gate = rest
        x = gated_sum(x, gate, self.out(attended))
        return gated_sum(x, mlp_gate, self.mlp(modulated_norm(x, scale, shift, x.dtype)))


class Block(nnx.Module):
    """Both streams, joined by one attention over the scene."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.text = StreamBlock(cfg, rngs=rngs)
        self.video = StreamBlock(cfg, rngs=rngs)

    @typed
    def __call__(
        self,
        text: Float[Array, "B L M"],
        video: Float[Array, "B V M"],
        modulations: Modulations,
        slots: Slots,
        turns: Turns,
        attend: Attend,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B L M"], Float[Array, "B V M"], Int[Array, "B H N K"] | None]:
        """The tokens after this block, and the routes that `attend` gave."""
        size = text.shape[1]
        (shift, scale, *text_rest), (video_shift, video_scale, *video_rest) = map(of_groups, modulations, slots)
        text_qkv = self.text.before(text, shift, scale, tuple(x[:, :size] for x in turns))
        text_qkv = lax.optimization_barrier(text_qkv)  # else XLA reads and writes video one by one, too
        video_qkv = self.video.before(video, video_shift, video_scale, tuple(x[:, size:] for x in turns))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(text_qkv, video_qkv, strict=True))
        attended, routes = attend(q, k, v, key)
        of_text, of_video = jnp.split(attended, [size], axis=1)
        return self.text.after(text, of_text, text_rest), self.video.after(video, of_video, video_rest), routes


class BlockModulation(nnx.Module):
    """The modulation of a block's two streams: two shifts, scales and gates each."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.text = Modulation(cfg, 6, rngs=rngs)
        self.video = Modulation(cfg, 6, rngs=rngs)

    def __call__(self, time: Float32[Array, "B P M"]) -> Modulations:
        """Depends on the noise levels alone."""
        return self.text(time), self.video(time)


def stacked[T: nnx.Module](kind: Callable[..., T], cfg: MMDiTConfig, rngs: nnx.Rngs) -> T:
    """`depth` modules as one, each weight with a leading `layers` axis: compile time does not grow with depth."""

    @nnx.split_rngs(splits=cfg.depth)
    @nnx.vmap(axis_size=cfg.depth, transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs):
        return kind(cfg, rngs=rngs)

    modules = make(rngs)
    for _, weight in nnx.iter_graph(modules):
        if isinstance(weight, nnx.Param):
            weight.set_metadata(logical=("layers", *weight.get_metadata("logical")))
    return modules
