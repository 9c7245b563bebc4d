"""Model sizes by name: `--preset small`. `python -m moc_jax.models.presets` prints what each holds and costs."""

import dataclasses
from collections.abc import Mapping

from moc_jax.config import Config, MMDiTConfig
from moc_jax.config.base import choice

PRESETS: Mapping[str, MMDiTConfig] = {
    "demo": MMDiTConfig(dim=128, depth=4, heads=2, rope_theta=100.0, dtype="float32", remat="none"),
    "small": MMDiTConfig(dim=512, depth=12, heads=8),
    "base": MMDiTConfig(dim=1024, depth=20, heads=8),
    "large": MMDiTConfig(dim=1280, depth=24, heads=10),
    # The size of LCT's and MoC's backbone; its widths are not published.
    "3b": MMDiTConfig(dim=1792, depth=26, heads=14, text_dim=4096),
}


def with_preset(config: Config, name: str) -> Config:
    """`config` with a model of that size; patches, and what codec and text encoder decide, stay as they are.

    Raises:
        ConfigError: no such preset.
    """
    preset = PRESETS[choice(tuple(PRESETS), name, "--preset")]
    kept = {"patch": config.model.patch, "latent_channels": config.codec.channels, "text_dim": config.text.dim}
    return dataclasses.replace(config, model=dataclasses.replace(preset, **kept))
