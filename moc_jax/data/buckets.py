"""Which scene goes into which static shape, decided from the manifest before the first batch."""

import dataclasses
import functools
import itertools

import numpy as np

from moc_jax.config import BucketConfig, Config, ConfigError
from moc_jax.data.bucket_choice import best_shapes, video_tokens
from moc_jax.data.caption_store import open_captions
from moc_jax.data.manifest import DataError, Manifest, SceneEntry
from moc_jax.data.pack import captions_again, misfit
from moc_jax.data.sources import Split
from moc_jax.data.table import Table
from moc_jax.shapes import Int
from moc_jax.showing import printable

MUCH = 0.15
"""Padding over computed tokens above which more shapes are advised."""
_TRIED = 64  # shapes; each is compiled
_NAMED = 100  # of the scenes that are dropped


Sizes = Int[np.ndarray, "N 3"]
"""Shots, latent frames and text tokens of each scene."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """The shapes of a run and the scenes of one split in each."""

    split: Split
    shapes: tuple[BucketConfig, ...]
    scenes: tuple[Table[SceneEntry], ...]
    """Of each shape, in the manifest's order, each as often as an epoch shows it."""
    dropped: dict[str, str]
    """Scenes that fit no shape, with the reason."""
    lengths: np.ndarray = dataclasses.field(compare=False)
    """Text tokens of each of the scenes' texts, by its number."""
    per_frame: float
    """Video tokens of a latent frame."""
    again: bool
    """Whether a shot that continues another under its caption has it again; see `own_texts`."""

    @functools.cached_property
    def padding(self) -> float:
        """1 - real / computed tokens, text and video, over all scenes, as they are where no still breaks a shot."""
        return 1 - sum(self._real) / sum(map(self._computed, self.shapes, self._sizes))

    @functools.cached_property
    def _sizes(self) -> list[Sizes]:
        return [sizes_of(scenes, self.lengths) for scenes in self.scenes]

    @functools.cached_property
    def _real(self) -> list[int]:
        """Tokens of the scenes of each shape."""
        texts = (
            self.lengths[scenes.column("caption")].sum() + scenes.sums("shots", self._shot_texts(scenes)).sum()
            for scenes in self.scenes
        )
        return [round(sizes[:, 1].sum() * self.per_frame) + int(text) for sizes, text in zip(self._sizes, texts)]

    def _computed(self, shape: BucketConfig, sizes: Sizes) -> int:
        return len(sizes) * _tokens(shape, self.per_frame)

    def text_lengths(self, scenes: Table[SceneEntry]) -> list[list[int]]:
        """The text tokens of each scene's captions, its own and then its shots', as they stand in it."""
        of_shots = scenes.per_record("shots", self._shot_texts(scenes))
        return [[int(self.lengths[own]), *of.tolist()] for own, of in zip(scenes.column("caption"), of_shots)]

    def _shot_texts(self, scenes: Table[SceneEntry]) -> Int[np.ndarray, " s"]:
        """Text tokens of the shots of the whole table: none where a caption is that of the shot that is continued."""
        numbers, repeated = scenes.inner("shots", "caption"), scenes.inner("shots", "continues") & (not self.again)
        repeated[1:] &= numbers[1:] == numbers[:-1]
        return np.where(repeated, 0, self.lengths[numbers])

    def summary(self) -> str:
        """Kept scenes and padding per shape, how more shapes would waste less, and the dropped scenes with reasons."""
        lines = []
        for shape, sizes, real in zip(self.shapes, self._sizes, self._real):
            padding = 1 - real / self._computed(shape, sizes) if len(sizes) else 0
            lines.append(
                f"{self.split}: {len(sizes)} scenes in the bucket of {shape.shots} shots, {shape.frames} latent "
                f"frames, {shape.text_tokens} text tokens; {padding:.0%} of the tokens are padding"
            )
        lines.append(f"{self.split}: {self.padding:.1%} of all tokens are padding; {self._advice()}")
        lines += [f"  dropped {name}: {reason}" for name, reason in itertools.islice(self.dropped.items(), _NAMED)]
        if len(self.dropped) > _NAMED:
            lines.append(f"  and {len(self.dropped) - _NAMED:,} more are dropped")
        return "\n".join(map(printable, lines))

    def _advice(self) -> str:
        if self.padding <= MUCH:
            return f"to keep these shapes for other data: {_flag(self.shapes)}"
        sizes = np.concatenate(self._sizes)
        count, padding = 0, 1.0
        for count, shapes in enumerate(best_shapes(sizes, self.per_frame, _TRIED), start=1):
            tokens = np.array([_tokens(shape, self.per_frame) for shape in shapes])
            padding = 1 - sum(self._real) / int(tokens[_assigned(shapes, sizes)].sum())
            if padding <= MUCH:
                return f"{count} shapes would leave {padding:.1%}: {_flag(shapes)}"
        return (
            f"{count} shapes would still leave {padding:.1%}; what helps are parts of more equal length "
            "(data.max_shot_frames, data.shots_per_scene) and captions of more equal length"
        )


