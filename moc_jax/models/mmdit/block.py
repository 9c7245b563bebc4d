"""The MMDiT's blocks: two streams, text and video, each with its weights, joined by one attention over the scene."""

from collections.abc import Callable

from flax import nnx
from jax import lax, named_scope

from moc_jax.attention.continued import Seen
from moc_jax.config import MMDiTConfig
from moc_jax.models.layers import QKV, HeadNorm, Mlp, Modulation, gated_sum, modulated_norm, normed_heads, of_groups
from moc_jax.models.linear import linear_of
from moc_jax.models.rope import Turns
from moc_jax.shapes import Array, Float, Float32, Int, Key, typed
from moc_jax.sharding import moved

Slots = tuple[Float32[Array, "B L P"], Float32[Array, "B F P"]]  # whose caption each text token and frame is under
Modulations = tuple[Float32[Array, "*layers B P count M"], Float32[Array, "*layers B P count M"]]  # of text and video
Attended = tuple[tuple[Array, Array], Seen]  # text and video, and what else is asked for
Attend = Callable[[QKV, QKV, Key[Array, ""] | None, Int[Array, ""]], Attended]  # of text and video; of a layer


class StreamBlock(nnx.Module):
    """One block's weights for one stream, text or video."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        linear, embed, heads = linear_of(cfg, rngs), {"embed": cfg.dim}, {"heads": cfg.heads, "head_dim": cfg.head_dim}
        # One matrix product, not three: fewer gathers of split weights and less memory, for as much time (2.5 % by the
        # TPU compiler's estimate of a block's step).
        self.qkv = linear(embed, {"heads": cfg.heads, "qkv": 3, "head_dim": cfg.head_dim})
        self.q_norm = HeadNorm(cfg.head_dim)
        self.k_norm = HeadNorm(cfg.head_dim)
        self.out = linear(heads, embed)
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
        with named_scope("qkv"):
            return self.project(moved(modulated_norm(x, scale, shift, x.dtype), "tokens", "stream"), turns)

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
        with named_scope("attention_out"):
            x = gated_sum(x, gate, moved(self.out(attended), "stream", "tokens"))
        with named_scope("mlp"):
            hidden = moved(modulated_norm(x, scale, shift, x.dtype), "tokens", "stream")
            return gated_sum(x, mlp_gate, moved(self.mlp(hidden), "stream", "tokens"))


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
        turns: tuple[tuple[Array, Array], tuple[Array, Array]],
        attend: Attend,
        key: Key[Array, ""] | None,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B L M"], Float[Array, "B V M"], Seen]:
        """The tokens after this block, and what `attend` gave beside."""
        (shift, scale, *text_rest), (video_shift, video_scale, *video_rest) = map(of_groups, modulations, slots)
        of_text, of_video = turns
        text_qkv = self.text.before(text, shift, scale, of_text)
        text_qkv = lax.optimization_barrier(text_qkv)  # else XLA reads and writes video one by one, too
        video_qkv = self.video.before(video, video_shift, video_scale, of_video)
        with named_scope("attention"):
            attended, seen = attend(text_qkv, video_qkv, key, index)
        text = self.text.after(text, attended[0], text_rest)
        return text, self.video.after(video, attended[1], video_rest), seen


class BlockModulation(nnx.Module):
    """The modulation of a block's two streams: two shifts, scales and gates each."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.text = Modulation(cfg, 6, rngs=rngs)
        self.video = Modulation(cfg, 6, rngs=rngs)

    def __call__(self, time: Float32[Array, "B P M"]) -> Modulations:
        """Of a stack of layers, those of each; depends on the noise levels alone."""
        return self.text(time), self.video(time)
