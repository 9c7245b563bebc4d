"""Settings of the network: attention, transformer, codec, text encoder. They belong to the weights."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

from moc_jax.config.base import Count, Fraction, Natural, OptionalPath, Range, Settings, Size, Stride, check
from moc_jax.config.lora import LoraConfig

_WIDEST = 2**20  # numbers that one token is made of
_MOST_WEIGHTS = 10**13
_LARGEST_PATCH = 2**14  # its covariance takes 2 GiB

Remat = Literal["auto", "none", "dots", "qkv+attention+mlp", "attention+mlp", "attention", "full"]


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
class TopKStage(Settings, at="moc.top_k_schedule"):
    """Sampling: from a noise level on, another number of picks."""

    timestep: Annotated[int, Range(0, 1000)]
    """The noise level in thousandths; 1000 is pure noise."""
    top_k: Annotated[int, Range(0, 2**20, "chunks")]
    """Chunks each query of each head picks there."""


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
    sink_chunks: Annotated[int, Range(0, 2**20, "chunks")] = 0
    """So many chunks at the beginning of each shot that all later shots attend to, beside what they pick."""
    text_anchor: Literal["all", "own+global", "none"] = "all"
    """Captions each video query always attends to."""
    descriptors: Annotated[int, Range(1, 16)] = 1
    """Means of keys that stand for a chunk: of the whole, or of so many equal runs of its tokens, the best of which
    counts."""
    causal_routing: bool = True
    """Only chunks before the query's own may be picked, so that shots cannot lock onto each other."""
    visibility: Literal["scene", "past", "own", "before"] = "scene"
    """`scene`: joint denoising; `past`: a shot sees only the global caption and shots up to itself. The halves of this:
    `own`, the global caption and itself; and `before`, the shots before it."""
    drop_off_max: Fraction = 0.5
    """Training: p ~ U(0, drop_off_max); of the k picks that a query holds, floor(p * k) random ones are dropped."""
    drop_in_rate: Annotated[float, Range(0, 1e6)] = 0.5
    """Training: Poisson rate of further random candidates added per query."""
    max_drop_in: Annotated[int, Range(0, 2**10, "chunks")] = 2
    """Training: the most chunks that drop-in adds to a query; more are cut."""
    dense_layers: tuple[Natural, ...] = ()
    """Blocks, from 0, whose attention is dense."""
    dense_first_steps: Natural = 0
    """Sampling: so many noise levels, the highest, are dense."""
    dense_last_steps: Natural = 0
    """Sampling: and so many of the lowest."""
    top_k_schedule: tuple[TopKStage, ...] = ()
    """Sampling: `top_k` by noise level, as `timestep:top_k`; of the stages that a level reaches the highest counts, and
    where it reaches none, `top_k`."""

    def check_together(self):
        anchored = self.self_anchor != "none" or self.text_anchor != "none" or self.top_k > 0
        check(
            anchored or self.mode == "dense",
            "moc.self_anchor = none, moc.text_anchor = none and moc.top_k = 0 leave a query nothing to attend to; "
            "set at least one of them",
        )
        check(
            self.sink_chunks == 0 or (self.self_anchor == "shot" and self.causal_routing),
            f"moc.sink_chunks = {self.sink_chunks} needs moc.self_anchor = shot and moc.causal_routing = true, so that "
            "no query picks what it attends to anyway; set these, or sink_chunks = 0",
        )
        timesteps = [stage.timestep for stage in self.top_k_schedule]
        check(
            timesteps == sorted(set(timesteps)),
            f"moc.top_k_schedule has the timesteps {timesteps}; they must rise",
        )

    def most_picks(self, shots: int) -> int:
        """Chunks that a query holds at most in training, in a scene of so many shots: its own picks, and the sinks."""
        if self.mode == "dense":
            return 0
        return (self.top_k + self.max_drop_in if self.top_k else 0) + self.sink_chunks * (shots - 1)

    def at_step(self, step: int, steps: int, level: float) -> "MoCConfig":
        """What the model attends to at the noise level of a step of sampling, from 0 to `steps` - 1."""
        dense = step < self.dense_first_steps or step >= steps - self.dense_last_steps
        picks = [stage.top_k for stage in self.top_k_schedule if level * 1000 >= stage.timestep]
        return dataclasses.replace(
            self,
            mode="dense" if dense else self.mode,
            top_k=picks[-1] if picks else self.top_k,
            dense_first_steps=0,
            dense_last_steps=0,
            top_k_schedule=(),
        )


def _check_heads(dim: int, heads: int) -> None:
    check(
        dim % heads == 0,
        f"model.dim = {dim} is not a multiple of model.heads = {heads}; try dim {heads * math.ceil(dim / heads)}",
    )
    check(
        dim // heads % 2 == 0 and dim // heads >= 6,
        f"head size model.dim / model.heads = {dim // heads}; rotary embedding needs an even size of at least 6",
    )


