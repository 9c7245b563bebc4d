"""Settings of a run: attention's backend, data, diffusion, sampling, optimizer, training, mesh."""

import dataclasses
import re
from typing import Annotated, Literal

from moc_jax.config.base import (
    INT32,
    Below1,
    Count,
    Every,
    Folder,
    Fraction,
    Natural,
    OptionalPath,
    OwnFolder,
    Range,
    Seed,
    Settings,
    check,
    shown,
)

Axis = Annotated[int, Range(-1, 2**20, "-1: all that are left")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketConfig(Settings, at="data.buckets"):
    """One static shape that scenes are padded to; each bucket compiles once."""

    shots: Annotated[int, Range(1, 2**20)] = 8
    """The most shots."""
    frames: Count = 64
    """The most latent frames, all shots together."""
    text_tokens: Count = 256
    """The most text tokens, global caption and all shot captions together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Settings, at="data"):
    """Video files -> scenes -> encoded shards -> batches."""

    source: tuple[Folder, ...] = ()
    """Video files or folders; a caption file `clip.yaml` or `clip.json` may lie beside `clip.mp4`."""
    validation_source: tuple[Folder, ...] = ()
    """Held-out video files or folders; empty: `validation_fraction` of the files is held out instead."""
    validation_fraction: Fraction = 0.0
    """Share of files held out for validation, chosen by a hash of the file's name."""
    cache: OwnFolder = "cache"
    """Folder of prepared folders (encoded shards and manifest), one per settings and sources; or itself one of them."""
    height: Annotated[int, Range(1, 2**14)] = 64
    """Rows of a frame after resize and centre-crop, in pixels."""
    width: Annotated[int, Range(1, 2**14)] = 160
    """Columns of a frame after resize and centre-crop, in pixels."""
    fps: Annotated[float, Range(0.01, 1000)] = 12.0
    """Frames per second after resampling."""
    min_shot_frames: Count = 1
    """Shots with fewer frames (after resampling) are left out, and counted."""
    max_shot_frames: Annotated[int, Range(0, INT32, "0: no limit")] = 0
    """Longer shots are cut off at this many frames; 0: no limit."""
    shot_threshold: Annotated[float, Range(1e-3, 1e6)] = 27.0
    """PySceneDetect ContentDetector's threshold: lower finds more cuts."""
    shots_per_scene: Annotated[int, Range(1, 2**20)] = 8
    """A file with more shots becomes several scenes of at most this many."""
    default_caption: str = "a video"
    """Global caption of a file that has no caption file."""
    default_shot_caption: str = "shot {shot}"
    """Caption of a shot that has none; {shot} counts from 1, {file} is the file's name."""
    caption_dropout: Fraction = 0.1
    """Chance that a scene is shown with empty captions, which is what guidance steers away from."""
    image_conditioning: Fraction = 0.1
    """Chance per shot that it is replaced by one of its frames."""
    keyframes: Annotated[int, Range(1, 2**12)] = 3
    """Frames per shot that are also encoded alone, for image conditioning."""
    buckets: tuple[BucketConfig, ...] = ()
    """Static shapes; empty: one bucket that fits every scene of the manifest."""
    workers: Annotated[int, Range(0, 2**10, "0: read in the training process")] = 0
    """Processes that read ahead; 0: read in the training process."""

    def check_together(self):
        check(
            not self.max_shot_frames or self.min_shot_frames <= self.max_shot_frames,
            f"data.min_shot_frames is {self.min_shot_frames}, but shots are cut off at data.max_shot_frames = "
            f"{self.max_shot_frames}: none would be left",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(Settings, at="attention"):
    """How attention is computed on these devices. What it computes is `moc`, and belongs to the weights."""

    backend: Literal["auto", "reference", "xla", "pallas_gpu", "pallas_tpu"] = "auto"
    """`reference` is the dense-mask float32 oracle; `xla` runs on any device with memory linear in tokens;
    `pallas_gpu` has kernels for Hopper GPUs, `pallas_tpu` for TPUs, and `auto` takes them there."""
    tilings: OptionalPath = "auto"
    """File of tilings that `moc_jax.commands.autotune` measured on such a device; `auto`: the one that it keeps in the
    user's cache folder (with several processes: none); empty: chosen from the shapes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Settings, at="diffusion"):
    """Rectified flow: z_t = (1 - t) z_0 + t noise, t in [0, 1], target noise - z_0."""

    t_mean: Annotated[float, Range(-100, 100)] = 0.0
    """Mean of the normal whose sigmoid is t."""
    t_std: Annotated[float, Range(1e-6, 100)] = 1.0
    """Its standard deviation."""
    t_shift: Annotated[float, Range(1e-6, 1e6)] = 1.0
    """Flow shift of training timesteps: t' = s t / (1 + (s - 1) t)."""
    joint_probability: Fraction = 0.0
    """Chance that all shots of a scene share one t (joint denoising); else each shot draws its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings, at="sample"):
    """Noise -> video."""

    solver: Literal["euler", "heun", "unipc", "dpm++"] = "unipc"
    """Order 1, 2, 2 and 2; heun evaluates the model twice per step."""
    schedule: Literal["auto", "diffusers-unipc", "diffusers-euler", "wan-unipc", "wan-dpm++"] = "auto"
    """The grid of noise levels; `auto`: the one that the solver is published with."""
    steps: Annotated[int, Range(1, 10**5)] = 30
    """Steps of the solver from noise to video."""
    guidance: Annotated[float, Range(0, 1e4)] = 1.0
    """Classifier-free guidance: u + g (c - u); 1 switches it off and halves the cost."""
    shift: Annotated[float, Range(1e-6, 1e6)] = 3.0
    """Flow shift of the sampling grid: larger spends more steps at high noise."""
    negative_prompt: str = ""
    """Steered away from when guidance is not 1."""
    order: Literal["joint", "shots"] = "joint"
    """`joint`: all shots are denoised together; `shots`: one after another, each conditioned on those before it."""
    history_noise: Below1 = 0.3
    """Noise level t_c at which given and earlier shots are shown to the model (LCT: 0.1 to 0.5)."""
    seed: Seed = 0
    """Fixes the noise of shots that give no seed of their own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings, at="optimizer"):
    """AdamW with warm-up, decay, clipping and accumulation."""

    learning_rate: Annotated[float, Range(1e-12, 1e3)] = 9e-5
    """Peak, reached after the warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall as a cosine to `final_fraction` of the peak at the last step."""
    warmup_steps: Natural = 100
    """Updates over which the rate rises linearly from 0."""
    final_fraction: Fraction = 0.0
    """Last rate over the peak, for `schedule = cosine`."""
    b1: Below1 = 0.9
    """Decay of the gradients' mean."""
    b2: Below1 = 0.95
    """Decay of the squared gradients' mean."""
    eps: Annotated[float, Range(1e-30, 1e3)] = 1e-8
    """Added to the root of the squared gradients' mean."""
    weight_decay: Annotated[float, Range(0, 1e3)] = 0.01
    """Applies to matrices only: never to biases and norm scales."""
    clip_norm: Annotated[float, Range(0, 1e12, "0: no clipping")] = 1.0
    """Global gradient norm is clipped to this; 0: no clipping."""
    accumulate: Annotated[int, Range(1, 10**6)] = 1
    """Batches that make one update, as one larger batch would."""

    def check_together(self):
        check(
            self.clip_norm == 0 or self.clip_norm >= 1e-12,
            f"optimizer.clip_norm is {self.clip_norm}, which leaves nothing of the gradients; give 0 for no "
            "clipping, or 1e-12 and more",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkStage(Settings, at="train.chunk_schedule"):
    """From `step` on, chunks have at most `size` frames or tokens (one compilation per stage)."""

    step: Natural
    size: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings, at="train"):
    """The training run."""

    steps: Count = 1000
    """Batches to train on; `optimizer.accumulate` of them make one update."""
    batch_size: Annotated[int, Range(1, 2**14)] = 1
    """Scenes per step, over all processes and devices."""
    seed: Seed = 0
    """Fixes initial weights, data order, timesteps and noise."""
    init_from: OptionalPath = ""
    """Another run's workdir or checkpoint: a new run starts from its weights (the average, if kept) and its codec."""
    ema_decay: Below1 = 0.999
    """Weights' moving average, warmed up as min(decay, (1 + step) / (10 + step)); 0: off."""
    chunk_schedule: tuple[ChunkStage, ...] = ()
    """Chunk size by step, overriding `moc.chunk.size`; empty: constant."""
    log_every: Count = 10
    """Steps between TensorBoard points; metrics.jsonl holds every step."""
    validate_every: Every = 0
    """Steps between validation losses; 0: never."""
    validation_buckets: Annotated[int, Range(1, 2**12)] = 8
    """Fixed timesteps (bucket centres in (0, 1)) at which validation loss is measured."""
    preview_every: Every = 0
    """Steps between preview videos; 0: never."""
    preview_storyboard: OptionalPath = ""
    """Storyboard for previews; empty: the first training scene's captions."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; one is also written at the end and on SIGTERM."""
    keep_last: Annotated[int, Range(1, INT32, "with none, no run could resume")] = 2
    """Newest checkpoints kept."""
    keep_every: Annotated[int, Range(0, INT32, "0: none")] = 0
    """Checkpoints at multiples of this step are never deleted; 0: none."""

    def check_together(self):
        steps = [stage.step for stage in self.chunk_schedule]
        check(
            steps == sorted(set(steps)),
            f"train.chunk_schedule has steps {', '.join(map(str, steps))}; the steps must rise",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Settings, at="mesh"):
    """Devices along each axis; the product is the number of devices. -1 (once): all that are left."""

    data: Axis = -1
    """Copies of the weights; the batch is split."""
    fsdp: Axis = 1
    """Weights, optimizer state and batch are split."""
    context: Axis = 1
    """Tokens of one scene are split (reserved: must be 1)."""
    tensor: Axis = 1
    """Heads and MLP width are split (reserved: must be 1)."""
    distributed: bool = False
    """Call jax.distributed.initialize at start (several hosts)."""
    coordinator: str = ""
    """host:port of process 0; empty: found by the cluster's own environment."""
    num_processes: Annotated[int, Range(0, 2**20, "0: left to the cluster")] = 0
    """Processes in all; 0: found by the cluster's own environment."""
    process_id: Annotated[int, Range(-1, 2**20, "-1: left to the cluster")] = -1
    """This process, from 0; -1: found by the cluster's own environment."""
    heartbeat: Annotated[int, Range(2, 86_400, "seconds; 100 suits most clusters")] = 100
    """Seconds without a sign of life after which a process is lost."""

    def check_together(self):
        sizes = (self.data, self.fsdp, self.context, self.tensor)
        check(
            0 not in sizes and sizes.count(-1) <= 1,
            f"mesh sizes are {sizes}; each is at least 1, and one may be -1",
        )
        check(
            self.context == 1 and self.tensor == 1,
            f"mesh.context = {self.context} and mesh.tensor = {self.tensor}; these axes are named but "
            "not built yet: leave them at 1",
        )
        check(
            re.fullmatch(r"(\S+:\d{1,5})?", self.coordinator) is not None,
            f"mesh.coordinator is {shown(self.coordinator)}; it must be host:port",
        )
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
