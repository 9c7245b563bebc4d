"""Video files -> encoded scenes on disk, once. What a training step reads afterwards is latents, never pixels.

(a) Every caption file is read and checked.
(b) Every video is decoded shot by shot, which finds the cuts and fits the codec on the training clips.
(c) Every video is decoded again and encoded, one shot at a time, into ArrayRecord shards.
(d) The folder gets its name, `<data.cache>/<fingerprint of settings and sources>`, when it is complete.

A file that is damaged or too short is left out with its reason; the run goes on. Memory is bounded by one part of
`data.max_shot_frames`, however long a shot is; with no such limit (0), by the longest shot.
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moc_jax.codecs import Codec, crop_frames, fit_codec, pixels_to_unit
from moc_jax.config import Config, ConfigError
from moc_jax.data.captions import CaptionError
from moc_jax.data.folders import some
from moc_jax.data.manifest import (
    CODEC,
    MANIFEST,
    VERSION,
    DataError,
    Manifest,
    SceneEntry,
    ShotEntry,
    check_settings,
    latent_shape,
    load_manifest,
    settings_of,
)
from moc_jax.data.shards import ShardWriter
from moc_jax.data.shots import CutDetector, GivenCuts, begin_shots
from moc_jax.data.sources import Source, Sources, find_sources
from moc_jax.data.video import VideoError, decode, resample
from moc_jax.documents import printable
from moc_jax.files import is_address, prove_folder
from moc_jax.shapes import Float32, UInt8
from moc_jax.text import build_text_encoder


def prepare(cfg: Config, codec: Codec | None = None) -> Manifest:
    """The encoded scenes of `cfg.data`: found if they lie there already, else made.

    `data.cache` is a folder of prepared folders, one per fingerprint; or it is itself a prepared folder, which is
    then used as it is, provided that it fits the config.

    Args:
        codec: what to encode with; None fits one on the training videos.

    Raises:
        ConfigError, CaptionError: before any video is opened.
        DataError: a prepared folder that does not fit, no usable training video, or a disk that is full.
    """
    if is_address(cfg.data.cache):
        raise ConfigError(f"data.cache {cfg.data.cache} is an address; encoded scenes need a folder of a file system")
    cache = Path(cfg.data.cache)
    if os.path.isfile(cache / MANIFEST):
        manifest = load_manifest(cache)
        check_settings(manifest, cfg)
        if codec is not None and manifest.codec_fingerprint != codec.fingerprint:
            raise DataError(
                f"the data in {cache} was encoded with codec {manifest.codec_fingerprint}, but this run's is "
                f"{codec.fingerprint}; point data.cache elsewhere"
            )
        return manifest
    if not (
        os.path.isdir(cache) and any(cache.glob(f"*/{MANIFEST}"))
    ):  # a folder that is read-only may hold what is looked for
        prove_folder(cache, setting="data.cache")
    sources = find_sources(cfg.data)
    _check_lengths(sources, cfg)
    identity: list[Any] = [VERSION, settings_of(cfg), sorted((s.name, s.split, s.digest) for s in sources)]
    if codec is not None:
        identity.append(codec.fingerprint)
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder, partial = cache / fingerprint, cache / f".{fingerprint}.partial"
    if (folder / MANIFEST).is_file():
        return _reported(folder, sources)
    prove_folder(cache, setting="data.cache")
    try:
        with _only_one(cache):
            if not (folder / MANIFEST).is_file():
                # What lies under these names is what killed runs left half done: nobody else is preparing now.
                for leftover in (folder, *cache.glob(".*.partial")):
                    shutil.rmtree(leftover, ignore_errors=True)
                partial.mkdir()
                try:
                    _build(cfg, sources, codec, fingerprint, partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"the encoded scenes cannot be written to {cache}: {error}. Nothing half-written was left there; "
            "make room, or point data.cache to another disk"
        ) from error
    return _reported(folder, sources)


def _reported(folder: Path, sources: Sources) -> Manifest:
    """The manifest, with notes on the sources as they are now: other files may have come or gone since it was made."""
    manifest = load_manifest(folder)
    if manifest.fingerprint != folder.name:
        raise DataError(
            f"{folder} holds the data of {manifest.fingerprint}, by its manifest; give it its name back, or delete it "
            "and prepare the data anew"
        )
    return dataclasses.replace(manifest, notes=(*sources.notes, *manifest.notes))


@contextlib.contextmanager
def _only_one(cache: Path) -> Iterator[None]:
    """Processes that share the cache wait here for the one that prepares, and then find its work."""
    cache.mkdir(parents=True, exist_ok=True)
    lock = cache / ".lock"
    try:
        # Neither emptied nor followed: under this name may lie a link to a file that is somebody's.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{lock} is a link; it must be a file of its own, so remove it") from error
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_lengths(sources: Sources, cfg: Config) -> None:
    encoder = build_text_encoder(cfg.text)
    for source in sources:
        captions = source.captions
        try:
            for caption in (captions.caption, *captions.shots, captions.shot(len(captions.shots))):
                encoder(caption)
        except ValueError as error:
            raise CaptionError(f"{captions.file or source.path}: {error}") from error


# ------------------------------------------------------------------------------------------------ (b) survey


@dataclasses.dataclass(frozen=True)
class _Cut:
    """One shot as detected: its frames at the new rate, and how many of them can be encoded (0: left out)."""

    frames: int
    used: int


class _Survey:
    """Reads all sources once: finds the shots, and hands the training clips to the codec's fit on the way."""

    def __init__(self, cfg: Config, sources: Sources):
        self._cfg, self._sources = cfg, sources
        self._least = max(cfg.data.min_shot_frames, cfg.codec.stride[0] * (cfg.model.patch[0] - 1) + 1)
        self.cuts: dict[str, list[_Cut]] = {}
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = []

    def clips(self) -> Iterator[Float32[np.ndarray, "F Y X 3"]]:
        """The training clips in [-1, 1]; when it ends, `cuts`, `skipped` and `notes` are complete."""
        for source in tqdm(self._sources, desc="finding shots", unit="file", disable=None):
            cuts: list[_Cut] = []
            try:
                for count, beginning in self._shots(source):
                    cuts.append(_Cut(count, self._usable(count)))
                    if cuts[-1].used and source.split == "train":
                        yield pixels_to_unit(beginning[: cuts[-1].used])
            except VideoError as error:
                self.skipped[source.name] = error.reason
                continue
            if not any(cut.used for cut in cuts):
                longest = max(cut.frames for cut in cuts)
                self.skipped[source.name] = (
                    f"too short: its longest shot has {longest} frames at {self._cfg.data.fps:g} fps, "
                    f"but {self._least} are needed"
                )
                continue
            self.cuts[source.name] = cuts
            self._compare(source, len(cuts))
        bare = [s.name for s in self._sources if s.name in self.cuts and s.captions.file is None]
        if bare:  # perhaps on purpose, perhaps for a caption file of another name
            self.notes.append(
                f"{len(bare)} of {len(self.cuts)} files have no caption file but the defaults: {some(bare)}"
            )

    def _shots(self, source: Source) -> Iterator[tuple[int, UInt8[np.ndarray, "F Y X 3"]]]:
        data, cuts = self._cfg.data, source.captions.cuts
        is_cut = CutDetector(data.shot_threshold) if cuts is None else GivenCuts(cuts)
        frames = decode(source.path, data.height, data.width, lambda text: self.notes.append(f"{source.name}: {text}"))
        return begin_shots(frames, (data.height, data.width), data.fps, is_cut, data.max_shot_frames or None)

    def _usable(self, frames: int) -> int:
        if frames < self._least:
            return 0
        most = min(frames, self._cfg.data.max_shot_frames or frames)
        return crop_frames(most, self._cfg.codec.stride[0], self._cfg.model.patch[0])

    def _compare(self, source: Source, shots: int) -> None:
        captions = source.captions
        expected = len(captions.shots) if captions.cuts is None else len(captions.cuts) + 1
        if captions.cuts is not None and expected != shots:
            self.notes.append(f"{captions.file}: its cuts make {expected} shots, but the video ends after {shots}")
        elif captions.shots and len(captions.shots) != shots:
            rest = "the rest go unused" if len(captions.shots) > shots else "the others have the default caption"
            self.notes.append(
                f"{captions.file}: captions for {len(captions.shots)} shots, but {shots} were found; {rest}"
            )


