"""Video files -> encoded scenes on disk, once. What a training step reads afterwards is latents, never pixels.

(a) Every caption file is read and checked.
(b) Every video is decoded shot by shot, which finds the cuts and fits the codec on the training clips.
(c) Every video is decoded again and encoded, one shot at a time, into ArrayRecord shards.
(d) The folder gets its name, `<data.cache>/<fingerprint of settings and sources>`, when it is complete.

A file that is damaged or too short is left out with its reason; the run continues. Memory is bounded by one part of
`data.max_shot_frames`, however long a shot is; with no such limit (0), by the longest shot.
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moc_jax.codecs import Codec, fit_codec
from moc_jax.config import Config, ConfigError, TextConfig
from moc_jax.data.caption_store import CaptionWriter, captions_of, embed_captions, is_sound, store_file
from moc_jax.data.encode import SceneEncoder
from moc_jax.data.manifest import (
    CODEC,
    MANIFEST,
    VERSION,
    DataError,
    Manifest,
    SceneEntry,
    check_settings,
    latent_shape,
    load_manifest,
    settings_of,
)
from moc_jax.data.shards import ShardWriter
from moc_jax.data.sources import Sources, find_sources
from moc_jax.data.survey import Survey
from moc_jax.data.video import VideoError
from moc_jax.files import is_address, prove_folder, remove_partial_folders, whole_folder
from moc_jax.progress import Progress
from moc_jax.showing import printable


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
        return _with_captions(manifest, cfg.text, cache)
    if not (
        os.path.isdir(cache) and any(cache.glob(f"*/{MANIFEST}"))
    ):  # a folder that is read-only may hold what is looked for
        prove_folder(cache, setting="data.cache")
    sources = find_sources(cfg.data)
    fingerprint = _fingerprint(cfg, sources, codec)
    folder = cache / fingerprint
    if not (folder / MANIFEST).is_file():
        prove_folder(cache, setting="data.cache")
        with _only_one(cache):
            if not (folder / MANIFEST).is_file():
                shutil.rmtree(folder, ignore_errors=True)  # without a manifest it is nothing
                remove_partial_folders(cache)  # nobody else is preparing now
                with whole_folder(folder) as partial:
                    _make(cfg, sources, codec, fingerprint, partial)
    return _with_captions(_reported(folder, sources), cfg.text, cache)


def _fingerprint(cfg: Config, sources: Sources, codec: Codec | None) -> str:
    identity = [VERSION, settings_of(cfg), sorted((s.name, s.split, s.digest) for s in sources)]
    identity += [] if codec is None else [codec.fingerprint]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _with_captions(manifest: Manifest, cfg: TextConfig, cache: Path) -> Manifest:
    """The manifest, once its folder holds its captions by this encoder; with a note if a store had to be repaired."""
    if is_sound(manifest, cfg):
        return manifest
    with _only_one(cache):
        problem = embed_captions(manifest, cfg, _stores(cache, cfg))
    return dataclasses.replace(manifest, notes=(*manifest.notes, problem)) if problem else manifest


def _stores(cache: Path, cfg: TextConfig) -> list[Path]:
    """What the encoder was run for already, the newest first."""
    found = cache.glob(f"*/{store_file(cache, cfg).name}")
    return sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)


def _reported(folder: Path, sources: Sources) -> Manifest:
    """The manifest, with notes on the sources as they are now: other files may have come or gone since it was made."""
    manifest = load_manifest(folder)
    if manifest.fingerprint != folder.name:
        raise DataError(
            f"{folder} holds the data of {manifest.fingerprint}, according to its manifest; rename it back, or delete "
            "it and prepare the data again"
        )
    return dataclasses.replace(manifest, notes=(*sources.notes, *manifest.notes))


@contextlib.contextmanager
def _only_one(cache: Path) -> Iterator[None]:
    """Processes that share the cache wait here for the one that writes there, and then find its work.

    Raises:
        DataError: nothing can be written there.
    """
    lock = cache / ".lock"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Neither emptied nor followed: under this name may lie a link to a file that is somebody's.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(lock):
            raise DataError(f"{lock} is a link; it must be a regular file, so remove it") from error
        raise DataError(
            f"the encoded scenes cannot be written to {cache}: {error}. Nothing half-written was left there; "
            "free some space, or point data.cache to another disk"
        ) from error


# ------------------------------------------------------------------------------------------------ the work


def _make(cfg: Config, sources: Sources, codec: Codec | None, fingerprint: str, folder: Path) -> None:
    """All that a prepared folder holds; captions that are too long are found before any video is opened."""
    with CaptionWriter(store_file(folder, cfg.text), cfg.text, _stores(folder.parent, cfg.text)) as captions:
        captions.add(_given_captions(sources))
        captions.add(captions_of(_build(cfg, sources, codec, fingerprint, folder)))


def _given_captions(sources: Sources) -> dict[str, str]:
    """The captions that are known before the shots are, with the file that each comes from."""
    found = {}
    for source in sources:
        captions = source.captions
        for caption in (captions.caption, *captions.shots, captions.shot(len(captions.shots))):
            found.setdefault(caption, str(captions.file or source.path))
    return found


def _build(cfg: Config, sources: Sources, codec: Codec | None, fingerprint: str, folder: Path) -> Manifest:
    """Steps (b) and (c)."""
    survey = Survey(cfg.data, sources, stride=cfg.codec.stride[0], patch=cfg.model.patch[0])
    with contextlib.closing(survey.clips()) as clips:
        try:
            codec = codec or fit_codec(cfg.codec, clips)
        except ValueError as error:
            raise DataError(f"no codec can be fitted on the training videos: {error}{_reasons(survey)}") from error
        collections.deque(clips, maxlen=0)  # a codec that is given, or needs no fitting, has read nothing yet
    with (folder / CODEC).open("wb") as file:
        np.savez(file, allow_pickle=False, **codec.state())
    writer = ShardWriter(folder)
    encoder = SceneEncoder(cfg.data, codec, writer, patch=cfg.model.patch[0])
    scenes: list[SceneEntry] = []
    usable = [source for source in sources if source.name in survey.cuts]
    with Progress("encoding", total=len(usable), unit="file") as progress:
        for number, source in enumerate(usable):
            written = []
            try:
                for scene in encoder.scenes(source, survey.cuts[source.name]):
                    written.append(scene)
                    progress.reach(number, frames=f"{encoder.frames:,}")
            except (VideoError, ValueError) as error:
                survey.skipped[source.name] = error.reason if isinstance(error, VideoError) else str(error)
            else:
                scenes += written
            progress.reach(number + 1, frames=f"{encoder.frames:,}")
    writer.close()
    if not any(scene.split == "train" for scene in scenes):
        raise DataError(f"no training scene is left of {len(sources)} files{_reasons(survey)}")
    cuts = [cut for name, cuts in survey.cuts.items() if name not in survey.skipped for cut in cuts]
    manifest = Manifest(
        folder=folder,
        fingerprint=fingerprint,
        settings=settings_of(cfg),
        sources={s.name: s.digest for s in sources},
        codec_fingerprint=codec.fingerprint,
        codec_psnr=encoder.quality,
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
    )
    manifest.save()
    return manifest


def _reasons(survey: Survey) -> str:
    return "".join("\n  " + printable(f"{name}: {reason}") for name, reason in survey.skipped.items())
