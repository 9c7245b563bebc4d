"""Every setting of the project, as frozen, keyword-only values that are checked when they are built.

No arrays and no jax here: a config is made, read, overridden and written before any device is touched. `moc-train`
exposes each field on the command line (`--moc.top-k 3`), with the comment below the field as its help.
"""

import dataclasses
import math

from moc_jax.config.base import INT32, ConfigError, OptionalPlace, Settings, Workdir, check
from moc_jax.config.lora import LoraConfig
from moc_jax.config.network import (
    PLACES,
    TRADES,
    ChunkConfig,
    CodecConfig,
    HashConfig,
    MMDiTConfig,
    MoCConfig,
    ModelConfig,
    PcaConfig,
    Remat,
    TextConfig,
    TopKStage,
    Umt5Config,
    WanConfig,
    WanVaeConfig,
)
from moc_jax.config.reference import Reference
from moc_jax.config.run import (
    AttentionConfig,
    BucketConfig,
    ChunkStage,
    DataConfig,
    DiffusionConfig,
    ExchangeKind,
    FilterConfig,
    MeshConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)

__all__ = [
    "PLACES",
    "TRADES",
    "AttentionConfig",
    "BucketConfig",
    "ChunkConfig",
    "ChunkStage",
    "CodecConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "ExchangeKind",
    "FilterConfig",
    "HashConfig",
    "LoraConfig",
    "MMDiTConfig",
    "MeshConfig",
    "MoCConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PcaConfig",
    "Reference",
    "Remat",
    "SampleConfig",
    "Stage",
    "TextConfig",
    "TopKStage",
    "TrainConfig",
    "Umt5Config",
    "WanConfig",
    "WanVaeConfig",
]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Batches [begin, end) of a run, all with one chunk size."""

    begin: int
    """The first batch, from 0."""
    end: int
    """Where the next stage begins, or the run ends."""
    moc: MoCConfig


_LARGEST_BATCH = 2**36  # numbers, over all devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """One experiment."""

    workdir: Workdir = "out/run"
    """Checkpoints, logs, previews and the resolved config go here."""
    compilation_cache: OptionalPlace = "auto"
    """Where compiled programs are kept, one folder for all hosts; `auto`: moc_jax/programs in the user's cache folder,
    or JAX_COMPILATION_CACHE_DIR; empty: nowhere."""
    moc: MoCConfig = MoCConfig()
    attention: AttentionConfig = AttentionConfig()
    model: ModelConfig = MMDiTConfig()
    codec: CodecConfig = PcaConfig()
    text: TextConfig = HashConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def check_together(self):
        check(
            self.model.latent_channels == self.codec.channels,
            f"model.latent_channels = {self.model.latent_channels}, but codec.channels = {self.codec.channels}; "
            "set both to the same",
        )
        check(
            self.model.text_dim == self.text.dim,
            f"model.text_dim = {self.model.text_dim}, but text.dim = {self.text.dim}; set both to the same",
        )
        check(
            self.data.height % 2 == 0 and self.data.width % 2 == 0,
            f"data.height x width is {self.data.height}x{self.data.width}; videos are written with even sizes only",
        )
        for name, axis in (("height", 1), ("width", 2)):
            size, unit = getattr(self.data, name), self.codec.stride[axis] * self.model.patch[axis]
            low = max(unit, size // unit * unit)
            check(
                size % unit == 0,
                f"data.{name} = {size} does not divide by {unit} (codec.stride {self.codec.stride[axis]} x "
                f"model.patch {self.model.patch[axis]}); the nearest that do are {low} and {low + unit}",
            )
        for bucket in self.data.buckets:
            self._check_bucket(bucket)
        self._check_first_frames()
        self._check_dense_layers()
        moc, taught = self.moc, self.diffusion.teacher_forcing
        check(
            not taught or (moc.visibility == "past" and (moc.mode == "dense" or moc.self_anchor == "shot")),
            f"diffusion.teacher_forcing needs moc.visibility past and moc.self_anchor shot, so that shots read nothing "
            f"of each other but history; they are {moc.visibility} and {moc.self_anchor}",
        )
        check(
            not taught or self.attention.exchange != "dispatch",
            "attention.exchange = dispatch, but diffusion.teacher_forcing gathers keys; set gather or auto",
        )

    def _check_first_frames(self) -> None:
        read, given = self.condition_channels, self.codec.stride[0] + self.codec.channels
        check(
            read in (0, given),
            f"model.condition_channels = {read}, but a mask of codec.stride[0] = {self.codec.stride[0]} frames and "
            f"codec.channels = {self.codec.channels} latents are {given} channels; set that, or 0",
        )
        check(
            self.model.patch[0] == 1 or not (self.sample.first_frames == "clean" or self.clean_first_frames),
            f"first frames given clean need tokens of one latent frame, but model.patch is {self.model.patch}: "
            "set sample.first_frames noised and data.first_frames 0, or another patch",
        )
        check(
            not (self.diffusion.teacher_forcing and (self.data.first_frames or read)),
            "diffusion.teacher_forcing shows a scene's clean shots, and no first frames: set data.first_frames 0 and "
            "model.condition_channels 0, or teacher_forcing off",
        )

    def _check_dense_layers(self) -> None:
        layers = self.moc.dense_layers
        check(
            not layers or max(layers) < self.model.depth,
            f"moc.dense_layers = {list(layers)}; {self.model.name} has {self.model.depth} blocks, from 0",
        )

    def _check_bucket(self, bucket: BucketConfig) -> None:
        """A scene's arrays are indexed, and its tokens numbered, by 32-bit numbers."""
        rows, columns = self.latent_size
        numbers = bucket.frames * rows * columns * self.codec.channels
        check(
            numbers <= INT32,
            f"data.buckets: {bucket.frames} frames of {rows}x{columns} latents with {self.codec.channels} channels are "
            f"{numbers:,} numbers per scene; at most {INT32:,} are possible: give fewer frames, or a smaller "
            "data.height x data.width",
        )
        numbers = bucket.text_tokens * self.text.dim
        check(
            numbers <= INT32,
            f"data.buckets: {bucket.text_tokens} text tokens of text.dim {self.text.dim} are {numbers:,} numbers per "
            f"scene; at most {INT32:,} are possible: give fewer text tokens",
        )
        most = self.train.batch_size * max(bucket.frames * rows * columns * self.codec.channels, numbers)
        check(
            most <= _LARGEST_BATCH,
            f"train.batch_size {self.train.batch_size} scenes of a bucket of {bucket.frames} frames are {most:,} "
            f"numbers; at most {_LARGEST_BATCH:,} are possible: give a smaller batch or smaller data.buckets",
        )

    def with_weights(self, *, codec: str = "", text: str = "", tokenizer: str = "") -> "Config":
        """The same, with the public weights of codec and text encoder, if they have any, in other places; empty: where
        they were."""
        if isinstance(self.codec, WanVaeConfig):
            self = dataclasses.replace(self, codec=dataclasses.replace(self.codec, weights=codec or self.codec.weights))
        if isinstance(own := self.text, Umt5Config):
            moved = dataclasses.replace(own, weights=text or own.weights, tokenizer=tokenizer or own.tokenizer)
            self = dataclasses.replace(self, text=moved)
        return self

    @property
    def condition_channels(self) -> int:
        """Channels beside the latents' that the model reads."""
        return getattr(self.model, "condition_channels", 0)

    @property
    def clean_first_frames(self) -> bool:
        """Whether training gives first frames clean."""
        return self.data.first_frames > 0 and not self.condition_channels

    @property
    def training_exchange(self) -> ExchangeKind:
        """`attention.exchange` of training: teacher forcing gathers keys."""
        return "gather" if self.diffusion.teacher_forcing else self.attention.exchange

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        return self.data.height // self.codec.stride[1], self.data.width // self.codec.stride[2]

    @property
    def tokens_per_frame(self) -> float:
        """Video tokens of a latent frame; with patches of several frames it need not be whole."""
        return math.prod(self.latent_size) / math.prod(self.model.patch)

    def stages(self, begin: int) -> list[Stage]:
        """The stages of the schedule from batch `begin` on; at least one, however late that is."""
        later = sorted({stage.step for stage in self.train.chunk_schedule if begin < stage.step < self.train.steps})
        ends = [*later, max(self.train.steps, begin + 1)]
        return [Stage(first, end, self.moc_at(first)) for first, end in zip([begin, *later], ends)]

    def moc_at(self, step: int) -> MoCConfig:
        """The attention of batch `step` (from 0): `moc`, with chunk size and picks of the schedule's stage."""
        stages = [stage for stage in self.train.chunk_schedule if stage.step <= step]
        if not stages:
            return self.moc
        chunk = dataclasses.replace(self.moc.chunk, size=stages[-1].size)
        top_k = self.moc.top_k if stages[-1].top_k < 0 else stages[-1].top_k
        return dataclasses.replace(self.moc, chunk=chunk, top_k=top_k)
