"""Every setting of the project, as frozen, keyword-only values that are checked when they are built.

No arrays and no jax here: a config is made, read, overridden and written before any device is touched. `train.py`
and `sample.py` expose each field on the command line (`--moc.top-k 3`), with the comment below the field as its help.
"""

import dataclasses
import math
from typing import Literal


class ConfigError(ValueError):
    """A setting that can't be: the message names the value, the limit and the fix."""


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


# ------------------------------------------------------------------------------------------------ attention


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
        _check(self.size >= 1, f"moc.chunk.size is {self.size}; it must be at least 1 ({self.unit} per chunk)")


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
    """Training: p ~ U(0, drop_off_max); floor(p * top_k) random picks are dropped per query."""
    drop_in_rate: float = 0.5
    """Training: Poisson rate of further random candidates added per query."""
    max_drop_in: int = 2
    """Training: static slots for drop-in; more than this many are cut."""
    backend: Literal["auto", "reference", "xla"] = "auto"
    """`reference` is the dense-mask float32 oracle; `xla` runs on any device with memory linear in tokens."""

    def __post_init__(self):
        _check(self.top_k >= 0, f"moc.top_k is {self.top_k}; it counts chunks, so it must be 0 or more")
        _check(self.window >= 0, f"moc.window is {self.window}; it counts chunks, so it must be 0 or more")
        _check(0 <= self.drop_off_max <= 1, f"moc.drop_off_max is {self.drop_off_max}; it is a fraction in [0, 1]")
        _check(self.drop_in_rate >= 0, f"moc.drop_in_rate is {self.drop_in_rate}; a Poisson rate is 0 or more")
        _check(
            self.max_drop_in >= 0, f"moc.max_drop_in is {self.max_drop_in}; it counts slots, so it must be 0 or more"
        )
        anchored = self.self_anchor != "none" or self.text_anchor != "none" or self.top_k > 0
        _check(
            anchored or self.mode == "dense",
            "moc.self_anchor = none, moc.text_anchor = none and moc.top_k = 0 leave a query nothing to attend to; "
            "set at least one of them",
        )


