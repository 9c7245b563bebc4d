"""The video diffusion transformer: an MMDiT whose joint attention is Mixture of Contexts.

Text and video have weights of their own and meet in attention (SD3, arXiv 2403.03206, section 4); every token is
modulated by the noise level of its own shot (LCT, arXiv 2503.10589, section 3.1), the global caption by t = 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax

from moc_jax.attention.api import RoutedAttention, SceneAttention, scene_keys
from moc_jax.config import ConfigError, MoCConfig, ModelConfig
from moc_jax.models.layers import HeadNorm, Mlp, Modulation, TimeEmbedding, dense, layer_norm
from moc_jax.models.rope import rope_angles, rotate
from moc_jax.scene import ChunkTable, SceneLengths, SceneShape, chunk_table, positions
from moc_jax.shapes import Array, Float, Float32, Int, Key, typed
from moc_jax.sharding import batch_sharded


class StreamBlock(nnx.Module):
    """One block's weights for one stream, text or video."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        embed, heads = {"embed": cfg.dim}, {"heads": cfg.heads, "head_dim": cfg.head_dim}
        self.modulation = Modulation(cfg, 6, rngs=rngs)
        self.qkv = dense(embed, {"qkv": 3, **heads}, dtype=dtype, rngs=rngs)
        self.q_norm = HeadNorm(cfg.head_dim)
        self.k_norm = HeadNorm(cfg.head_dim)
        self.out = dense(heads, embed, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(cfg, rngs=rngs)

    def before(self, x, time, slot):
        """Normed, modulated q, k, v [B, N, H, D] and what `after` needs of the modulation."""
        shift, scale, *rest = self.modulation(time, slot)
        h = (layer_norm(x) * (1 + scale) + shift).astype(x.dtype)
        return self.project(h), rest

    def project(self, h):
        """Query, key and value of every head; nothing of one head is another's, so that heads can be split."""
        q, k, v = rearrange(self.qkv(h), "b n qkv h d -> qkv b n h d")
        return self.q_norm(q), self.k_norm(k), v

    def after(self, x, attended, rest):
        """The two residual steps: attention's output, then the MLP."""
        gate, shift, scale, mlp_gate = rest
        x = x + (gate * self.out(attended)).astype(x.dtype)
        h = (layer_norm(x) * (1 + scale) + shift).astype(x.dtype)
        return x + (mlp_gate * self.mlp(h)).astype(x.dtype)


class Block(nnx.Module):
    """Both streams, joined by one attention over the scene."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.text = StreamBlock(cfg, rngs=rngs)
        self.video = StreamBlock(cfg, rngs=rngs)

    def __call__(self, text, video, time, slots, angles, attend, key):
        (text_qkv, text_rest), (video_qkv, video_rest) = (
            self.text.before(text, time, slots[0]),
            self.video.before(video, time, slots[1]),
        )
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(text_qkv, video_qkv, strict=True))
        attended, routes = attend(rotate(q, angles), rotate(k, angles), v, key)
        size = text.shape[1]
        text = self.text.after(text, attended[:, :size], text_rest)
        return text, self.video.after(video, attended[:, size:], video_rest), routes


class MMDiT(nnx.Module):
    """Predicts the flow's velocity, noise - z_0, for all shots of a scene at once."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype = jnp.dtype(cfg.dtype)
        width = cfg.patch_size * cfg.latent_channels
        self.time = TimeEmbedding(cfg, rngs=rngs)
        self.text_in = dense({"text": cfg.text_dim}, {"embed": cfg.dim}, dtype=dtype, rngs=rngs)
        self.video_in = dense({"patch": width}, {"embed": cfg.dim}, dtype=dtype, rngs=rngs)
        self.blocks = _stacked_blocks(cfg, rngs)
        self.final_modulation = Modulation(cfg, 2, rngs=rngs)
        self.final = dense({"embed": cfg.dim}, {"patch": width}, dtype=jnp.float32, rngs=rngs, zero=True)

    @typed
    def __call__(
        self,
        video: Float[Array, "B F Y X Z"],
        text: Float[Array, "B L E"],
        t: Float[Array, "B S"],
        lengths: SceneLengths,
        moc: MoCConfig,
        *,
        key: Key[Array, ""] | None = None,
        attention: SceneAttention = RoutedAttention(),
        with_routes: bool = False,
    ) -> Float32[Array, "B F Y X Z"] | tuple[Float32[Array, "B F Y X Z"], Int[Array, "depth B H V K"], ChunkTable]:
        """Velocity of noisy latents `video` whose shots stand at noise levels `t` in [0, 1] (1: pure noise).

        Args:
            lengths: `shot_frames` in latent frames. Velocities of padding frames mean nothing.
            key: Switches context drop-off and drop-in on (training).
            attention: What the tokens' q, k and v meet in.
            with_routes: Also return the chunks that the video queries of each layer picked, and the chunk table.

        Raises:
            ConfigError: the latents do not divide into patches.
        """
        shape, lengths = scene_shape(self.cfg, video.shape, text.shape, lengths)
        table = chunk_table(lengths, shape, moc.chunk)
        angles = rope_angles(positions(lengths, shape), self.cfg.head_dim, self.cfg.rope_theta)
        slot = jax.nn.one_hot(table.token_shot + 1, shape.shots + 1)  # the global caption is slot 0
        slots = slot[:, : shape.text_tokens], slot[:, shape.text_tokens :]
        time = self.time(jnp.pad(t.astype(jnp.float32), ((0, 0), (1, 0))))

        pt, ph, pw = self.cfg.patch
        tokens = rearrange(video, "b (f pt) (y ph) (x pw) z -> b (f y x) (pt ph pw z)", pt=pt, ph=ph, pw=pw)
        dtype = jnp.dtype(self.cfg.dtype)
        text_x, video_x = self.text_in(text.astype(dtype)), self.video_in(tokens.astype(dtype))
        attend = _attention(attention, table, moc, with_routes)
        text_x, video_x, routes = self._run_blocks(text_x, video_x, time, slots, angles, attend, key)

        shift, scale = self.final_modulation(time, slots[1])
        out = self.final(layer_norm(video_x) * (1 + scale) + shift)
        out = rearrange(
            out,
            "b (f y x) (pt ph pw z) -> b (f pt) (y ph) (x pw) z",
            **{"f": shape.frames, "y": shape.rows, "pt": pt, "ph": ph, "pw": pw},
        )
        if not with_routes:
            return out
        return out, routes[:, :, :, shape.text_tokens :], table

    def _run_blocks(self, text, video, time, slots, angles, attend, key):
        graph, weights = nnx.split(self.blocks)

        def body(carry, layer):
            text, video = carry
            weights, index = layer
            layer_key = None if key is None else jax.random.fold_in(key, index)
            text, video, routes = nnx.merge(graph, weights)(text, video, time, slots, angles, attend, layer_key)
            return (text, video), routes

        if self.cfg.remat != "none":
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.cfg.remat == "dots" else None
            body = jax.checkpoint(body, policy=keep, prevent_cse=False)  # scan already keeps the passes apart
        (text, video), routes = lax.scan(body, (text, video), (weights, jnp.arange(self.cfg.depth)))
        return text, video, routes


def abstract_model(cfg: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without its numbers: its graph, and the shape, type and logical axes of every weight."""
    return nnx.split(nnx.eval_shape(lambda: MMDiT(cfg, rngs=nnx.Rngs(0))), nnx.Param)


def _stacked_blocks(cfg: ModelConfig, rngs: nnx.Rngs) -> Block:
    """`depth` blocks as one, each weight with a leading `layers` axis: compile time does not grow with depth."""

    @nnx.split_rngs(splits=cfg.depth)
    @nnx.vmap(axis_size=cfg.depth, transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs):
        return Block(cfg, rngs=rngs)

    blocks = make(rngs)
    for _, weight in nnx.iter_graph(blocks):
        if isinstance(weight, nnx.Param):
            weight.set_metadata(logical=("layers", *weight.get_metadata("logical")))
    return blocks


def _attention(attention: SceneAttention, table: ChunkTable, moc: MoCConfig, with_routes: bool):
    """Attention over this scene's chunks, each device on its own share of the batch."""

    def attend(q, k, v, key):
        keys = None if key is None else scene_keys(key, q.shape[0], q.shape[2])

        def local(q, k, v, table, keys):
            out, routes = attention(q, k, v, table, moc, key=keys)
            return (out, routes) if with_routes else (out, None)

        return batch_sharded(local)(q, k, v, table, keys)

    return attend


def scene_shape(
    cfg: ModelConfig, video: tuple[int, ...], text: tuple[int, ...], lengths: SceneLengths
) -> tuple[SceneShape, SceneLengths]:
    """The scene in tokens: static sizes from the arrays' shapes, and lengths in token frames.

    Raises:
        ConfigError: the latents do not divide into patches.
    """
    for name, size, patch in zip(("frames", "rows", "columns"), video[1:4], cfg.patch, strict=True):
        if size % patch:
            raise ConfigError(
                f"latents have {size} {name}, which model.patch {cfg.patch} cuts into pieces of {patch}; "
                f"use {size // patch * patch} or {(size // patch + 1) * patch}"
            )
    shape = SceneShape(
        shots=lengths.shot_frames.shape[1],
        frames=video[1] // cfg.patch[0],
        rows=video[2] // cfg.patch[1],
        columns=video[3] // cfg.patch[2],
        text_tokens=text[1],
    )
    return shape, dataclasses.replace(lengths, shot_frames=lengths.shot_frames // cfg.patch[0])
