"""WanDiT: the transformer of Wan 2.1 (arXiv 2503.20314, section 4.2) and 2.2 with Mixture of Contexts inside.

Its tokens are video alone. Captions reach them by cross-attention, so what MoC's text anchors are to an MMDiT, the
scene's and the own shot's caption are to each block here, whatever `moc.text_anchor` says. Every shot has its own noise
level; a scene of one shot with dense attention is what Wan computes.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moc_jax.attention.continued import Seen
from moc_jax.attention.deal import Deal
from moc_jax.attention.sharded import deal_of
from moc_jax.config import MoCConfig, Remat, WanConfig
from moc_jax.models.after import Forward, Over, Wanted, standing
from moc_jax.models.dense_layers import dense_in_some
from moc_jax.models.family import Inputs, VideoModel
from moc_jax.models.layers import TimeEmbedding, gelu, modulated_norm, of_groups, over_layers, stacked
from moc_jax.models.linear import Linear, cast_once, linear_of
from moc_jax.models.patches import scene_shape, tokens_of, video_of
from moc_jax.models.rope import Turns, rope_angles, turns_of
from moc_jax.models.wan.block import Attend, Block, Read, modulation_table
from moc_jax.models.wan.captions import captions_of, captions_over_mesh
from moc_jax.scene import SceneLengths, SceneShape, chunk_table, clean_frames, frame_shot, noisiest, positions
from moc_jax.shapes import Array, Float, Float32, Int, Key, typed
from moc_jax.sharding import constrained


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Around:
    """What the blocks are given beside the tokens; the same for both experts."""

    shape: SceneShape = dataclasses.field(metadata={"static": True})
    deal: Deal = dataclasses.field(metadata={"static": True})
    slots: Float32[Array, "B groups T"]  # whose level each frame stands at, or each of its pieces (attention/deal.py)
    turns: Turns


class Network(nnx.Module):
    """One set of Wan's weights."""

    def __init__(self, cfg: WanConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        linear, embed, out = linear_of(cfg, rngs), {"embed": cfg.dim}, {"embed_out": cfg.dim}
        read = cfg.patch_size * (cfg.latent_channels + cfg.condition_channels)
        self.time = TimeEmbedding(cfg, rngs=rngs)
        self.time_projection = Linear(embed, {"modulation": 6, **out}, dtype=jnp.float32, rngs=rngs)
        self.text_hidden = linear({"text": cfg.text_dim}, embed)
        self.text_out = linear(embed, out)
        self.video_in = linear({"patch": read}, embed)
        self.blocks = stacked(Block, cfg, rngs)
        self.head_modulation = modulation_table(cfg, 2, rngs=rngs)
        written = {"patch": cfg.patch_size * cfg.latent_channels}
        self.head = Linear(embed, written, dtype=jnp.float32, rngs=rngs, zero=True)

    def __call__(
        self,
        video: Float[Array, "B F Y X Z"],
        text: Float[Array, "B rows E"],
        t: Float[Array, "B T"],
        around: _Around,
        attend: Attend,
        read: Read,
        key: Key[Array, ""] | None,
    ) -> tuple[Float32[Array, "B F Y X Z"], Seen]:
        """Velocity, and what `attend` gave beside."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        time = self.time(t.astype(jnp.float32))
        of_frames = of_groups(self.time_projection(nnx.silu(time)), around.slots)
        captions = self.text_out(gelu(self.text_hidden(text.astype(dtype))))
        x = constrained(around.deal.dealt(tokens_of(video, cfg.patch).astype(dtype)), "batch", "stream")
        x = constrained(self.video_in(x), "batch", "stream")
        x, seen = self._run_blocks(x, captions, of_frames, around.turns, attend, read, key)
        (of_frame,) = of_groups(time[:, :, None], around.slots)
        shift, scale = (row[None, None] + of_frame for row in self.head_modulation[...])
        x = self.head(modulated_norm(x, scale, shift, jnp.dtype(jnp.float32)))
        x = around.deal.restored(constrained(x, "batch", "stream"))
        return constrained(video_of(x, around.shape, cfg.patch), "batch", "frames"), seen

    def _run_blocks(
        self,
        x: Float[Array, "B _ M"],
        text: Float[Array, "B rows M"],
        time: list[Float32[Array, "B groups M"]],
        turns: Turns,
        attend: Attend,
        read: Read,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B _ M"], Seen]:
        graph, weights = nnx.split(self.blocks)
        weights = cast_once(weights, self.cfg)

        def body(x, layer):
            weights, index = layer
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, seen = nnx.merge(graph, weights)(x, text, time, turns, attend, read, layer_key, index)
            return constrained(x, "batch", "stream"), seen

        return over_layers(body, x, (weights, jnp.arange(self.cfg.depth)), self.cfg)


class WanDiT(VideoModel):
    """Wan's network, or its two experts; `VideoModel` says what it computes."""

    def __init__(self, cfg: WanConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        if cfg.boundary:
            self.high, self.low = Network(cfg, rngs=rngs), Network(cfg, rngs=rngs)
        else:
            self.network = Network(cfg, rngs=rngs)

    @staticmethod
    def matrix_flops(cfg: WanConfig, text_tokens: int, video_tokens: int) -> int:
        """FLOPs of one forward pass outside attention, which cross-attention's scores are not counted as either.

        Modulation is per frame, not per token, and counts as nothing.
        """
        video = cfg.depth * (6 * cfg.dim**2 + 2 * cfg.dim * cfg.mlp_dim)
        video += cfg.dim * cfg.patch_size * (2 * cfg.latent_channels + cfg.condition_channels)
        text = cfg.depth * 2 * cfg.dim**2 + cfg.dim * (cfg.text_dim + cfg.dim)
        return 2 * (video * video_tokens + text * text_tokens)

    @staticmethod
    def kept_bytes(cfg: WanConfig, remat: Remat, moc: MoCConfig, shots: int) -> int:
        """See `VideoModel`."""
        sizes = cfg.dim, cfg.mlp_dim, cfg.lora.rank
        width, hidden, rank = (size * jnp.dtype(cfg.dtype).itemsize for size in sizes)
        picks = moc.most_picks(shots)
        # Both attentions' outputs and log-sum-exps, routes and where their pairs lie.
        attention = 2 * width + 4 * cfg.heads * (2 + 2 * picks)
        beside_input = {
            "full": 0,
            "attention": attention,
            "attention+mlp": attention + width,
            "qkv+attention+mlp": attention + 4 * width,
            # q, k, v and output, the captions' q and output, the MLP's two.
            "dots": attention + 7 * width + hidden + 8 * rank,
            # And what norms, gates, rotary positions and GELU read.
            "none": attention + 18 * width + 2 * hidden + 8 * rank,
        }
        return cfg.depth * (width + beside_input[remat])

    def forward(self, given: Inputs, wanted: Wanted) -> Forward:
        """See `VideoModel`."""
        video, text, t, lengths, moc, key, attention, condition, after, active = given
        cfg = self.cfg
        given.check_condition(cfg.condition_channels)
        shape, of_video = scene_shape(cfg, video.shape, text.shape, lengths)
        table = chunk_table(of_video, shape, moc.chunk)
        place = None if after is None else standing(after, video.shape, of_video, shape, cfg, moc, key)
        if place is None:
            at = _positions(of_video, shape, cfg)
        else:
            at = place.of_given(_positions(place.lengths, place.shape, cfg))
        deal = deal_of(shape, cfg.heads, attention)
        shot, levels = frame_shot(of_video.shot_frames, shape.frames), t
        shots = slots = jax.nn.one_hot(shot, shape.shots)
        if of_video.clean_first is not None:  # given first frames are of one slot more, at t = 0
            levels = jnp.pad(t, ((0, 0), (0, 1)))
            slots = jax.nn.one_hot(jnp.where(clean_frames(of_video, shape.frames), shape.shots, shot), shape.shots + 1)
        at = constrained(deal.dealt(at), "batch", "tokens")
        around = _Around(shape, deal, deal.of_pieces(slots), turns_of(rope_angles(at, cfg.head_dim, 10_000.0)))
        text = jnp.pad(text, ((0, 0), (0, 1), (0, 0)))  # the row of zeros
        captions = captions_of(
            dataclasses.replace(of_video, text_lengths=lengths.text_lengths), shape, text.shape[1], cfg.text_rows
        ).dealt(deal)
        over = Over(attention, moc, deal, table, shots, place, wanted)
        read = captions_over_mesh(captions, attention)
        inputs = video if condition is None else jnp.concatenate([video, condition.astype(video.dtype)], axis=-1)

        def run(network: Network, first_kept: int = 0) -> tuple[Array, Seen]:
            attend = _attend(over._replace(first_kept=first_kept))
            return network(inputs, text, levels, around, attend, read, key)

        if not cfg.boundary:
            return Forward(*run(self.network), table, place)
        if wanted == "new":  # later shots may be read by either
            (velocity, of_high), (_, of_low) = run(self.high), run(self.low, cfg.depth)
            return Forward(velocity, jax.tree.map(lambda *of: jnp.concatenate(of), of_high, of_low), table, place)
        is_high = noisiest(t, of_video, active) >= cfg.boundary
        return Forward(*_by_noise_level(run, (self.high, 0), (self.low, cfg.depth), is_high), table, place)


def _positions(lengths: SceneLengths, shape: SceneShape, cfg: WanConfig) -> Int[Array, "B V 3"]:
    return positions(lengths, shape) if cfg.positions == "diagonal" else _in_time(lengths, shape, cfg.shot_offset)


@typed
def _in_time(lengths: SceneLengths, shape: SceneShape, offset: int) -> Int[Array, "B V 3"]:
    """Positions (t, h, w): frames count on through the scene, and `offset` more at the first of each later take."""
    shot = frame_shot(lengths.shot_frames, shape.frames)  # [B, F]
    begins = lengths.shot_frames > 0 if lengths.continues is None else (lengths.shot_frames > 0) & ~lengths.continues
    before = jnp.maximum(jnp.cumsum(begins, axis=1) - 1, 0)
    t = jnp.arange(shape.frames)[None] + offset * jnp.take_along_axis(before, jnp.maximum(shot, 0), axis=1)
    h, w = jnp.arange(shape.rows)[None, None, :, None], jnp.arange(shape.columns)[None, None, None]
    sizes = shot.shape[0], shape.frames, shape.rows, shape.columns
    grid = jnp.stack([jnp.broadcast_to(x, sizes) for x in (t[:, :, None, None], h, w)], axis=-1)
    return grid.reshape(shot.shape[0], shape.video_tokens, 3).astype(jnp.int32)


def _by_noise_level(
    run: Callable, high: tuple[Network, int], low: tuple[Network, int], is_high: Array
) -> tuple[Array, Seen]:
    """Each scene by its expert. One that no scene of the batch needs does not run."""

    def if_any(network: Network, first_kept: int, mine: Array) -> tuple[Array, Seen]:
        graph, weights = nnx.split(network)

        def go():
            return run(nnx.merge(graph, weights), first_kept)

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(go))
        return lax.cond(jnp.any(mine), go, lambda: nothing)

    (of_high, high_seen), (of_low, low_seen) = if_any(*high, is_high), if_any(*low, ~is_high)
    velocity = jnp.where(is_high[:, None, None, None, None], of_high, of_low)

    def of_expert(of_high: Array, of_low: Array) -> Array:
        return jnp.where(jnp.expand_dims(is_high, (0, *range(2, of_high.ndim))), of_high, of_low)

    return velocity, jax.tree.map(of_expert, high_seen, low_seen)


def _attend(over: Over) -> Attend:
    """Attention over these shots' chunks."""
    attend_layer = dense_in_some(over)

    def attend(q, k, v, key, index):
        text = q[:, :0], k[:, :0], v[:, :0]  # captions are read apart
        (_, out), seen = attend_layer(text, (q, k, v), key, index)
        return out, seen

    return attend
