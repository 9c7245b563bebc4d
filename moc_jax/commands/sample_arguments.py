"""What `moc-sample`'s command line takes."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from moc_jax.config import AttentionConfig, MeshConfig, TopKStage
from moc_jax.config.base import File, Natural, OptionalPath, OptionalPlace, Range, Settings, Workdir

# Settings of the checkpoint's `sample`, `data` and `moc`.
SAMPLE = (
    "solver",
    "schedule",
    "steps",
    "guidance",
    "guidance_low",
    "shift",
    "order",
    "history_noise",
    "cache",
    "retrieve_shots",
)
DATA = "height", "width", "fps"
MOC = "top_k", "dense_first_steps", "dense_last_steps", "dense_layers", "top_k_schedule"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """What the command line says."""

    checkpoint: Workdir
    """A run's folder, its checkpoints folder, or one checkpoint's; or Wan's public weights, as a folder of diffusers or
    of the Wan team."""
    storyboard: tuple[File, ...] = ()
    """YAML files, or scene files of StoryMem, EntityBench, HoloCine or LongLive."""
    training_scene: int | None = None
    """Instead of a storyboard: the training scene of this number, beside its original and the codec's rendering."""
    out: File
    """The MP4 to write; with several storyboards, or for an episode, a folder."""
    extend: OptionalPath = ""
    """The folder of a generation, a video made shot by shot, to begin or to continue; it needs no --out, and once it is
    there no --checkpoint."""
    redo: tuple[int, ...] = ()
    """Shots of the generation, from 1, to sample again; says which later ones read them."""
    redo_readers: bool = False
    """And these, too."""
    retrieve_shots: int | None = None
    """How many earlier shots of a generation each new one is shown; 0: all."""
    step: int | None = None
    """Which checkpoint; none given: the newest."""
    dense: bool = False
    """Every token sees every other: Mixture of Contexts off, same weights."""
    routed: bool = False
    """Mixture of Contexts on, same weights: what public weights, which were trained without, are sampled with only
    then."""
    top_k: int | None = None
    """Chunks that each query picks."""
    chunk: int | None = None
    """The most frames (or tokens, as in training) per chunk."""
    dense_first_steps: int | None = None
    """So many of the first steps see everything."""
    dense_last_steps: int | None = None
    """And so many of the last."""
    dense_layers: tuple[Natural, ...] = ()
    """Blocks that see everything, from 0."""
    top_k_schedule: tuple[TopKStage, ...] = ()
    """Other numbers of picks by noise level, as timestep:top_k, rising; 1000 is pure noise."""
    solver: Literal["euler", "heun", "unipc", "dpm++"] | None = None
    """Order 1, 2, 2 and 2; heun evaluates the model twice per step."""
    schedule: Literal["auto", "diffusers-unipc", "diffusers-euler", "wan-unipc", "wan-dpm++"] | None = None
    """The grid of noise levels; `auto`: the one that the solver is published with."""
    steps: int | None = None
    """Steps from noise to video."""
    guidance: float | None = None
    """How far to steer from the negative prompt to the captions; 1 is off."""
    guidance_low: float | None = None
    """The same with the expert for low noise, where there are two; 0: no other."""
    shift: float | None = None
    """Larger spends more steps at high noise."""
    order: Literal["joint", "shots"] | None = None
    """All shots together, or one after another."""
    history_noise: float | None = None
    """Noise level at which given and earlier shots are shown to the model."""
    cache: Literal["auto", "on", "float8", "off"] | None = None
    """Whether keys and values of finished shots are kept, with order shots and visibility past."""
    negative_prompt: str | None = None
    """What to steer away from; overrides a storyboard's own."""
    height: int | None = None
    """Rows of a frame, in pixels."""
    width: int | None = None
    """Columns of a frame, in pixels."""
    fps: float | None = None
    """Frames per second."""
    weights: OptionalPath = ""
    """Where the public weights of codec and text encoder lie now: a folder as diffusers or the Wan team has it."""
    codec: OptionalPath = ""
    """Where those of the codec lie, if elsewhere."""
    text_encoder: OptionalPath = ""
    """Where those of the text encoder lie, if elsewhere."""
    tokenizer: OptionalPath = ""
    """Its tokenizer's spiece.model, or a folder with it, if it isn't beside them."""
    lora: OptionalPath = ""
    """With public weights: a file of adapters (LoRA), or its folder, to be merged into them."""
    lora_scale: Annotated[float, Range(-1e6, 1e6)] = 1.0
    """What they are multiplied with."""
    adapters: Literal["merged", "apart"] = "merged"
    """Of a run that trained adapters: merged into the weights that they are beside, so that they cost nothing, or
    apart."""
    base: OptionalPlace = ""
    """Of such a run: where these weights lie now, if they were moved."""
    seed: int | None = None
    """Overrides a storyboard's own seed; a shot's own seed overrides both."""
    contact_sheet: File | None = None
    """Also write a PNG with a few frames of each shot."""
    routing_picture: File | None = None
    """Also write a PNG of which shots each shot reads from, per layer."""
    routing_atlas: File | None = None
    """Also write an HTML page in which a click on a patch shows what its heads read, per layer and noise level."""
    caption_filter: str = ""
    """A command that is shown every caption first and may refuse it (moc_jax/sampling/refusal.py)."""
    overwrite: bool = False
    """Replace files that exist."""
    attention: AttentionConfig = AttentionConfig()
    mesh: MeshConfig = MeshConfig(distributed=False)
    """As in training. Devices that would compute copies of a scene share it, whatever the axes say."""
    compilation_cache: OptionalPlace = "auto"
    """Where compiled programs are kept, as in training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extending(Arguments):
    """The same where there is --extend: what is begun knows its checkpoint."""

    checkpoint: OptionalPlace = ""
    out: File = Path()