# ------------------------------------------------------------------------------------------------ (c) encoding


def _build(cfg: Config, sources: Sources, codec: Codec | None, fingerprint: str, folder: Path) -> None:
    survey = _Survey(cfg, sources)
    clips = survey.clips()
    try:
        codec = codec or fit_codec(cfg.codec, clips)
    except ValueError as error:
        raise DataError(f"no codec can be fitted on the training videos: {error}{_reasons(survey)}") from error
    collections.deque(clips, maxlen=0)  # a codec that is given, or needs no fitting, has read nothing yet
    state: dict[str, Any] = codec.state()
    with (folder / CODEC).open("wb") as file:
        np.savez(file, **state)
    writer = ShardWriter(folder)
    scenes: list[SceneEntry] = []
    for source in tqdm([s for s in sources if s.name in survey.cuts], desc="encoding", unit="file", disable=None):
        try:
            scenes += _encode(cfg, codec, source, survey.cuts[source.name], writer)
        except (VideoError, ValueError) as error:
            survey.skipped[source.name] = error.reason if isinstance(error, VideoError) else str(error)
    writer.close()
    if not any(scene.split == "train" for scene in scenes):
        raise DataError(f"no training scene is left of {len(sources)} files{_reasons(survey)}")
    cuts = [cut for name, cuts in survey.cuts.items() if name not in survey.skipped for cut in cuts]
    Manifest(
        folder=folder,
        fingerprint=fingerprint,
        settings=settings_of(cfg),
        sources={s.name: s.digest for s in sources},
        codec_fingerprint=codec.fingerprint,
        latent_shape=latent_shape(cfg),
        scenes=tuple(scenes),
        shards=tuple(writer.shards),
        skipped=survey.skipped,
        notes=tuple(survey.notes),
        counts={
            "files": len(survey.cuts.keys() - survey.skipped.keys()),
            "shots": sum(len(scene.shots) for scene in scenes),
            "short_shots": sum(not cut.used for cut in cuts),
            "frames": sum(cut.frames for cut in cuts),
            "cut_frames": sum(cut.frames - cut.used for cut in cuts),
            "latent_frames": sum(scene.frames for scene in scenes),
        },
    ).save()


