"""A folder of Wan's public weights as a run's checkpoint: the network, and all that sampling needs beside it.

What the folder says counts: the scheduler's settings, the experts' boundary. What it doesn't is as published.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from moc_jax.config import (
    ChunkConfig,
    Config,
    ConfigError,
    DataConfig,
    MoCConfig,
    SampleConfig,
    Umt5Config,
    WanConfig,
    WanVaeConfig,
)
from moc_jax.showing import named, shown
from moc_jax.tensor_files.places import EXPERTS, INDEX, settings_of
from moc_jax.weights import PublicWeights, open_weights

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
"""What Wan's own programs steer away from: garish, overexposed, static, blurred, with subtitles, deformed hands."""

_VERSIONS: Mapping[int, Literal["2.1", "2.2"]] = {16: "2.1", 48: "2.2"}  # of autoencoders, by latent channels
_TI2V = 48  # latent channels of TI2V 5B, and of no other
_UNIPC, _EULER = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
# What a scheduler may say of what is fixed here.
_FIXED: Mapping[str, Mapping[str, object]] = {
    _UNIPC: {
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
        "disable_corrector": [],
        "solver_p": None,
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "thresholding": False,
        "shift_terminal": None,
    },
    _EULER: {
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "stochastic_sampling": False,
        "invert_sigmas": False,
        "shift_terminal": None,
    },
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A folder's network, and the settings that go with it."""

    weights: PublicWeights
    config: Config


def open_pipeline(place: str, *, codec: str = "", text: str = "", tokenizer: str = "") -> Pipeline:
    """What lies in a folder of diffusers or of the Wan team, or in a file; no numbers are read, and no device touched.

    Autoencoder, text encoder and tokenizer are those of the folder, unless another place is given.

    Raises:
        WeightsError: the network is not whole.
        ConfigError: it is of something else, or the folder asks for what is not there.
    """
    weights = open_weights(place)
    model = weights.config
    assert isinstance(model, WanConfig)
    where = named(place)
    if model.latent_channels not in _VERSIONS:
        raise ConfigError(
            f"{where} has latents of {model.latent_channels} channels, which no autoencoder of Wan has: 16 or 48"
        )
    if model.condition_channels not in (0, 4 + model.latent_channels):
        raise ConfigError(
            f"{where} reads {model.condition_channels} channels beside the latents'; Wan 2.2 I2V has 4 of a mask and "
            f"{model.latent_channels} of a frame, and no other is known"
        )
    if model.condition_channels and not model.boundary:
        raise ConfigError(
            f"{where} is one of the two experts of Wan 2.2 I2V A14B, and the other's folder is missing; name one with "
            f"both: {' or '.join(f'{high} and {low}' for high, low in EXPERTS.values())}"
        )
    version = _VERSIONS[model.latent_channels]
    large = version == "2.2"
    config = Config(
        model=model,
        codec=WanVaeConfig(version=version, weights=codec or place),
        text=Umt5Config(dim=model.text_dim, weights=text or place, tokenizer=tokenizer),
        # As trained; with `mode` moc a frame reads itself, of 2.2's small ones two, and others before and after it.
        moc=MoCConfig(
            mode="dense",
            chunk=ChunkConfig(unit="frames", size=2 if large else 1),
            self_anchor="chunk",
            text_anchor="own+global",
            causal_routing=False,
        ),
        data=DataConfig(height=704, width=1280, fps=24) if large else DataConfig(height=480, width=832, fps=16),
        sample=_sampling(Path(place), model),
    )
    return Pipeline(weights, config)


def _sampling(place: Path, model: WanConfig) -> SampleConfig:
    """As published; what the folder's scheduler says takes its place."""
    base = SampleConfig(
        solver="unipc",
        schedule="wan-unipc",
        steps=50,
        guidance=5.0,
        shift=5.0,
        whole_timesteps=True,
        negative_prompt=NEGATIVE_PROMPT,
        history_noise=0.0,
    )
    if model.latent_channels == _TI2V:
        base = dataclasses.replace(base, first_frames="clean")
    elif model.boundary and model.condition_channels:
        base = dataclasses.replace(base, steps=40, guidance=3.5, guidance_low=3.5)
    elif model.boundary:
        base = dataclasses.replace(base, steps=40, guidance=4.0, guidance_low=3.0, shift=12.0)
    file = place / "scheduler" / "scheduler_config.json"
    said = settings_of(file)
    if not said:
        theirs = (place / INDEX).is_file() and not (place / EXPERTS["original"][0]).is_dir()
        return dataclasses.replace(base, schedule="auto") if theirs else base
    kind = said.get("_class_name")
    fixed = _FIXED.get(str(kind))
    if fixed is None:
        raise ConfigError(f"{named(file)} is of a {shown(kind)}; supported are {' and '.join(_FIXED)}")
    for name, value in fixed.items():
        if said.get(name, value) != value:
            raise ConfigError(f"{named(file)} says {name} {shown(said[name])}; supported is {shown(value)}")
    name = "flow_shift" if kind == _UNIPC else "shift"
    shift = said.get(name, 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float):
        raise ConfigError(f"{named(file)} says {name} {shown(shift)}; it must be a number")
    solver = "unipc" if kind == _UNIPC else "euler"
    return dataclasses.replace(base, solver=solver, schedule="auto", shift=float(shift))
