"""The video diffusion transformer: an MMDiT whose joint attention is Mixture of Contexts.

Text and video have weights of their own and meet in attention (SD3, arXiv 2403.03206, section 4); every token is
modulated by the noise level of its own shot (LCT, arXiv 2503.10589, section 3.1), the global caption by t = 0.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moc_jax.attention.api import RoutedAttention, SceneAttention, scene_keys
from moc_jax.attention.residuals import RESIDUALS
from moc_jax.config import MMDiTConfig, MoCConfig, Remat
from moc_jax.models.family import Routed
from moc_jax.models.layers import MLP_OUTPUT, Linear, Modulation, TimeEmbedding, modulated_norm, of_groups
from moc_jax.models.mmdit.block import Attend, Block, BlockModulation, Slots, stacked
from moc_jax.models.patches import scene_shape, tokens_of, video_of
from moc_jax.models.rope import Turns, rope_angles, turns_of
from moc_jax.scene import ChunkTable, SceneLengths, chunk_table, frame_shot, positions
from moc_jax.shapes import Array, Float, Float32, Int, Key, typed
from moc_jax.sharding import batch_sharded, key_path

_policies = jax.checkpoint_policies
_of_attention = _policies.save_only_these_names(*RESIDUALS)
_KEPT = {  # by `remat`, for the backward pass beside a block's inputs
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _of_attention),
    "attention+mlp": _policies.save_only_these_names(*RESIDUALS, MLP_OUTPUT),
    "attention": _of_attention,
    "full": None,
    "auto": None,
}

Streams = tuple[Float[Array, "B L M"], Float[Array, "B V M"]]  # text and video


class MMDiT(nnx.Module):
    """Predicts the flow's velocity, noise - z_0, for all shots of a scene at once."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype = jnp.dtype(cfg.dtype)
        width = cfg.patch_size * cfg.latent_channels
        self.time = TimeEmbedding(cfg, rngs=rngs)
        self.text_in = Linear({"text": cfg.text_dim}, {"embed": cfg.dim}, dtype=dtype, rngs=rngs)
        self.video_in = Linear({"patch": width}, {"embed": cfg.dim}, dtype=dtype, rngs=rngs)
        self.modulation = stacked(BlockModulation, cfg, rngs)
        self.blocks = stacked(Block, cfg, rngs)
        self.final_modulation = Modulation(cfg, 2, rngs=rngs)
        self.final = Linear({"embed": cfg.dim}, {"patch": width}, dtype=jnp.float32, rngs=rngs, zero=True)

    @staticmethod
    def matrix_flops(cfg: MMDiTConfig, text_tokens: int, video_tokens: int) -> int:
        """FLOPs of one forward pass outside attention: each token meets its own stream's matrices, once.

        Modulation is per shot, not per token, and counts as nothing.
        """
        per_stream = 4 * cfg.dim**2 + 2 * cfg.dim * cfg.mlp_dim
        ends = 2 * cfg.dim * cfg.patch_size * cfg.latent_channels * video_tokens + cfg.dim * cfg.text_dim * text_tokens
        return 2 * (cfg.depth * per_stream * (text_tokens + video_tokens) + ends)

    @staticmethod
    def kept_bytes(cfg: MMDiTConfig, remat: Remat, moc: MoCConfig) -> int:
        """Bytes per token that all blocks together keep for the backward pass; `remat` is neither `none` nor `auto`."""
        width, hidden = (size * jnp.dtype(cfg.dtype).itemsize for size in (cfg.dim, cfg.mlp_dim))
        picks = 0 if moc.mode == "dense" or moc.top_k == 0 else moc.top_k + moc.max_drop_in
        attention = width + 4 * cfg.heads * (1 + 2 * picks)  # output, log-sum-exp, routes and where their pairs lie
        beside_input = {
            "full": 0,
            "attention": attention,
            "attention+mlp": attention + width,
            "dots": attention + 5 * width + hidden,  # of q, k and v, attention's output, and the MLP's two
        }
        return cfg.depth * (width + beside_input[remat])

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
    ) -> Float32[Array, "B F Y X Z"]:
        """Velocity; see `VideoModel`."""
        return self._forward(video, text, t, lengths, moc, key, attention, with_routes=False)[0]

    @typed
    def routed(
        self,
        video: Float[Array, "B F Y X Z"],
        text: Float[Array, "B L E"],
        t: Float[Array, "B S"],
        lengths: SceneLengths,
        moc: MoCConfig,
        *,
        key: Key[Array, ""] | None = None,
        attention: SceneAttention = RoutedAttention(),
    ) -> Routed:
        """Velocity, routes and chunk table; see `VideoModel`."""
        velocity, routes, table = self._forward(video, text, t, lengths, moc, key, attention, with_routes=True)
        assert routes is not None
        return Routed(velocity=velocity, routes=routes[:, :, :, text.shape[1] :], table=table)

    def _forward(
        self,
        video: Float[Array, "B F Y X Z"],
        text: Float[Array, "B L E"],
        t: Float[Array, "B S"],
        lengths: SceneLengths,
        moc: MoCConfig,
        key: Key[Array, ""] | None,
        attention: SceneAttention,
        *,
        with_routes: bool,
    ) -> tuple[Float32[Array, "B F Y X Z"], Int[Array, "depth B H N K"] | None, ChunkTable]:
        cfg = self.cfg
        shape, lengths = scene_shape(cfg, video.shape, text.shape, lengths)
        table = chunk_table(lengths, shape, moc.chunk)
        turns = turns_of(rope_angles(positions(lengths, shape), cfg.head_dim, cfg.rope_theta))
        captions = shape.shots + 1  # the global one is the first
        of_text = jax.nn.one_hot(table.token_shot[:, : shape.text_tokens] + 1, captions)
        of_frames = jax.nn.one_hot(frame_shot(lengths.shot_frames, shape.frames) + 1, captions)
        slots = of_text, of_frames
        time = self.time(jnp.pad(t.astype(jnp.float32), ((0, 0), (1, 0))))

        dtype = jnp.dtype(cfg.dtype)
        streams = self.text_in(text.astype(dtype)), self.video_in(tokens_of(video, cfg.patch).astype(dtype))
        attend = _over_the_scene(attention, table, moc, with_routes)
        (_, x), routes = self._run_blocks(streams, time, slots, turns, attend, key)

        shift, scale = of_groups(self.final_modulation(time), slots[1])
        x = modulated_norm(x, scale, shift, jnp.dtype(jnp.float32))
        return video_of(self.final(x), shape, cfg.patch), routes, table

    def _run_blocks(
        self,
        streams: Streams,
        time: Float32[Array, "B P M"],
        slots: Slots,
        turns: Turns,
        attend: Attend,
        key: Key[Array, ""] | None,
    ) -> tuple[Streams, Int[Array, "depth B H N K"] | None]:
        graph, weights = nnx.split(self.blocks)
        dtype = jnp.dtype(self.cfg.dtype)  # of all weights but the norms': one pass, and what layers read is half
        weights = jax.tree.map_with_path(lambda path, x: x if "scale" in key_path(path) else x.astype(dtype), weights)
        # Modulation is per caption: of all layers at once, and outside of what is recomputed.
        of_modulation, stack = nnx.split(self.modulation)
        times = jnp.broadcast_to(time[None], (self.cfg.depth, *time.shape))
        modulations = jax.vmap(lambda layer, time: nnx.merge(of_modulation, layer)(time))(stack, times)

        def body(streams, layer):
            weights, modulations, index = layer
            layer_key = None if key is None else jax.random.fold_in(key, index)
            text, video, routes = nnx.merge(graph, weights)(*streams, modulations, slots, turns, attend, layer_key)
            return (text, video), routes

        if self.cfg.remat != "none":
            body = jax.checkpoint(body, policy=_KEPT[self.cfg.remat], prevent_cse=False)  # scan keeps passes apart
        return lax.scan(body, streams, (weights, modulations, jnp.arange(self.cfg.depth)))


def _over_the_scene(attention: SceneAttention, table: ChunkTable, moc: MoCConfig, with_routes: bool) -> Attend:
    """Attention over this scene's chunks, each device on its own share of the batch."""

    def attend(q, k, v, key):
        keys = None if key is None else scene_keys(key, q.shape[0], q.shape[2])

        def local(q, k, v, table, keys):
            out, routes = attention(q, k, v, table, moc, key=keys)
            return (out, routes) if with_routes else (out, None)

        return batch_sharded(local)(q, k, v, table, keys)

    return attend
