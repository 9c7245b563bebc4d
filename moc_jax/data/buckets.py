"""Which scene goes into which static shape, decided from the manifest before the first batch."""

import dataclasses
from collections.abc import Mapping

from moc_jax.config import BucketConfig, Config, ConfigError
from moc_jax.data.caption_store import open_captions
from moc_jax.data.manifest import DataError, Manifest, SceneEntry
from moc_jax.data.pack import misfit
from moc_jax.data.sources import Split
from moc_jax.showing import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """The shapes of a run and the scenes of one split in each."""

    split: Split
    shapes: tuple[BucketConfig, ...]
    scenes: tuple[tuple[SceneEntry, ...], ...]
    """Of each shape, in the manifest's order."""
    dropped: dict[str, str]
    """Scenes that fit no shape, with the reason."""
    tokens: Mapping[str, int]
    """Text tokens of each caption."""

    def summary(self) -> str:
        """Kept scenes and padding per shape, and the dropped scenes with their reasons."""
        lines = []
        for shape, scenes in zip(self.shapes, self.scenes):
            padding = 1 - sum(scene.frames for scene in scenes) / (shape.frames * len(scenes)) if scenes else 0
            lines.append(
                f"{self.split}: {len(scenes)} scenes in the bucket of {shape.shots} shots, {shape.frames} latent "
                f"frames, {shape.text_tokens} text tokens; {padding:.0%} of the frames are padding"
            )
            if padding > 0.5:
                lines.append(
                    "  warning: most of the computation there is on padding; add smaller data.buckets, or cut off long "
                    "shots with data.max_shot_frames"
                )
        dropped = [f"  dropped {name}: {reason}" for name, reason in self.dropped.items()]
        return "\n".join(map(printable, lines + dropped))


def resolved(cfg: Config, manifest: Manifest) -> Config:
    """`cfg` with the shapes of the run in `data.buckets`, so that it tells without the data what was trained.

    Preparing, training and resuming do the same with either, and resolving again changes nothing.

    Raises:
        ConfigError: see `assign_buckets` and `open_captions`.
    """
    sizes = _sizes(manifest, open_captions(manifest, cfg.text).tokens)
    shapes = _shapes(cfg.data.buckets, sizes, cfg.model.patch[0])
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, buckets=shapes))


def assign_buckets(
    configured: tuple[BucketConfig, ...], manifest: Manifest, tokens: Mapping[str, int], split: Split, *, patch: int
) -> Buckets:
    """Each scene goes into the smallest bucket that holds it; without configured buckets, one holds them all.

    Args:
        configured: `data.buckets`.
        manifest: the scenes.
        tokens: text tokens of each caption.
        split: which of the scenes.
        patch: latent frames per token of the model.

    Raises:
        ConfigError: a bucket's frames are not a multiple of `patch`.
        DataError: no scene of the split is left; says why.
    """
    sizes = _sizes(manifest, tokens)
    shapes = _shapes(configured, sizes, patch)
    scenes: list[list[SceneEntry]] = [[] for _ in shapes]
    dropped = {}
    for scene in manifest.split(split):
        problems = [misfit(shape, *sizes[scene.name]) for shape in shapes]
        if "" in problems:
            scenes[problems.index("")].append(scene)
        else:
            dropped[scene.name] = problems[-1]
    if not any(scenes):
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in dropped.items())
        fix = "widen data.buckets" if dropped else "set data.validation_source or data.validation_fraction"
        raise DataError(f"no {split} scene is left; {fix}{reasons}")
    return Buckets(split=split, shapes=shapes, scenes=tuple(map(tuple, scenes)), dropped=dropped, tokens=tokens)


def _sizes(manifest: Manifest, tokens: Mapping[str, int]) -> dict[str, tuple[int, int, int]]:
    """Shots, latent frames and text tokens of every scene, by name."""
    return {
        scene.name: (len(scene.shots), scene.frames, sum(tokens[caption] for caption in scene.captions))
        for scene in manifest.scenes
    }


def _shapes(
    configured: tuple[BucketConfig, ...], sizes: dict[str, tuple[int, int, int]], patch: int
) -> tuple[BucketConfig, ...]:
    """The configured buckets from small to large, or the one that holds all scenes."""
    if not configured:
        shots, frames, text_tokens = (max(column) for column in zip(*sizes.values()))
        return (BucketConfig(shots=shots, frames=frames, text_tokens=text_tokens),)
    for shape in configured:
        if shape.frames % patch:
            raise ConfigError(f"data.buckets: frames {shape.frames} does not divide by model.patch[0] = {patch}")
    return tuple(sorted(configured, key=lambda b: (b.frames, b.text_tokens, b.shots)))
