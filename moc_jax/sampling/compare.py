"""How near a sample comes to the scene it was trained on, measured against what the codec makes of that scene."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moc_jax.codecs import Codec, pixels_from_unit
from moc_jax.config import Config, ConfigError, DataConfig
from moc_jax.data.known import known_data
from moc_jax.data.manifest import Manifest, SceneEntry
from moc_jax.data.originals import original_shots
from moc_jax.data.quality import psnr
from moc_jax.data.shards import ShardReader
from moc_jax.sampling.scenes import scene_storyboard
from moc_jax.sampling.storyboard import Storyboard
from moc_jax.shapes import UInt8


def mean_psnr(sample: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> tuple[float, list[float]]:
    """Mean over the shots of each shot's PSNR, and those.

    Raises:
        ValueError: the two have other shots, or shots of other lengths.
    """
    ours, theirs = [shot.shape for shot in sample], [shot.shape for shot in reference]
    if ours != theirs:
        raise ValueError(
            f"cannot compare shots of shapes {ours} with shots of shapes {theirs}; sample the scene with the durations "
            "that it was trained with"
        )
    per_shot = [psnr(a, b) for a, b in zip(sample, reference)]
    return float(np.mean(per_shot)), per_shot


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingScene:
    """A scene of the training data, to be asked for and to be compared with."""

    board: Storyboard
    """Asks for it: its captions and durations."""
    codec: list[UInt8[np.ndarray, "_ Y X 3"]]
    """Its shots as the codec reconstructs them: the best that a model of these latents can show."""
    original: list[UInt8[np.ndarray, "_ Y X 3"]] | None
    """Its shots as they were filmed; None: the video is gone, or another one lies there."""

    def rows(self) -> list[tuple[str, list[UInt8[np.ndarray, "_ Y X 3"]]]]:
        """For a contact sheet."""
        return [*([("original", self.original)] if self.original else []), ("codec", self.codec)]

    def comparison(self, sample: Sequence[np.ndarray]) -> str:
        """`mean_psnr` of a sample, and of the codec's reconstruction, in words."""
        line = f"PSNR against the codec's own reconstruction: {_shown(sample, self.codec)}"
        if self.original is None:
            return line
        return f"{line}\nPSNR of the reconstruction against the original: {_shown(self.codec, self.original)}"


def _shown(sample: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> str:
    mean, per_shot = mean_psnr(sample, reference)
    return f"{mean:.2f} dB (by shot: {', '.join(f'{value:.1f}' for value in per_shot)})"


def training_scene(config: Config, codec: Codec, number: int, *, data: str) -> TrainingScene:
    """A scene of the data that a run was trained on, as it was prepared then; nothing in its cache is changed.

    Args:
        config: of the training run.
        codec: the checkpoint's.
        number: which scene of the training split, from 0.
        data: the fingerprint of the run's data, which its checkpoint holds.

    Raises:
        ConfigError: there is no such scene, or `codec` is not the one that the data was encoded with.
        DataError: see `known_data`.
    """
    manifest = known_data(config, data)
    if manifest.codec_fingerprint != codec.fingerprint:
        raise ConfigError(
            f"{manifest.folder} was encoded with codec {manifest.codec_fingerprint}, not with {codec.fingerprint}; "
            "sample with the codec of the run's own checkpoint"
        )
    scenes = manifest.split("train")
    if not 0 <= number < len(scenes):
        raise ConfigError(f"there is no training scene {number}; the data has {len(scenes)}, counted from 0")
    return prepared_scene(config.data, manifest, codec, scenes[number])


def prepared_scene(data: DataConfig, manifest: Manifest, codec: Codec, entry: SceneEntry) -> TrainingScene:
    """A scene of prepared data; `codec` is what it was encoded with."""
    shots, _ = ShardReader(manifest).read(entry)
    return TrainingScene(
        board=scene_storyboard(entry, stride=codec.stride[0], fps=data.fps),
        codec=[pixels_from_unit(codec.decode(shot)) for shot in shots],
        original=original_shots(manifest, entry, data, codec.stride[0]),
    )
