"""Settings of a run: data, diffusion, sampling, optimizer, training, mesh."""

import dataclasses
import math
from typing import Literal

from moc_jax.config.base import check


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
            check(getattr(self, name) >= 1, f"data.buckets: {name} is {getattr(self, name)}; it must be at least 1")


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
        check(
            self.height >= 1 and self.width >= 1,
            f"data.height x width is {self.height}x{self.width}; both must be at least 1",
        )
        check(0 < self.fps < math.inf, f"data.fps is {self.fps}; it must be positive and finite")
        check(self.shot_threshold > 0, f"data.shot_threshold is {self.shot_threshold}; it must be positive")
        for name in ("caption_dropout", "image_conditioning", "validation_fraction"):
            check(0 <= getattr(self, name) <= 1, f"data.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        check(self.shots_per_scene >= 1, f"data.shots_per_scene is {self.shots_per_scene}; it must be at least 1")
        check(self.min_shot_frames >= 1, f"data.min_shot_frames is {self.min_shot_frames}; it must be at least 1")
        check(self.max_shot_frames >= 0, f"data.max_shot_frames is {self.max_shot_frames}; 0 means no limit")
        check(self.keyframes >= 1, f"data.keyframes is {self.keyframes}; it must be at least 1")


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
        check(self.t_std > 0, f"diffusion.t_std is {self.t_std}; it must be positive")
        check(self.t_shift > 0, f"diffusion.t_shift is {self.t_shift}; it must be positive")
        check(
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
        check(self.steps >= 1, f"sample.steps is {self.steps}; it must be at least 1")
        check(self.guidance >= 0, f"sample.guidance is {self.guidance}; it must be 0 or more")
        check(0 <= self.history_noise < 1, f"sample.history_noise is {self.history_noise}; it must lie in [0, 1)")
        check(self.shift > 0, f"sample.shift is {self.shift}; it must be positive")
        check(0 <= self.seed < 2**32, f"sample.seed is {self.seed}; it must lie in 0..{2**32 - 1}")


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
    """Batches that make one update, as one larger batch would."""

    def __post_init__(self):
        check(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        check(self.eps > 0, f"optimizer.eps is {self.eps}; it must be positive")
        check(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}; it must be 0 or more")
        check(self.accumulate >= 1, f"optimizer.accumulate is {self.accumulate}; it must be at least 1")
        check(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it must be 0 or more")
        check(
            0 <= self.final_fraction <= 1, f"optimizer.final_fraction is {self.final_fraction}; it must lie in [0, 1]"
        )
        check(self.clip_norm >= 0, f"optimizer.clip_norm is {self.clip_norm}; 0 means no clipping")
        check(
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
    """Batches to train on; `optimizer.accumulate` of them make one update."""
    batch_size: int = 1
    """Scenes per step, over all processes and devices."""
    seed: int = 0
    """Fixes initial weights, data order, timesteps and noise."""
    init_from: str = ""
    """Another run's workdir or checkpoint: a new run starts from its weights (the average, if kept) and its codec."""
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
        check(self.steps >= 1, f"train.steps is {self.steps}; it must be at least 1")
        check(self.batch_size >= 1, f"train.batch_size is {self.batch_size}; it must be at least 1")
        check(0 <= self.ema_decay < 1, f"train.ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        for name in ("log_every", "checkpoint_every", "validation_buckets"):
            check(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("validate_every", "preview_every", "keep_every"):
            check(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; 0 means never")
        check(
            self.keep_last >= 1,
            f"train.keep_last is {self.keep_last}; it must be at least 1, or nothing could be resumed",
        )
        steps = [stage.step for stage in self.chunk_schedule]
        check(
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
    heartbeat: int = 100
    """Seconds without a sign of life after which a process is lost."""

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.context, self.tensor)
        check(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes are {sizes}; each is at least 1, and one may be -1",
        )
        check(
            self.context == 1 and self.tensor == 1,
            f"mesh.context = {self.context} and mesh.tensor = {self.tensor}; these axes are named but "
            "not built yet: leave them at 1",
        )
        check(self.num_processes >= 0, f"mesh.num_processes is {self.num_processes}; 0 leaves it to the cluster")
        check(
            2 <= self.heartbeat <= 86_400,
            f"mesh.heartbeat is {self.heartbeat}; it must lie in 2..86400, in seconds (100 suits most clusters)",
        )
        check(self.process_id >= -1, f"mesh.process_id is {self.process_id}; -1 leaves it to the cluster")
        check(
            not self.num_processes or self.process_id < self.num_processes,
            f"mesh.process_id is {self.process_id}, but with mesh.num_processes {self.num_processes} it must lie in "
            f"0..{self.num_processes - 1}",
        )
        check(
            self.distributed or not (self.coordinator or self.num_processes or self.process_id != -1),
            "mesh.coordinator, num_processes and process_id say how processes find each other, but mesh.distributed is "
            "False; add --mesh.distributed True, or leave them out",
        )
