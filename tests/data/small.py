"""A configuration for synthetic clips of 8x12 pixels: latents of 2x3, four channels; and what was made of them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moc_jax.config import Config, DataConfig, HashConfig, MMDiTConfig, PcaConfig, TrainConfig
from moc_jax.data.shards import ShardReader
from moc_jax.data.work import Work
from tests.data.clips import make_clip

SIZE = (8, 12)


def small_config(folder: Path, *, batch_size: int = 2, patch: int = 1, **data) -> Config:
    """Videos in `folder`/videos, cache in `folder`/cache; `data` overrides fields of DataConfig."""
    defaults = {
        "source": (str(folder / "videos"),),
        "cache": str(folder / "cache"),
        "height": SIZE[0],
        "width": SIZE[1],
    }
    return Config(
        model=MMDiTConfig(dim=24, heads=2, depth=1, patch=(patch, 1, 1), latent_channels=4, text_dim=16),
        codec=PcaConfig(stride=(4, 4, 4), channels=4),
        text=HashConfig(dim=16),
        data=DataConfig(**defaults | data),
        train=TrainConfig(batch_size=batch_size),
    )


def with_data(cfg: Config, **changes) -> Config:
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))


def make_videos(folder: Path, **clips) -> Path:
    """One clip per keyword: name = frames per shot."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for seed, (name, lengths) in enumerate(clips.items()):
        path = folder / "videos" / f"{name}.mp4"
        make_clip(path, shots=len(lengths), frames_per_shot=tuple(lengths), size=SIZE, seed=seed)
    return folder / "videos"


@pytest.fixture
def encoded(monkeypatch):
    """The names of the videos that are encoded."""
    names, method = [], Work._encode
    monkeypatch.setattr(Work, "_encode", lambda self, s, *rest: names.append(s.name) or method(self, s, *rest))
    return names


def latents(manifest):
    reader = ShardReader(manifest)
    return {scene.name: reader.read(scene)[0] for scene in manifest.scenes}


def assert_same(a, b):
    """Of `latents`."""
    assert a.keys() == b.keys()
    for name, shots in a.items():
        for x, y in zip(shots, b[name], strict=True):
            np.testing.assert_array_equal(x, y)