def _flag(shapes: tuple[BucketConfig, ...]) -> str:
    return "--data.buckets " + " ".join(f"{s.shots}:{s.frames}:{s.text_tokens}" for s in shapes)


def _tokens(shape: BucketConfig, per_frame: float) -> int:
    return shape.text_tokens + video_tokens(shape.frames, per_frame)


def _assigned(shapes: tuple[BucketConfig, ...], sizes: Sizes) -> Int[np.ndarray, " N"]:
    """The number of the first shape that holds each scene; -1: none does."""
    limits = np.array([dataclasses.astuple(shape) for shape in shapes])  # shots, frames, text tokens
    which = np.full(len(sizes), -1)
    for number, limit in reversed(list(enumerate(limits))):
        which[(sizes <= limit).all(1)] = number
    return which


def resolved(cfg: Config, manifest: Manifest) -> Config:
    """`cfg` with the shapes of the run in `data.buckets`, so that it tells without the data what was trained.

    Preparing, training and resuming do the same with either, and resolving again changes nothing.

    Raises:
        ConfigError: see `assign_buckets` and `open_captions`.
    """
    shapes = _shapes(cfg, manifest, open_captions(manifest, cfg.text).lengths)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, buckets=shapes))


def assign_buckets(cfg: Config, manifest: Manifest, lengths: Int[np.ndarray, " n"], split: Split) -> Buckets:
    """Each scene goes into the smallest bucket that holds it.

    Without `data.buckets`, these are the at most `data.max_buckets` shapes over which the scenes of both splits have
    the fewest tokens.

    Args:
        cfg: a run's settings.
        manifest: the scenes.
        lengths: text tokens of each of their texts, by its number; 0 for those that are not captions.
        split: which of the scenes.

    Raises:
        ConfigError: a bucket's frames are not a multiple of `model.patch[0]`.
        DataError: no scene of the split is left; says why.
    """
    shapes = _shapes(cfg, manifest, lengths)
    candidates = manifest.split(split)
    if split == "train":
        candidates = _weighted(candidates)
    sizes = sizes_of(candidates, lengths)
    which = _assigned(shapes, sizes)
    left_out = np.flatnonzero(which < 0).tolist()
    dropped = {candidates[k].name: misfit(shapes[-1], *sizes[k].tolist()) for k in left_out}
    if len(left_out) == len(candidates):
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in itertools.islice(dropped.items(), _NAMED))
        fix = "widen data.buckets" if dropped else "set data.validation_source or data.validation_fraction"
        raise DataError(f"no {split} scene is left; {fix}{reasons}")
    scenes = tuple(candidates.select(np.flatnonzero(which == bucket)) for bucket in range(len(shapes)))
    return Buckets(
        split=split,
        shapes=shapes,
        scenes=scenes,
        dropped=dropped,
        lengths=lengths,
        per_frame=cfg.tokens_per_frame,
        again=captions_again(cfg.moc),
    )


def sizes_of(scenes: Table[SceneEntry], lengths: Int[np.ndarray, " n"]) -> Sizes:
    """Shots, latent frames and text tokens of each scene; `lengths` as for `assign_buckets`."""
    text = lengths[scenes.column("caption")] + scenes.sums("shots", lengths[scenes.inner("shots", "caption")])
    frames = scenes.sums("shots", scenes.inner("shots", "frames"))
    return np.stack([scenes.counts("shots"), frames, text], axis=1)


def _weighted(scenes: Table[SceneEntry]) -> Table[SceneEntry]:
    """Each as often as it is shown in an epoch."""
    return scenes.select(np.repeat(np.arange(len(scenes)), scenes.column("weight")))


def _shapes(cfg: Config, manifest: Manifest, lengths: Int[np.ndarray, " n"]) -> tuple[BucketConfig, ...]:
    """The configured buckets from small to large, or those that waste least."""
    if not cfg.data.buckets:
        return best_shapes(sizes_of(_weighted(manifest.scenes), lengths), cfg.tokens_per_frame, cfg.data.max_buckets)[
            -1
        ]
    patch = cfg.model.patch[0]
    for shape in cfg.data.buckets:
        if shape.frames % patch:
            raise ConfigError(f"data.buckets: frames {shape.frames} does not divide by model.patch[0] = {patch}")
    return tuple(sorted(cfg.data.buckets, key=lambda b: (b.frames, b.text_tokens, b.shots)))