def _check_patch(patch: tuple[int, int, int], channels: int) -> None:
    width = math.prod(patch) * channels
    check(
        width <= _WIDEST,
        f"model.patch {patch} x model.latent_channels {channels} are {width:,} numbers per token; "
        f"at most {_WIDEST:,} are possible: choose a smaller patch",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDiTConfig(Settings, at="model"):
    """The multi-modal diffusion transformer: separate text and video weights, joint attention (LCT, SD3)."""

    joint_text: ClassVar[bool] = True
    """Captions are tokens that attention is over."""
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
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients of weights are summed in, over tokens and over devices; bfloat16 halves what devices exchange for
    them."""
    remat: Remat = "auto"
    """What of a block the backward pass finds kept and does not recompute: all (`none`); attention with its routing and
    beside it matrix products (`dots`), the MLP's output (`attention+mlp`), with it the heads that devices exchanged
    (`qkv+attention+mlp`), or no more (`attention`); nothing (`full`). `auto`: the fastest of these, `none` and
    `qkv+attention+mlp` aside, that fits the device when a run begins; outside of runs, `full`."""
    scan_layers: bool = True
    """Whether a program holds one block, run in a loop. Otherwise each layer has its own copy: longer to compile, and
    faster in small models that keep much for the backward pass, as no arrays of all layers are written."""
    lora: LoraConfig = LoraConfig()

    def check_together(self):
        check(self.mlp_dim >= 1, f"model.mlp_ratio is {self.mlp_ratio}; mlp_ratio x dim must be at least 1")
        _check_heads(self.dim, self.heads)
        _check_patch(self.patch, self.latent_channels)
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
class WanConfig(Settings, at="model"):
    """The transformer of Wan 2.1 and 2.2: one stream of video, which reads captions by cross-attention.

    `moc_jax.config.presets` has the published sizes.
    """

    joint_text: ClassVar[bool] = False
    """They are not: blocks read them apart."""
    name: Literal["wan"] = "wan"
    """`wan`: the transformer of Wan 2.1 and 2.2, whose public weights fit it."""
    dim: Size = 256
    """Width of a token."""
    depth: Annotated[int, Range(1, 2**12)] = 6
    """Blocks."""
    heads: Size = 4
    """Attention heads, of size dim / heads."""
    mlp_dim: Annotated[int, Range(1, 2**20)] = 1024
    """Hidden width of the MLP."""
    patch: tuple[Stride, Stride, Stride] = (1, 2, 2)
    """Latent frames, rows and columns per token."""
    latent_channels: Size = 16
    """Channels of the codec's latents."""
    condition_channels: Annotated[int, Range(0, 2**16)] = 0
    """Channels beside the latents' that the model reads: 20 in Wan 2.2 I2V A14B, a mask of 4 and 16 of a frame."""
    text_dim: Size = 256
    """Width of the text encoder's embeddings."""
    text_rows: Annotated[int, Range(0, 2**20, "0: none is padded")] = 512
    """Rows that each caption is padded to with zeros, which cross-attention reads as any other."""
    boundary: Annotated[float, Range(0, 1, "0: one model for all noise levels")] = 0.0
    """Two models in one, the experts of Wan 2.2 A14B: from this noise level on the one for high noise, below it the one
    for low noise. The noisiest shot of a scene decides, in sampling of those that are denoised."""
    positions: Literal["time", "diagonal"] = "time"
    """Rotary positions of shots: one behind another in `time`, rows and columns where Wan has them, or along the
    `diagonal` of all three."""
    shot_offset: Annotated[int, Range(0, 1024, "latent frames")] = 8
    """With `time`: by how much more than a frame's step time advances where a shot begins."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type of matrix products; norms' statistics, modulation, time embedding and head stay float32."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """As in `mmdit`."""
    remat: Remat = "auto"
    """As in `mmdit`."""
    scan_layers: bool = True
    """As in `mmdit`."""
    lora: LoraConfig = LoraConfig()

    def check_together(self):
        _check_heads(self.dim, self.heads)
        _check_patch(self.patch, self.latent_channels + self.condition_channels)
        weights = self.depth * self.dim * (8 * self.dim + 2 * self.mlp_dim) * (2 if self.boundary else 1)
        check(
            weights <= _MOST_WEIGHTS,
            f"model.depth {self.depth}, model.dim {self.dim} and model.mlp_dim {self.mlp_dim} make about "
            f"{weights:.2g} parameters; at most {_MOST_WEIGHTS:.2g} are possible: choose smaller ones",
        )

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.dim // self.heads

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
class WanVaeConfig(Settings, at="codec"):
    """Video <-> latents by the autoencoder of Wan 2.1 or 2.2, whose weights lie in files."""

    name: Literal["wan_vae"] = "wan_vae"
    """`wan_vae`: the causal autoencoder of Wan, from public weights."""
    version: Literal["2.1", "2.2"] = "2.1"
    """`2.1`: 8x8 pixels of 4 frames to 16 channels, also of Wan 2.2 A14B; `2.2`: 16x16 to 48, of Wan 2.2 TI2V 5B."""
    weights: OptionalPath = ""
    """Where they lie on this machine: a file, or a folder as diffusers or the Wan team has it."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type; norms' statistics and softmax stay float32."""
    piece: Annotated[int, Range(1, 64, "latent frames")] = 1
    """Encoded and decoded at a time, after the first: more take more memory."""
    tile: Annotated[int, Range(0, 2**14, "pixels; 0: whole frames")] = 0
    """Side of the tiles that frames are cut into where memory is short; tiles know nothing of each other."""
    overlap: Annotated[int, Range(0, 2**13, "pixels")] = 64
    """Of neighbouring tiles, over which one fades into the next."""
    batch: Annotated[int, Range(1, 1024, "clips")] = 4
    """Of one size, encoded together as data is prepared."""

    def check_together(self):
        unit = self.stride[1]
        for name in ("tile", "overlap"):
            size = getattr(self, name)
            check(
                size % unit == 0,
                f"codec.{name} = {size} is not a multiple of {unit}, the pixels of a latent's side; the nearest are "
                f"{size // unit * unit} and {size // unit * unit + unit}",
            )
        check(
            self.tile == 0 or self.overlap < self.tile,
            f"codec.overlap = {self.overlap} must be less than codec.tile = {self.tile}",
        )

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns per latent."""
        return (4, 8, 8) if self.version == "2.1" else (4, 16, 16)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return 16 if self.version == "2.1" else 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashConfig(Settings, at="text"):
    """Caption -> embeddings of hashed words."""

    name: Literal["hash"] = "hash"
    """`hash`: each word, in any language, is hashed to a fixed random vector; nothing to download."""
    dim: Size = 256
    """Width of an embedding."""
    max_tokens: Annotated[int, Range(1, 2**20)] = 64
    """The longest caption, in tokens; a longer one is an error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Umt5Config(Settings, at="text"):
    """Caption -> embeddings by umT5's encoder, whose weights lie in files."""

    name: Literal["umt5"] = "umt5"
    """`umt5`: the multilingual encoder that Wan's models read, umT5-XXL, from public weights."""
    weights: OptionalPath = ""
    """Where they lie on this machine: a file, or a folder as diffusers or the Wan team has it."""
    tokenizer: OptionalPath = ""
    """Its spiece.model, or a folder with it; empty: where it lies beside the weights."""
    dim: Size = 4096
    """Width of an embedding; umT5-XXL has 4096."""
    max_tokens: Annotated[int, Range(1, 512)] = 512
    """The longest caption, in tokens; a longer one is an error. Wan reads 512."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type, and that of embeddings; norms' statistics and softmax stay float32."""
    hold: Literal["auto", "devices", "layers"] = "auto"
    """`devices`: weights stay on this host's devices, which share them; `layers`: each layer's are read from the files
    whenever they are needed, for small memories. `auto`: devices, where they fit."""
    batch: Annotated[int, Range(1, 1024, "captions")] = 32
    """Encoded together as data is prepared."""


# Tagged unions: `name` says which kind it is, in Python, in JSON and on the command line. A new kind is a dataclass
# with a `name` of its own and a default for every field, joined here by |; models/, codecs/ and text/ say what it
# builds. Other modules rely on what all kinds of a union have: codecs `stride` and `channels`, encoders `dim`, models
# `latent_channels`, `text_dim`, `patch`, `dim`, `depth`, `heads`, `head_dim`, `mlp_dim`, `dtype`, `gradient_dtype`,
# `remat`, `scan_layers`, `lora` and `joint_text`.
ModelConfig = MMDiTConfig | WanConfig
CodecConfig = PcaConfig | WanVaeConfig
TextConfig = HashConfig | Umt5Config

PLACES = frozenset({"codec.weights", "text.weights", "text.tokenizer"})
"""Settings that say where weights lie on this machine; which they must be, checkpoints and prepared data say."""
TRADES = frozenset(
    {"model.remat", "model.scan_layers", "model.gradient_dtype"}
    | {"codec.piece", "codec.batch", "text.hold", "text.batch"}
)
"""Settings that trade memory, precision or time to compile for time."""
