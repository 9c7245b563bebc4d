"""Settings of the network: attention, transformer, codec, text encoder. They belong to the weights."""

import dataclasses
import math
from typing import Annotated, Literal

from moc_jax.config.base import Count, Fraction, Range, Settings, Size, Stride, check

_WIDEST = 2**20  # numbers that one token is made of
_MOST_WEIGHTS = 10**13
_LARGEST_PATCH = 2**14  # its covariance takes 2 GiB

Remat = Literal["auto", "none", "dots", "attention+mlp", "attention", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkConfig(Settings, at="moc.chunk"):
    """How a shot's video is cut into chunks (MoC, arXiv 2508.21058, section 3.2: content-aligned chunking)."""

    unit: Literal["frames", "tokens"] = "tokens"
    """`frames`: whole latent frames; `tokens`: runs of tokens in raster order (t, h, w)."""
    size: Count = 1280
    """The most frames (or tokens) that one chunk may hold."""
    remainder: Literal["even", "tail"] = "even"
    """A shot that is not a multiple of `size`: parts as equal as possible, or full parts and a short last one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCConfig(Settings, at="moc"):
    """Mixture of Contexts: what each query token of each head attends to."""

    mode: Literal["moc", "dense"] = "moc"
    """`dense` switches routing off: every token sees every visible token, with the same weights."""
    chunk: ChunkConfig = ChunkConfig()
    top_k: Annotated[int, Range(0, 2**20, "chunks")] = 5
    """Chunks each query of each head picks; 0 leaves the anchors alone."""
    routing: Literal["keys", "random", "recent"] = "keys"
    """`keys`: the candidates whose keys match the query best. For comparison, as many of the same candidates: `random`
    ones, or the most `recent` before the query's own chunk."""
    self_anchor: Literal["shot", "chunk", "window", "none"] = "shot"
    """Video always attended: the own shot, the own chunk, the own chunk and its neighbours, or nothing."""
    window: Annotated[int, Range(0, 2**20, "chunks")] = 1
    """Chunks on either side of the own one, within the shot, for `self_anchor = window`."""
    text_anchor: Literal["all", "own+global", "none"] = "all"
    """Captions each video query always attends to."""
    causal_routing: bool = True
    """Only chunks before the query's own may be picked, so that shots cannot lock onto each other."""
    visibility: Literal["scene", "past"] = "scene"
    """`scene`: joint denoising; `past`: a shot sees only the global caption and shots up to itself."""
    drop_off_max: Fraction = 0.5
    """Training: p ~ U(0, drop_off_max); of the k picks that a query holds, floor(p * k) random ones are dropped."""
    drop_in_rate: Annotated[float, Range(0, 1e6)] = 0.5
    """Training: Poisson rate of further random candidates added per query."""
    max_drop_in: Annotated[int, Range(0, 2**10, "chunks")] = 2
    """Training: the most chunks that drop-in adds to a query; more are cut."""

    def check_together(self):
        anchored = self.self_anchor != "none" or self.text_anchor != "none" or self.top_k > 0
        check(
            anchored or self.mode == "dense",
            "moc.self_anchor = none, moc.text_anchor = none and moc.top_k = 0 leave a query nothing to attend to; "
            "set at least one of them",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDiTConfig(Settings, at="model"):
    """The multi-modal diffusion transformer: separate text and video weights, joint attention (LCT, SD3)."""

    name: Literal["mmdit"] = "mmdit"
    """`mmdit`: text and video have weights of their own and meet in attention."""
    dim: Size = 256
    """Width of a token."""
    depth: Annotated[int, Range(1, 2**12)] = 6
    """Blocks."""
    heads: Size = 4
    """Attention heads, of size dim / heads."""
    mlp_ratio: Annotated[float, Range(1e-6, 1e3)] = 4.0
    """Hidden width of the MLP over `dim`."""
    patch: tuple[Stride, Stride, Stride] = (1, 2, 2)
    """Latent frames, rows and columns per token."""
    latent_channels: Size = 16
    """Channels of the codec's latents."""
    text_dim: Size = 256
    """Width of the text encoder's embeddings."""
    rope_theta: Annotated[float, Range(1.001, 1e12)] = 10_000.0
    """Base of the rotary frequencies; smaller tells near positions apart sooner."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type of matrix products; parameters, norms' statistics and modulation stay float32."""
    remat: Remat = "auto"
    """What of a block the backward pass finds kept and does not recompute: all (`none`); attention with its routing and
    beside it matrix products (`dots`), the MLP's output (`attention+mlp`) or no more (`attention`); nothing (`full`).
    `auto`: the fastest of these, `none` aside, that fits the device when a run begins; outside of runs, `full`."""

    def check_together(self):
        check(self.mlp_dim >= 1, f"model.mlp_ratio is {self.mlp_ratio}; mlp_ratio x dim must be at least 1")
        check(
            self.dim % self.heads == 0,
            f"model.dim = {self.dim} is not a multiple of model.heads = {self.heads}; "
            f"try dim {self.heads * math.ceil(self.dim / self.heads)}",
        )
        check(
            self.head_dim % 2 == 0 and self.head_dim >= 6,
            f"head size model.dim / model.heads = {self.head_dim}; rotary embedding needs an even size of at least 6",
        )
        width = self.patch_size * self.latent_channels
        check(
            width <= _WIDEST,
            f"model.patch {self.patch} x model.latent_channels {self.latent_channels} are {width:,} numbers per token; "
            f"at most {_WIDEST:,} are possible: choose a smaller patch",
        )
        # What grows with their product: a block has two streams, each of attention, MLP and modulation.
        weights = 2 * self.depth * self.dim * (10 * self.dim + 2 * self.mlp_dim)
        check(
            weights <= _MOST_WEIGHTS,
            f"model.depth {self.depth}, model.dim {self.dim} and model.mlp_ratio {self.mlp_ratio:g} make about "
            f"{weights:.2g} parameters; at most {_MOST_WEIGHTS:.2g} are possible: choose smaller ones",
        )

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.dim // self.heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.dim * self.mlp_ratio)

    @property
    def patch_size(self) -> int:
        """Latent positions per token."""
        return math.prod(self.patch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PcaConfig(Settings, at="codec"):
    """Video <-> latents by principal components, which a run fits and its checkpoints hold."""

    name: Literal["pca"] = "pca"
    """`pca`: linear autoencoder of overlapping windows, fitted in closed form on the training clips."""
    stride: tuple[Stride, Stride, Stride] = (4, 8, 8)
    """Frames, rows and columns per latent; the first frame stands alone, so clips have stride * n + 1 frames."""
    channels: Size = 16
    """Latent channels."""
    whiten: Fraction = 0.5
    """Latents are divided by std ** whiten per channel: 0 keeps pixel energy, 1 makes all channels unit variance."""

    def check_together(self):
        size = 3 * math.prod(self.stride)
        check(
            size <= _LARGEST_PATCH,
            f"codec.stride {self.stride} makes patches of {size:,} numbers, whose covariance is fitted; at most "
            f"{_LARGEST_PATCH:,} are possible: choose smaller strides",
        )
        limit = 3 * self.stride[1] * self.stride[2]
        check(
            self.channels <= limit,
            f"codec.channels = {self.channels}; one frame's patch of {self.stride[1]}x{self.stride[2]}x3 pixels "
            f"has only {limit} components, so it must lie in 1..{limit}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashConfig(Settings, at="text"):
    """Caption -> embeddings of hashed words."""

    name: Literal["hash"] = "hash"
    """`hash`: each word, in any language, is hashed to a fixed random vector; nothing to download."""
    dim: Size = 256
    """Width of an embedding."""
    max_tokens: Annotated[int, Range(1, 2**20)] = 64
    """The longest caption, in tokens; a longer one is an error."""


# Tagged unions: `name` says which kind it is, in Python, in JSON and on the command line. A new kind is a dataclass
# with a `name` of its own and a default for every field, joined here by |; models/, codecs/ and text/ say what it
# builds. Other modules rely on what all kinds of a union have: codecs `stride` and `channels`, encoders `dim`, models
# `latent_channels`, `text_dim`, `patch`, `dim`, `depth`, `heads`, `head_dim`, `dtype` and `remat`.
ModelConfig = MMDiTConfig
CodecConfig = PcaConfig
TextConfig = HashConfig
