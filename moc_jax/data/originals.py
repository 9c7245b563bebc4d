"""The pixels that a prepared scene was encoded from, where its video is still there."""

import numpy as np

from moc_jax.config import ConfigError, DataConfig
from moc_jax.data.captions import CaptionError
from moc_jax.data.encode import read_shots
from moc_jax.data.manifest import Manifest, SceneEntry
from moc_jax.data.sources import find_file
from moc_jax.data.video import VideoError
from moc_jax.shapes import UInt8


def original_shots(
    manifest: Manifest, scene: SceneEntry, cfg: DataConfig, stride: int
) -> list[UInt8[np.ndarray, "_ Y X 3"]] | None:
    """The shots of a scene as they were filmed; None if its file is gone, has changed, or cannot be read any more.

    Args:
        manifest: the scene's.
        scene: which.
        cfg: where its video lies, and the size and rate it was prepared with.
        stride: the codec's frames per latent frame.
    """
    places = [(shot.start, stride * (shot.frames - 1) + 1) for shot in scene.shots]
    try:
        path = find_file(cfg, scene.source, manifest.sources[scene.source])
        return None if path is None else list(read_shots(path, cfg, places))
    except (ConfigError, CaptionError, VideoError, OSError):  # prepared data may outlive its videos
        return None