def _reasons(survey: _Survey) -> str:
    return "".join("\n  " + printable(f"{name}: {reason}") for name, reason in survey.skipped.items())


def _encode(cfg: Config, codec: Codec, source: Source, cuts: list[_Cut], writer: ShardWriter) -> list[SceneEntry]:
    """Writes the scenes of one file: its usable shots in order, split as evenly as can be."""
    usable = [index for index, cut in enumerate(cuts) if cut.used]
    groups = np.array_split(usable, -(-len(usable) // cfg.data.shots_per_scene))
    shots = _read_again(cfg, source, cuts)
    scenes = []
    for number, group in enumerate(groups):
        latents, stills, entries = [], [], []
        for index in group:
            video = pixels_to_unit(next(shots))
            latents.append(codec.encode(video))
            stills.append(_stills(cfg, codec, video))
            entries.append(ShotEntry(caption=source.captions.shot(index), frames=len(latents[-1])))
        shard, record = writer.write(np.concatenate(latents), np.stack(stills))
        scenes.append(
            SceneEntry(
                name=f"{source.name}#{number}",
                source=source.name,
                split=source.split,
                caption=source.captions.caption,
                shots=tuple(entries),
                shard=shard,
                record=record,
            )
        )
    return scenes


def _read_again(cfg: Config, source: Source, cuts: list[_Cut]) -> Iterator[UInt8[np.ndarray, "F Y X 3"]]:
    """The usable shots, cut where the survey found them."""
    data = cfg.data
    reported_by_the_survey = decode(source.path, data.height, data.width, note=lambda text: None)
    frames = resample(reported_by_the_survey, data.fps)
    repeated = (frame for _, frame, times in frames for _ in range(times))
    for cut in cuts:
        shot = list(itertools.islice(repeated, cut.used))
        collections.deque(itertools.islice(repeated, cut.frames - cut.used), maxlen=0)
        if len(shot) < cut.used:
            raise VideoError(source.path, "it became shorter while it was read")
        if cut.used:
            yield np.stack(shot)


def _stills(cfg: Config, codec: Codec, video: Float32[np.ndarray, "F Y X 3"]) -> Float32[np.ndarray, "n p Y X Z"]:
    """Frames spread over the shot, its first and last included, each encoded as the shortest still clip."""
    frames = cfg.codec.stride[0] * (cfg.model.patch[0] - 1) + 1
    picks = np.linspace(0, len(video) - 1, cfg.data.keyframes).round().astype(int)
    return np.stack([codec.encode(np.repeat(video[k : k + 1], frames, axis=0)) for k in picks])
