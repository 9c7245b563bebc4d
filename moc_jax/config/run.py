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
    OptionalPlace,
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
class FilterConfig(Settings, at="data.filters"):
    """Which shots are left out; each is named with the reason."""

    black: bool = False
    """Leave out shots that are black throughout."""
    dark: Annotated[float, Range(0, 255, "0: none")] = 0.0
    """Leave out shots that are darker than this on average, of 255."""
    still: Annotated[float, Range(0, 255, "0: none")] = 0.0
    """Leave out shots whose frames differ by less than this on average, of 255; pictures stay."""
    duplicates: Annotated[int, Range(-1, 31, "-1: none")] = -1
    """Leave out shots whose perceptual hash differs in at most so many of 128 bits from an earlier one's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Settings, at="data"):
    """Video files -> scenes -> encoded shards -> batches."""

    source: tuple[Folder, ...] = ()
    """Video files, folders, tar files, or tables (.jsonl, .csv) with a line for each video, on a disk or in a bucket
    (gs://...); a caption file `clip.yaml` or `clip.json` may lie beside `clip.mp4`."""
    stills: bool = False
    """Take pictures in folders and tar files, too, as shots of one frame; those that are named are taken anyway."""
    validation_source: tuple[Folder, ...] = ()
    """Held-out video files or folders; empty: `validation_fraction` of the files is held out instead."""
    validation_fraction: Fraction = 0.0
    """Share of files held out for validation, chosen by a hash of the file's name."""
    cache: OwnFolder = "cache"
    """Folder of encoded videos, each encoded once per settings, and of prepared folders, which say what a run is made
    of; or itself one of these. On a disk or in a bucket (gs://...)."""
    refit_codec: bool = False
    """Fit a codec on these videos even where the cache has one of the same settings."""
    height: Annotated[int, Range(1, 2**14)] = 64
    """Rows of a frame after resize and centre-crop, in pixels."""
    width: Annotated[int, Range(1, 2**14)] = 160
    """Columns of a frame after resize and centre-crop, in pixels."""
    fps: Annotated[float, Range(0.01, 1000)] = 12.0
    """Frames per second after resampling."""
    min_shot_frames: Count = 1
    """Shots with fewer frames (after resampling) are left out, and counted."""
    max_shot_frames: Annotated[int, Range(0, INT32, "0: no limit")] = 0
    """Longer shots become several parts of at most this many frames, as equal as can be; 0: no limit."""
    long_shots: Literal["continue", "scenes"] = "continue"
    """What the parts of a long shot are: shots that continue one another, or scenes of their own."""
    shot_threshold: Annotated[float, Range(1e-3, 1e6)] = 27.0
    """PySceneDetect ContentDetector's threshold: lower finds more cuts."""
    shots_per_scene: Annotated[int, Range(1, 2**20)] = 8
    """A file with more shots becomes several scenes of at most this many."""
    default_caption: str = "a video"
    """Global caption of a file that has no caption file."""
    default_shot_caption: str = "shot {shot}"
    """Caption of a shot that has none; {shot} counts from 1, {file} is the file's name."""
    caption_command: str = ""
    """Command that writes captions for shots that have none, from contact sheets (moc_jax/data/captioning.py)."""
    caption_dropout: Fraction = 0.1
    """Chance that a scene is shown with empty captions, which is what guidance steers away from."""
    image_conditioning: Fraction = 0.1
    """Chance per shot that it is replaced by one of its frames."""
    first_frames: Fraction = 0.0
    """Chance per shot that its first latent frame is given: clean and not learned, as Wan 2.2 TI2V 5B knows it, or as
    the condition of a model with `condition_channels`."""
    keyframes: Annotated[int, Range(1, 2**12)] = 3
    """Frames per shot that are also encoded alone, for image conditioning."""
    filters: FilterConfig = FilterConfig()
    buckets: tuple[BucketConfig, ...] = ()
    """Static shapes; empty: those of at most `max_buckets` that waste least."""
    max_buckets: Annotated[int, Range(1, 64, "each is compiled")] = 4
    """The most static shapes that are chosen by themselves."""
    verify: Literal["lazy", "full"] = "lazy"
    """When encoded data is compared with its digests: as it is read, and all of it in the background; or all of it
    before the first step."""
    workers: Annotated[int, Range(0, 2**10, "0: read in the training process")] = 0
    """Processes that read ahead; 0: read in the training process."""

    def check_together(self):
        check(
            not self.max_shot_frames or self.min_shot_frames <= self.max_shot_frames,
            f"data.min_shot_frames is {self.min_shot_frames}, but data.max_shot_frames is "
            f"{self.max_shot_frames}: no shot would be left",
        )


ExchangeKind = Literal["auto", "gather", "dispatch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(Settings, at="attention"):
    """How attention is computed on these devices. What it computes is `moc`, and belongs to the weights."""

    backend: Literal["auto", "reference", "xla", "pallas_gpu", "pallas_tpu"] = "auto"
    """`reference` is the dense-mask float32 oracle; `xla` runs on any device with memory linear in tokens;
    `pallas_gpu` has kernels for Hopper GPUs, `pallas_tpu` for TPUs, and `auto` takes them there."""
    tilings: OptionalPath = "auto"
    """File of tilings that `moc_jax.commands.autotune` measured on such a device; `auto`: the one that it keeps in the
    user's cache folder (with several processes: none); empty: chosen from the shapes."""
    head_groups: Annotated[int, Range(0, 2**12, "0: the most")] = 0
    """The devices of one scene, `mesh.context`, are so many groups of heads, and groups of tokens where that is less;
    must divide both. 0: the most that do."""
    exchange_parts: Annotated[int, Range(1, 64)] = 1
    """The devices of one scene exchange their heads in so many parts at most, so that one can travel while another is
    computed."""
    exchange: ExchangeKind = "auto"
    """How groups of tokens read each other's keys: they `gather` all of them, or `dispatch` queries to the devices that
    hold their picks; `auto`: what moves fewer bytes for equal shots and random picks."""


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
    teacher_forcing: bool = False
    """Under `moc.visibility past`: every shot reads the shots before it at a noise level of their own, as in sampling
    shot by shot. All shots are learned in one pass, over twice the tokens."""
    history_noise: tuple[Below1, Below1] = (0.1, 0.5)
    """That noise level is drawn between these, for each scene (LCT: 0.1 to 0.5)."""
    own_history: Fraction = 0.0
    """With teacher forcing, the chance that a scene's history is what the model makes of it: its shots with noise, and
    denoised again, after Resampling Forcing (arXiv 2512.15702). So it learns to follow its own mistakes."""
    own_history_from: tuple[Below1, Below1] = (0.3, 0.9)
    """The noise level that this begins at is drawn between these, for each scene."""
    own_history_steps: Annotated[int, Range(1, 100)] = 1
    """Euler steps from there, each a forward pass more over twice the tokens."""

    @property
    def copies(self) -> int:
        """Of a scene in a training step: teacher forcing has its history, too."""
        return 2 if self.teacher_forcing else 1

    def check_together(self):
        low, high = self.history_noise
        check(low <= high, f"diffusion.history_noise is {low:g} to {high:g}; the first must not be above the second")
        low, high = self.own_history_from
        check(low <= high, f"diffusion.own_history_from is {low:g} to {high:g}; the first must not be above the second")
        check(
            self.teacher_forcing or not self.own_history,
            f"diffusion.own_history {self.own_history:g} needs diffusion.teacher_forcing, which has a history",
        )


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
    guidance_low: Annotated[float, Range(0, 1e4, "0: as `guidance`")] = 0.0
    """The same where the expert for low noise denoises, of a model with `model.boundary`; 0: as `guidance`."""
    shift: Annotated[float, Range(1e-6, 1e6)] = 3.0
    """Flow shift of the sampling grid: larger spends more steps at high noise."""
    whole_timesteps: bool = False
    """The model reads noise levels cut to thousandths, as with the publishers of all grids but diffusers-euler."""
    negative_prompt: str = ""
    """Steered away from when guidance is not 1."""
    order: Literal["joint", "shots"] = "joint"
    """`joint`: all shots are denoised together; `shots`: one after another, each conditioned on those before it."""
    history_noise: Below1 = 0.3
    """Noise level t_c at which given and earlier shots are shown to the model (LCT: 0.1 to 0.5)."""
    first_frames: Literal["noised", "clean"] = "noised"
    """How given first frames of shots are shown: at their shot's noise level; or clean, as Wan 2.2 TI2V 5B and models
    trained with `data.first_frames` know them."""
    cache: Literal["auto", "on", "float8", "off"] = "auto"
    """Keys and values of finished shots are kept on the devices, not computed again at each step, for `order shots`
    under `moc.visibility past`. `on`: or an error says why not; `float8`: so, in half the memory and less exactly;
    `auto`: where nothing changes by it and memory is enough; `off`: never."""
    retrieve_shots: Natural = 0
    """In a generation: how many earlier shots each new one is shown, those that it wants most; 0: all."""
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
    top_k: Annotated[int, Range(-1, 2**20, "-1: moc.top_k")] = -1
    """Chunks that each query picks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings, at="train"):
    """The training run."""

    steps: Count = 1000
    """Batches to train on; `optimizer.accumulate` of them make one update."""
    batch_size: Annotated[int, Range(1, 2**14)] = 1
    """Scenes per step, over all processes and devices."""
    seed: Seed = 0
    """Fixes initial weights, data order, timesteps and noise."""
    init_from: OptionalPlace = ""
    """Another run's workdir or checkpoint: a new run starts from its weights (the average, if kept) and its codec. Or
    public weights of the same model, as a file or folder. With `model.lora` it trains adapters beside them."""
    init_adapters: OptionalPath = ""
    """With `model.lora`: a file of adapters (LoRA), or its folder, that a new run's start from."""
    allow_new_data: bool = False
    """Resume also when the data is other than before, such as with more videos: its first epoch then begins."""
    ema_decay: Below1 = 0.999
    """Weights' moving average, warmed up as min(decay, (1 + step) / (10 + step)); 0: off."""
    chunk_schedule: tuple[ChunkStage, ...] = ()
    """Chunk size by step, as `step:size` or `step:size:top_k`, overriding `moc.chunk.size` and `moc.top_k`; empty:
    constant."""
    log_every: Count = 10
    """Steps between TensorBoard points and lines of speed.jsonl; metrics.jsonl holds every step."""
    profile_steps: Natural = 0
    """After four steps to warm up, so many are traced for xprof, into the workdir's tensorboard/; 0: none."""
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
    """Tokens of one scene are split: attention exchanges heads, and keys where `attention.head_groups` is less."""
    tensor: Axis = 1
    """Heads and MLP width are split, both multiples of it; and tokens, between them."""
    distributed: bool = True
    """Processes that a cluster started (TPU slices, SLURM, Open MPI, indexed jobs of Kubernetes), or that the settings
    below locate, join in one run; False: each runs alone."""
    coordinator: str = ""
    """host:port of process 0; empty: found by the cluster's own environment."""
    num_processes: Annotated[int, Range(0, 2**20, "0: left to the cluster")] = 0
    """Processes in all; 0: found by the cluster's own environment."""
    process_id: Annotated[int, Range(-1, 2**20, "-1: left to the cluster")] = -1
    """This process, from 0; -1: found by the cluster's own environment."""
    local_device_ids: tuple[Annotated[int, Range(0, 2**16)], ...] = ()
    """GPUs of its host that this process has, from 0; empty: all, or, where SLURM or Open MPI started several processes
    on the host, one each."""
    initialization_timeout: Annotated[int, Range(1, 86_400, "seconds")] = 300
    """Seconds that processes wait for each other at the start."""
    heartbeat: Annotated[int, Range(2, 86_400, "seconds; 100 suits most clusters")] = 100
    """Seconds without a sign of life after which a process is lost."""

    def check_together(self):
        sizes = (self.data, self.fsdp, self.context, self.tensor)
        check(
            0 not in sizes and sizes.count(-1) <= 1,
            f"mesh sizes are {sizes}; each is at least 1, and one may be -1",
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
            self.distributed or not self.located,
            "mesh.coordinator, num_processes, process_id and local_device_ids say how processes find each other, but "
            "mesh.distributed is False; set it to True, or leave them out",
        )

    @property
    def located(self) -> bool:
        """Whether anything says where the other processes are, or what this one has."""
        return bool(self.coordinator or self.num_processes or self.process_id != -1 or self.local_device_ids)
