"""Settings of the network: attention, transformer, codec, text encoder. They belong to the weights."""

import dataclasses
import math
from typing import Literal

from moc_jax.config.base import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """How a shot's video is cut into chunks (MoC, arXiv 2508.21058, section 3.2: content-aligned chunking)."""

    unit: Literal["frames", "tokens"] = "tokens"
    """`frames`: whole latent frames; `tokens`: runs of tokens in raster order (t, h, w)."""
    size: int = 1280
    """The most frames (or tokens) that one chunk may hold."""
    remainder: Literal["even", "tail"] = "even"
    """A shot that is no multiple of `size`: equal parts as near as can be, or full parts and a short last one."""

    def __post_init__(self):
        check(self.size >= 1, f"moc.chunk.size is {self.size}; it must be at least 1 ({self.unit} per chunk)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCConfig:
    """Mixture of Contexts: what each query token of each head attends to."""

    mode: Literal["moc", "dense"] = "moc"
    """`dense` switches routing off: every token sees every visible token, with the same weights."""
    chunk: ChunkConfig = ChunkConfig()
    top_k: int = 5
    """Chunks each query of each head picks; 0 leaves the anchors alone."""
    self_anchor: Literal["shot", "chunk", "window", "none"] = "shot"
    """Video always attended: the own shot, the own chunk, the own chunk and its neighbours, or nothing."""
    window: int = 1
    """Chunks on either side of the own one, within the shot, for `self_anchor = window`."""
    text_anchor: Literal["all", "own+global", "none"] = "all"
    """Captions each video query always attends to."""
    causal_routing: bool = True
    """Only chunks before the query's own may be picked, so that shots cannot lock onto each other."""
    visibility: Literal["scene", "past"] = "scene"
    """`scene`: joint denoising; `past`: a shot sees only the global caption and shots up to itself."""
    drop_off_max: float = 0.5
    """Training: p ~ U(0, drop_off_max); of the k picks that a query holds, floor(p * k) random ones are dropped."""
    drop_in_rate: float = 0.5
    """Training: Poisson rate of further random candidates added per query."""
    max_drop_in: int = 2
    """Training: static slots for drop-in; more than this many are cut."""
    backend: Literal["auto", "reference", "xla", "pallas_gpu", "pallas_tpu"] = "auto"
    """`reference` is the dense-mask float32 oracle; `xla` runs on any device with memory linear in tokens;
    `pallas_gpu` has kernels for Hopper GPUs, `pallas_tpu` for TPUs, and `auto` takes them there."""

    def __post_init__(self):
        check(self.top_k >= 0, f"moc.top_k is {self.top_k}; it counts chunks, so it must be 0 or more")
        check(self.window >= 0, f"moc.window is {self.window}; it counts chunks, so it must be 0 or more")
        check(0 <= self.drop_off_max <= 1, f"moc.drop_off_max is {self.drop_off_max}; it is a fraction in [0, 1]")
        check(self.drop_in_rate >= 0, f"moc.drop_in_rate is {self.drop_in_rate}; a Poisson rate is 0 or more")
        check(self.max_drop_in >= 0, f"moc.max_drop_in is {self.max_drop_in}; it counts slots, so it must be 0 or more")
        anchored = self.self_anchor != "none" or self.text_anchor != "none" or self.top_k > 0
        check(
            anchored or self.mode == "dense",
            "moc.self_anchor = none, moc.text_anchor = none and moc.top_k = 0 leave a query nothing to attend to; "
            "set at least one of them",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The multi-modal diffusion transformer: separate text and video weights, joint attention (LCT, SD3)."""

    dim: int = 256
    """Width of a token."""
    depth: int = 6
    """Blocks."""
    heads: int = 4
    """Attention heads, of size dim / heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over `dim`."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns per token."""
    latent_channels: int = 16
    """Channels of the codec's latents."""
    text_dim: int = 256
    """Width of the text encoder's embeddings."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies; smaller tells near positions apart sooner."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type of matrix products; parameters, norms' statistics and modulation stay float32."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass recomputes: nothing, all but matrix products, or whole blocks."""

    def __post_init__(self):
        for name in ("dim", "depth", "heads", "latent_channels", "text_dim"):
            check(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        check(
            len(self.patch) == 3 and min(self.patch) >= 1,
            f"model.patch is {self.patch}; give three sizes >= 1 (t, h, w)",
        )
        check(self.mlp_dim >= 1, f"model.mlp_ratio is {self.mlp_ratio}; mlp_ratio x dim must be at least 1")
        check(self.rope_theta > 1, f"model.rope_theta is {self.rope_theta}; the base of the frequencies is above 1")
        check(
            self.dim % self.heads == 0,
            f"model.dim = {self.dim} is no multiple of model.heads = {self.heads}; "
            f"try dim {self.heads * math.ceil(self.dim / self.heads)}",
        )
        check(
            self.head_dim % 2 == 0 and self.head_dim >= 6,
            f"head size model.dim / model.heads = {self.head_dim}; rotary embedding needs an even size of at least 6",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def mlp_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)

    @property
    def patch_size(self) -> int:
        return math.prod(self.patch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Video <-> latents."""

    name: Literal["pca"] = "pca"
    """`pca`: linear autoencoder of space-time patches, fitted in closed form on the training clips."""
    stride: tuple[int, int, int] = (4, 8, 8)
    """Frames, rows and columns per latent; the first frame stands alone, so clips have stride * n + 1 frames."""
    channels: int = 16
    """Latent channels."""
    whiten: float = 0.5
    """Latents are divided by std ** whiten per channel: 0 keeps pixel energy, 1 makes all channels unit variance."""

    def __post_init__(self):
        check(len(self.stride) == 3 and min(self.stride) >= 1, f"codec.stride is {self.stride}; give three sizes >= 1")
        limit = 3 * self.stride[1] * self.stride[2]
        check(
            1 <= self.channels <= limit,
            f"codec.channels = {self.channels}; one frame's patch of {self.stride[1]}x{self.stride[2]}x3 pixels "
            f"has only {limit} components, so it must lie in 1..{limit}",
        )
        check(0 <= self.whiten <= 1, f"codec.whiten is {self.whiten}; it is an exponent in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Caption -> embeddings."""

    name: Literal["hash"] = "hash"
    """`hash`: each word, in any language, is hashed to a fixed random vector; nothing to download."""
    dim: int = 256
    """Width of an embedding."""
    max_tokens: int = 64
    """The longest caption, in tokens; a longer one is an error."""

    def __post_init__(self):
        check(self.dim >= 1, f"text.dim is {self.dim}; it must be at least 1")
        check(self.max_tokens >= 1, f"text.max_tokens is {self.max_tokens}; it must be at least 1")
