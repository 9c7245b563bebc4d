"""Model sizes by name: `--preset small`. `python -m moc_jax.models.presets` prints what each holds and costs."""

import dataclasses
from collections.abc import Mapping

from moc_jax.config import Config, MMDiTConfig, ModelConfig, WanConfig
from moc_jax.config.base import choice

_WAN_14B = WanConfig(dim=5120, depth=40, heads=40, mlp_dim=13824, text_dim=4096)
WAN: Mapping[str, WanConfig] = {
    "wan21-1.3b": WanConfig(dim=1536, depth=30, heads=12, mlp_dim=8960, text_dim=4096),
    "wan21-14b": _WAN_14B,
    "wan22-5b": WanConfig(dim=3072, depth=30, heads=24, mlp_dim=14336, text_dim=4096, latent_channels=48),
    "wan22-a14b": dataclasses.replace(_WAN_14B, boundary=0.875),
    "wan22-a14b-i2v": dataclasses.replace(_WAN_14B, boundary=0.9, condition_channels=20),
}
"""What is published as Wan 2.1 T2V and as Wan 2.2 TI2V, T2V and I2V."""

PRESETS: Mapping[str, ModelConfig] = {
    "demo": MMDiTConfig(dim=128, depth=4, heads=2, rope_theta=100.0, dtype="float32", remat="none"),
    "small": MMDiTConfig(dim=512, depth=12, heads=8),
    "base": MMDiTConfig(dim=1024, depth=20, heads=8),
    "large": MMDiTConfig(dim=1280, depth=24, heads=10),
    # The size of LCT's and MoC's backbone; its widths are not published.
    "3b": MMDiTConfig(dim=1792, depth=26, heads=14, text_dim=4096),
    **WAN,
}


def with_preset(config: Config, name: str) -> Config:
    """`config` with a model of that size; patches, adapters, and what codec and text encoder decide, stay.

    Raises:
        ConfigError: no such preset.
    """
    preset = PRESETS[choice(tuple(PRESETS), name, "--preset")]
    kept = {
        "patch": config.model.patch,
        "lora": config.model.lora,
        "latent_channels": config.codec.channels,
        "text_dim": config.text.dim,
    }
    return dataclasses.replace(config, model=dataclasses.replace(preset, **kept))
