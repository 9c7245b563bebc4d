"""The video diffusion transformer: an MMDiT whose joint attention is Mixture of Contexts.

Text and video have weights of their own and meet in attention (SD3, arXiv 2403.03206, section 4); every token is
modulated by the noise level of its own shot (LCT, arXiv 2503.10589, section 3.1), the global caption by t = 0.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moc_jax.attention.continued import Seen
from moc_jax.attention.deal import Deal
from moc_jax.attention.sharded import deal_of
from moc_jax.config import MMDiTConfig, MoCConfig, Remat
from moc_jax.models.after import Forward, Over, Wanted, standing
from moc_jax.models.dense_layers import dense_in_some
from moc_jax.models.family import Inputs, VideoModel
from moc_jax.models.layers import Modulation, TimeEmbedding, modulated_norm, of_groups, over_layers, stacked
from moc_jax.models.linear import Linear, cast_once, linear_of
from moc_jax.models.mmdit.block import Attend, Block, BlockModulation, Slots
from moc_jax.models.patches import scene_shape, tokens_of, video_of
from moc_jax.models.rope import Turns, rope_angles, turns_of
from moc_jax.scene import chunk_table, clean_frames, frame_shot, positions
from moc_jax.shapes import Array, Float, Float32, Int, Key
from moc_jax.sharding import constrained

Streams = tuple[Float[Array, "B L M"], Float[Array, "B V M"]]  # text and video


class MMDiT(VideoModel):
    """An MMDiT of video and captions; `VideoModel` says what it computes."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        linear, width = linear_of(cfg, rngs), cfg.patch_size * cfg.latent_channels
        self.time = TimeEmbedding(cfg, rngs=rngs)
        self.text_in = linear({"text": cfg.text_dim}, {"embed": cfg.dim})
        self.video_in = linear({"patch": width}, {"embed": cfg.dim})
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
    def kept_bytes(cfg: MMDiTConfig, remat: Remat, moc: MoCConfig, shots: int) -> int:
        """See `VideoModel`."""
        sizes = cfg.dim, cfg.mlp_dim, cfg.lora.rank
        width, hidden, rank = (size * jnp.dtype(cfg.dtype).itemsize for size in sizes)
        picks = moc.most_picks(shots)
        attention = width + 4 * cfg.heads * (1 + 2 * picks)  # output, log-sum-exp, routes and where their pairs lie
        beside_input = {
            "full": 0,
            "attention": attention,
            "attention+mlp": attention + width,
            "qkv+attention+mlp": attention + 4 * width,
            "dots": attention + 5 * width + hidden + 4 * rank,  # q, k and v, attention's output, the MLP's two
            # And what norms, gates, rotary positions and GELU read.
            "none": attention + 12 * width + 2 * hidden + 4 * rank,
        }
        return cfg.depth * (width + beside_input[remat])

    def forward(self, given: Inputs, wanted: Wanted) -> Forward:
        """See `VideoModel`."""
        video, text, t, lengths, moc, key, attention, _, after, _ = given
        given.check_condition(0)
        cfg = self.cfg
        shape, lengths = scene_shape(cfg, video.shape, text.shape, lengths)
        table = chunk_table(lengths, shape, moc.chunk)
        deal = deal_of(shape, cfg.heads, attention)
        captions = shape.shots + 1  # the global one is the first
        of_text = jax.nn.one_hot(deal.text_dealt(table.token_shot[:, : shape.text_tokens] + 1), captions)
        shot = frame_shot(lengths.shot_frames, shape.frames)
        of_frames = jax.nn.one_hot(jnp.where(clean_frames(lengths, shape.frames), 0, shot + 1), captions)
        slots = _split(of_text, deal.of_pieces(of_frames))
        time = self.time(jnp.pad(t.astype(jnp.float32), ((0, 0), (1, 0))))
        place = None if after is None else standing(after, video.shape, lengths, shape, cfg, moc, key)
        at = positions(lengths, shape) if place is None else place.of_given(positions(place.lengths, place.shape))
        turns = _turns(at, deal, cfg)

        dtype = jnp.dtype(cfg.dtype)
        with jax.named_scope("tokens"):
            text, tokens = _split(
                deal.text_dealt(text.astype(dtype)), deal.dealt(tokens_of(video, cfg.patch).astype(dtype))
            )
            streams = _split(self.text_in(text), self.video_in(tokens))
        shots = jax.nn.one_hot(shot, shape.shots)
        over = dense_in_some(Over(attention, moc, deal, table, shots, place, wanted))
        (_, x), seen = self._run_blocks(streams, time, slots, turns, over, key)

        shift, scale = of_groups(self.final_modulation(time), slots[1])
        with jax.named_scope("velocity"):
            x = self.final(modulated_norm(x, scale, shift, jnp.dtype(jnp.float32)))
            x = deal.restored(constrained(x, "batch", "stream"))
            return Forward(constrained(video_of(x, shape, cfg.patch), "batch", "frames"), seen, table, place)

    def _run_blocks(
        self,
        streams: Streams,
        time: Float32[Array, "B P M"],
        slots: Slots,
        turns: tuple[Turns, Turns],
        attend: Attend,
        key: Key[Array, ""] | None,
    ) -> tuple[Streams, Seen]:
        graph, weights = nnx.split(self.blocks)
        weights = cast_once(weights, self.cfg)
        # Modulation is per caption: of all layers at once, and outside of what is recomputed.
        with jax.named_scope("modulation"):
            modulations = self.modulation(time)

        def body(streams, layer):
            weights, modulations, index = layer
            layer_key = None if key is None else jax.random.fold_in(key, index)
            layer = nnx.merge(graph, weights)
            text, video, seen = layer(*streams, modulations, slots, turns, attend, layer_key, index)
            return _split(text, video), seen

        return over_layers(body, streams, (weights, modulations, jnp.arange(self.cfg.depth)), self.cfg)


def _split(text: Array, video: Array) -> tuple[Array, Array]:
    """Tokens, or groups of them, each on one device."""
    return constrained(text, "batch", "stream"), constrained(video, "batch", "stream")


def _turns(positions: Int[Array, "B N 3"], deal: Deal, cfg: MMDiTConfig) -> tuple[Turns, Turns]:
    """How heads of text and of video are turned, where their tokens are."""
    dealt = deal.text_dealt(positions[:, : deal.text]), deal.dealt(positions[:, deal.text :])
    text, video = (constrained(each, "batch", "tokens") for each in dealt)
    of_text, of_video = (turns_of(rope_angles(each, cfg.head_dim, cfg.rope_theta)) for each in (text, video))
    return of_text, of_video
