"""Every setting of the project, as frozen, keyword-only values that are checked when they are built.

No arrays and no jax here: a config is made, read, overridden and written before any device is touched. `moc-train`
exposes each field on the command line (`--moc.top-k 3`), with the comment below the field as its help.
"""

import dataclasses

from moc_jax.config.base import INT32, ConfigError, OptionalPath, OwnFolder, Settings, check
from moc_jax.config.network import (
    ChunkConfig,
    CodecConfig,
    HashConfig,
    MMDiTConfig,
    MoCConfig,
    ModelConfig,
    PcaConfig,
    Remat,
    TextConfig,
)
from moc_jax.config.reference import Reference
from moc_jax.config.run import (
    AttentionConfig,
    BucketConfig,
    ChunkStage,
    DataConfig,
    DiffusionConfig,
    MeshConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)

__all__ = [
    "AttentionConfig",
    "BucketConfig",
    "ChunkConfig",
    "ChunkStage",
    "CodecConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "HashConfig",
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
    "TrainConfig",
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

    workdir: OwnFolder = "out/run"
    """Checkpoints, logs, previews and the resolved config go here."""
    compilation_cache: OptionalPath = "auto"
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

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        return self.data.height // self.codec.stride[1], self.data.width // self.codec.stride[2]

    def stages(self, begin: int) -> list[Stage]:
        """The stages of the schedule from batch `begin` on; at least one, however late that is."""
        later = sorted({stage.step for stage in self.train.chunk_schedule if begin < stage.step < self.train.steps})
        ends = [*later, max(self.train.steps, begin + 1)]
        return [Stage(first, end, self.moc_at(first)) for first, end in zip([begin, *later], ends)]

    def moc_at(self, step: int) -> MoCConfig:
        """The attention of batch `step` (from 0): `moc`, with the chunk size of the schedule's stage."""
        sizes = [stage.size for stage in self.train.chunk_schedule if stage.step <= step]
        if not sizes:
            return self.moc
        return dataclasses.replace(self.moc, chunk=dataclasses.replace(self.moc.chunk, size=sizes[-1]))