# ------------------------------------------------------------------------------------------------ model


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
            _check(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        _check(
            len(self.patch) == 3 and min(self.patch) >= 1,
            f"model.patch is {self.patch}; give three sizes >= 1 (t, h, w)",
        )
        _check(
            self.dim % self.heads == 0,
            f"model.dim = {self.dim} is no multiple of model.heads = {self.heads}; try dim {self.heads * math.ceil(self.dim / self.heads)}",
        )
        _check(
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


# ------------------------------------------------------------------------------------------------ codec, text, data


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
        _check(len(self.stride) == 3 and min(self.stride) >= 1, f"codec.stride is {self.stride}; give three sizes >= 1")
        limit = 3 * self.stride[1] * self.stride[2]
        _check(
            1 <= self.channels <= limit,
            f"codec.channels = {self.channels}; one frame's patch of {self.stride[1]}x{self.stride[2]}x3 pixels "
            f"has only {limit} components, so it must lie in 1..{limit}",
        )
        _check(0 <= self.whiten <= 1, f"codec.whiten is {self.whiten}; it is an exponent in [0, 1]")


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
        _check(self.dim >= 1, f"text.dim is {self.dim}; it must be at least 1")
        _check(self.max_tokens >= 1, f"text.max_tokens is {self.max_tokens}; it must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """One static shape that scenes are padded to; each bucket compiles once."""

    shots: int = 8
    """The most shots."""
    frames: int = 64
    """The most latent frames, all shots together."""
    text_tokens: int = 256
    """The most text tokens, global caption and all shot captions together."""

    def __post_init__(self):
        for name in ("shots", "frames", "text_tokens"):
            _check(getattr(self, name) >= 1, f"data.buckets: {name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Video files -> scenes -> encoded shards -> batches."""

    source: tuple[str, ...] = ()
    """Video files or folders; a caption file `clip.yaml` or `clip.json` may lie beside `clip.mp4`."""
    validation_source: tuple[str, ...] = ()
    """Held-out video files or folders; empty: `validation_fraction` of the files is held out instead."""
    validation_fraction: float = 0.0
    """Share of files held out for validation, chosen by a hash of the file's name."""
    cache: str = "cache"
    """Folder of prepared folders (encoded shards and manifest), one per settings and sources; or itself one of them."""
    height: int = 64
    """Rows of a frame after resize and centre-crop, in pixels."""
    width: int = 160
    """Columns of a frame after resize and centre-crop, in pixels."""
    fps: float = 12.0
    """Frames per second after resampling."""
    min_shot_frames: int = 1
    """Shots with fewer frames (after resampling) are left out, and counted."""
    max_shot_frames: int = 0
    """Longer shots are cut off at this many frames; 0: no limit."""
    shot_threshold: float = 27.0
    """PySceneDetect ContentDetector's threshold: lower finds more cuts."""
    shots_per_scene: int = 8
    """A file with more shots becomes several scenes of at most this many."""
    default_caption: str = "a video"
    """Global caption of a file that has no caption file."""
    default_shot_caption: str = "shot {shot}"
    """Caption of a shot that has none; {shot} counts from 1, {file} is the file's name."""
    caption_dropout: float = 0.1
    """Chance that a scene is shown with empty captions, which is what guidance steers away from."""
    image_conditioning: float = 0.1
    """Chance per shot that it is replaced by one of its frames."""
    keyframes: int = 3
    """Frames per shot that are also encoded alone, for image conditioning."""
    buckets: tuple[BucketConfig, ...] = ()
    """Static shapes; empty: one bucket that fits every scene of the manifest."""
    workers: int = 0
    """Processes that read ahead; 0: read in the training process."""

    def __post_init__(self):
        _check(
            self.height >= 1 and self.width >= 1,
            f"data.height x width is {self.height}x{self.width}; both must be at least 1",
        )
        _check(self.fps > 0, f"data.fps is {self.fps}; it must be positive")
        for name in ("caption_dropout", "image_conditioning", "validation_fraction"):
            _check(0 <= getattr(self, name) <= 1, f"data.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        _check(self.shots_per_scene >= 1, f"data.shots_per_scene is {self.shots_per_scene}; it must be at least 1")
        _check(self.min_shot_frames >= 1, f"data.min_shot_frames is {self.min_shot_frames}; it must be at least 1")
        _check(self.max_shot_frames >= 0, f"data.max_shot_frames is {self.max_shot_frames}; 0 means no limit")
        _check(self.keyframes >= 1, f"data.keyframes is {self.keyframes}; it must be at least 1")


# ------------------------------------------------------------------------------------------------ diffusion, sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Rectified flow: z_t = (1 - t) z_0 + t noise, t in [0, 1], target noise - z_0."""

    t_mean: float = 0.0
    """Mean of the normal whose sigmoid is t."""
    t_std: float = 1.0
    """Its standard deviation."""
    t_shift: float = 1.0
    """Flow shift of training timesteps: t' = s t / (1 + (s - 1) t)."""
    joint_probability: float = 0.0
    """Chance that all shots of a scene share one t (joint denoising); else each shot draws its own."""

    def __post_init__(self):
        _check(self.t_std > 0, f"diffusion.t_std is {self.t_std}; it must be positive")
        _check(self.t_shift > 0, f"diffusion.t_shift is {self.t_shift}; it must be positive")
        _check(
            0 <= self.joint_probability <= 1,
            f"diffusion.joint_probability is {self.joint_probability}; it must lie in [0, 1]",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Noise -> video."""

    solver: Literal["euler", "heun", "unipc", "dpm++"] = "unipc"
    """Order 1, 2, 2 and 2; heun evaluates the model twice per step."""
    schedule: Literal["auto", "diffusers-unipc", "diffusers-euler", "wan-unipc", "wan-dpm++"] = "auto"
    """The grid of noise levels; `auto`: the one that the solver is published with."""
    steps: int = 30
    """Steps of the solver from noise to video."""
    guidance: float = 1.0
    """Classifier-free guidance: u + g (c - u); 1 switches it off and halves the cost."""
    shift: float = 3.0
    """Flow shift of the sampling grid: larger spends more steps at high noise."""
    negative_prompt: str = ""
    """Steered away from when guidance is not 1."""
    order: Literal["joint", "shots"] = "joint"
    """`joint`: all shots are denoised together; `shots`: one after another, each conditioned on those before it."""
    history_noise: float = 0.3
    """Noise level t_c at which given and earlier shots are shown to the model (LCT: 0.1 to 0.5)."""
    seed: int = 0
    """Fixes the noise of shots that give no seed of their own."""

    def __post_init__(self):
        _check(self.steps >= 1, f"sample.steps is {self.steps}; it must be at least 1")
        _check(self.guidance >= 0, f"sample.guidance is {self.guidance}; it must be 0 or more")
        _check(0 <= self.history_noise < 1, f"sample.history_noise is {self.history_noise}; it must lie in [0, 1)")
        _check(self.shift > 0, f"sample.shift is {self.shift}; it must be positive")
        _check(0 <= self.seed < 2**32, f"sample.seed is {self.seed}; it must lie in 0..{2**32 - 1}")


# ------------------------------------------------------------------------------------------------ training


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, decay, clipping and accumulation."""

    learning_rate: float = 9e-5
    """Peak, reached after the warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall as a cosine to `final_fraction` of the peak at the last step."""
    warmup_steps: int = 100
    """Updates over which the rate rises linearly from 0."""
    final_fraction: float = 0.0
    """Last rate over the peak, for `schedule = cosine`."""
    b1: float = 0.9
    """Decay of the gradients' mean."""
    b2: float = 0.95
    """Decay of the squared gradients' mean."""
    eps: float = 1e-8
    """Added to the root of the squared gradients' mean."""
    weight_decay: float = 0.01
    """Applies to matrices only: never to biases and norm scales."""
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0: no clipping."""
    accumulate: int = 1
    """Batches whose gradients are averaged before one update."""

    def __post_init__(self):
        _check(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        _check(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}; it must be 0 or more")
        _check(self.accumulate >= 1, f"optimizer.accumulate is {self.accumulate}; it must be at least 1")
        _check(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it must be 0 or more")
        _check(
            0 <= self.final_fraction <= 1, f"optimizer.final_fraction is {self.final_fraction}; it must lie in [0, 1]"
        )
        _check(self.clip_norm >= 0, f"optimizer.clip_norm is {self.clip_norm}; 0 means no clipping")
        _check(
            0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"optimizer.b1, b2 are {self.b1}, {self.b2}; both must lie in [0, 1)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkStage:
    """From `step` on, chunks have at most `size` frames or tokens (one compilation per stage)."""

    step: int
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run."""

    steps: int = 1000
    """Batches to train on; with `optimizer.accumulate` several of them make one update."""
    batch_size: int = 1
    """Scenes per step, over all processes and devices."""
    seed: int = 0
    """Fixes initial weights, data order, timesteps and noise."""
    ema_decay: float = 0.999
    """Weights' moving average, warmed up as min(decay, (1 + step) / (10 + step)); 0: off."""
    chunk_schedule: tuple[ChunkStage, ...] = ()
    """Chunk size by step, overriding `moc.chunk.size`; empty: constant."""
    log_every: int = 10
    """Steps between TensorBoard points; metrics.jsonl holds every step."""
    validate_every: int = 0
    """Steps between validation losses; 0: never."""
    validation_buckets: int = 8
    """Fixed timesteps (bucket centres in (0, 1)) at which validation loss is measured."""
    preview_every: int = 0
    """Steps between preview videos; 0: never."""
    preview_storyboard: str = ""
    """Storyboard for previews; empty: the first training scene's captions."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and on SIGTERM."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good; 0: none."""

    def __post_init__(self):
        _check(self.steps >= 1, f"train.steps is {self.steps}; it must be at least 1")
        _check(self.batch_size >= 1, f"train.batch_size is {self.batch_size}; it must be at least 1")
        _check(0 <= self.ema_decay < 1, f"train.ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        for name in ("log_every", "checkpoint_every", "validation_buckets"):
            _check(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("validate_every", "preview_every", "keep_every"):
            _check(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; 0 means never")
        _check(
            self.keep_last >= 1,
            f"train.keep_last is {self.keep_last}; it must be at least 1, or nothing could be resumed",
        )
        steps = [stage.step for stage in self.chunk_schedule]
        _check(
            steps == sorted(set(steps))
            and all(s >= 0 for s in steps)
            and all(c.size >= 1 for c in self.chunk_schedule),
            f"train.chunk_schedule has steps {steps}; steps must rise from 0 or more and sizes be at least 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; the product is the number of devices. -1 (once): all that are left."""

    data: int = -1
    """Copies of the weights; the batch is split."""
    fsdp: int = 1
    """Weights, optimizer state and batch are split."""
    context: int = 1
    """Tokens of one scene are split (reserved: must be 1)."""
    tensor: int = 1
    """Heads and MLP width are split (reserved: must be 1)."""
    distributed: bool = False
    """Call jax.distributed.initialize at start (several hosts)."""
    coordinator: str = ""
    """host:port of process 0; empty: found by the cluster's own environment."""
    num_processes: int = 0
    """Processes in all; 0: found by the cluster's own environment."""
    process_id: int = -1
    """This process, from 0; -1: found by the cluster's own environment."""

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.context, self.tensor)
        _check(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes are {sizes}; each is at least 1, and one may be -1",
        )
        _check(
            self.context == 1 and self.tensor == 1,
            f"mesh.context = {self.context} and mesh.tensor = {self.tensor}; these axes are named but not built yet: leave them at 1",
        )


# ------------------------------------------------------------------------------------------------ the whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    workdir: str = "out/run"
    """Checkpoints, logs, previews and the resolved config go here."""
    moc: MoCConfig = MoCConfig()
    model: ModelConfig = ModelConfig()
    codec: CodecConfig = CodecConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        _check(
            self.model.latent_channels == self.codec.channels,
            f"model.latent_channels = {self.model.latent_channels}, but codec.channels = {self.codec.channels}; set both to the same",
        )
        _check(
            self.model.text_dim == self.text.dim,
            f"model.text_dim = {self.model.text_dim}, but text.dim = {self.text.dim}; set both to the same",
        )
        for name, axis in (("height", 1), ("width", 2)):
            size, unit = getattr(self.data, name), self.codec.stride[axis] * self.model.patch[axis]
            low = max(unit, size // unit * unit)
            _check(
                size % unit == 0,
                f"data.{name} = {size} does not divide by {unit} (codec.stride {self.codec.stride[axis]} x "
                f"model.patch {self.model.patch[axis]}); the nearest that do are {low} and {low + unit}",
            )

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        return self.data.height // self.codec.stride[1], self.data.width // self.codec.stride[2]
