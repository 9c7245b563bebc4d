"""Which scene goes into which static shape, decided from the manifest before the first batch."""

import dataclasses
from collections.abc import Mapping

from moc_jax.config import BucketConfig, Config, ConfigError, TextConfig
from moc_jax.data.caption_store import check_length, open_captions
from moc_jax.data.captions import CaptionError
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
        ConfigError: see `assign_buckets`.
    """
    sizes = _sizes(manifest, open_captions(manifest, cfg.text).tokens, cfg.text)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, buckets=_shapes(cfg, sizes)))


def assign_buckets(cfg: Config, manifest: Manifest, tokens: Mapping[str, int], split: Split) -> Buckets:
    """Each scene goes into the smallest bucket that holds it; without configured buckets, one holds them all.

    Args:
        cfg: its buckets, patch and limit of text tokens.
        manifest: the scenes.
        tokens: of each caption.
        split: which of the scenes.

    Raises:
        ConfigError: a bucket's frames are not a multiple of the model's patch, or a caption is too long.
        DataError: no scene of the split is left; says why.
    """
    sizes = _sizes(manifest, tokens, cfg.text)
    shapes = _shapes(cfg, sizes)
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


def _sizes(manifest: Manifest, tokens: Mapping[str, int], cfg: TextConfig) -> dict[str, tuple[int, int, int]]:
    """Shots, latent frames and text tokens of every scene, by name."""

    def text_tokens(scene: SceneEntry) -> int:
        try:
            for caption in scene.captions:
                check_length(caption, tokens[caption], cfg, f"scene {scene.name}")
        except CaptionError as error:
            raise ConfigError(str(error)) from error
        return sum(tokens[caption] for caption in scene.captions)

    return {scene.name: (len(scene.shots), scene.frames, text_tokens(scene)) for scene in manifest.scenes}


def _shapes(cfg: Config, sizes: dict[str, tuple[int, int, int]]) -> tuple[BucketConfig, ...]:
    """The configured buckets from small to large, or the one that holds all scenes."""
    if not cfg.data.buckets:
        shots, frames, text_tokens = (max(column) for column in zip(*sizes.values()))
        return (BucketConfig(shots=shots, frames=frames, text_tokens=text_tokens),)
    for shape in cfg.data.buckets:
        if shape.frames % cfg.model.patch[0]:
            raise ConfigError(
                f"data.buckets: frames {shape.frames} does not divide by model.patch[0] = {cfg.model.patch[0]}"
            )
    return tuple(sorted(cfg.data.buckets, key=lambda b: (b.frames, b.text_tokens, b.shots)))
