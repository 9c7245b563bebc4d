"""Video files -> encoded scenes on disk, once. What a training step reads afterwards is latents, never pixels.

(a) Every caption file is read, and every caption checked.
(b) Where the cache has no codec of these settings yet, training videos are decoded and cut into shots, and one is
    fitted to them; their frames wait on the disk, so that no video is decoded twice.
(c) Every video of which the cache has nothing is encoded, one part of a shot at a time.
(d) A folder of the cache says which of it a run is made of: `<data.cache>/<fingerprint of settings and sources>`.

Several processes do (b) and (c) together, each a video at a time. What is complete stays, however they end. A
file that is damaged or too short is left out with its reason. Memory is bounded by one part of `data.max_shot_frames`,
however long a shot is; with no such limit (0), by the longest shot.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moc_jax import cloud
from moc_jax.cloud import CloudError
from moc_jax.codecs import Codec, fit_codec, is_fitted
from moc_jax.config import Config, ConfigError, DataConfig
from moc_jax.data.cache import Cache, Entry, Part, at_work, explained, only_one, write_codec
from moc_jax.data.caption_store import embed_captions, fill_store, store_folder
from moc_jax.data.captioning import with_captions
from moc_jax.data.copies import address_of, place_of, prove, pull, send, sync
from moc_jax.data.filters import Filters
from moc_jax.data.folders import count, some
from moc_jax.data.manifest import (
    CODEC,
    COLUMNS,
    MANIFEST,
    OTHER_DATA,
    VERSION,
    DataError,
    Manifest,
    SceneEntry,
    ShotEntry,
    check_settings,
    damaged_shards,
    deciding,
    latent_shape,
    load_manifest,
    read_manifest,
    scene_table,
    settings_of,
    shard_table,
    source_map,
    verify,
)
from moc_jax.data.sources import Source, Sources, find_sources
from moc_jax.data.work import Work, listed
from moc_jax.files import is_address, prove_folder, remove_partial_folders, whole_folder


def prepare(
    cfg: Config,
    codec: Codec | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    check: bool = False,
    shown: bool = True,
    known: str | None = None,
) -> Manifest:
    """The encoded scenes of `cfg.data`: what the cache lacks of them is made.

    `data.cache` is a cache; or it is one of the folders in it that a run is made of, which is then used as it is,
    provided that it fits the config.

    Args:
        codec: what to encode with; None: the one that was fitted for this cache last, or else one is fitted.
        part: (i, n): this is the i-th of n processes. Each begins with a share of its own and takes over what is left
            of the others'; all return when everything is done.
        check: also read what is there already, and encode again what is damaged.
        shown: with progress.
        known: the fingerprint that the data must have; None: any.

    Raises:
        ConfigError, CaptionError: before any video is opened.
        DataError: data that is not `known`, before any video is opened; a prepared folder that does not fit, no usable
            training video, or a disk that is full.
    """
    root = _root(cfg)
    if os.path.isfile(root / MANIFEST):
        return _given(cfg, codec, root, check=check, known=known)
    codec = _unfitted(cfg) if codec is None else codec
    sources, cache = find_sources(cfg.data), Cache(root, cfg)
    with explained(root):
        cache.look()
        before, reused = cache.newest_codec(), ""
        if codec is None and not cfg.data.refit_codec and (kept := cache.codec()):
            codec, file = kept
            reused = f"encoded with {file.relative_to(root)}, fitted before; --data.refit-codec True fits another"
        if codec is not None:
            _check_known(root, _fingerprint(cfg, sources, codec), known, cfg, sources)
        if codec is not None and not check and (manifest := _found(root / _fingerprint(cfg, sources, codec))):
            return _with_captions(_noted(manifest, sources.notes), cfg)
        if address_of(root):
            prove(root)
        else:
            prove_folder(root, setting="data.cache")
        cache.clear()
        fill_store(store_folder(root, cfg.text), cfg.text, _given_captions(sources))  # too long ones are found now
        work = Work(cfg, sources, cache, part, check=check, shown=shown)
        with at_work(root):
            codec = codec or work.fit(after=before if cfg.data.refit_codec else -1)
            entries = work.encode(codec)
            made = _manifest(cfg, sources, codec, entries, root / _fingerprint(cfg, sources, codec), reused)
            with only_one(root):
                manifest = _kept(made, codec)
                for name in (COLUMNS, CODEC, MANIFEST):
                    send(manifest.folder / name)
        return _with_captions(_noted(manifest, [*sources.notes, *work.notes]), cfg, compared=check)


def check_sources(cfg: Config) -> None:
    """What `prepare` does before it opens a video, for the first of several processes: errors are raised once, and
    captions are encoded once."""
    root = _root(cfg)
    if not os.path.isfile(root / MANIFEST):
        _unfitted(cfg)
        sources = find_sources(cfg.data)
        with explained(root):
            fill_store(store_folder(root, cfg.text), cfg.text, _given_captions(sources))


def _unfitted(cfg: Config) -> Codec | None:
    """A codec that isn't fitted: what is wrong with its files is found before anything is read or encoded."""
    return None if is_fitted(cfg.codec) else fit_codec(cfg.codec, ())


def _root(cfg: Config) -> Path:
    """The cache, or the copy of one in a bucket; raises ConfigError where it can be none."""
    try:
        root = place_of(cfg.data.cache)
        if address := address_of(root):
            if cloud.look(f"{address}/{MANIFEST}"):
                pull(root)
            elif cloud.is_empty(address):  # one that is not may hold what is looked for
                prove(root)
            root.mkdir(parents=True, exist_ok=True)
            return root
    except CloudError as error:
        raise ConfigError(f"data.cache: {error}") from error
    if not (os.path.isfile(root / MANIFEST) or (os.path.isdir(root) and any(root.glob(f"*/{MANIFEST}")))):
        prove_folder(root, setting="data.cache")  # one that is read-only may hold what is looked for
    return root


def _given(cfg: Config, codec: Codec | None, folder: Path, *, check: bool, known: str | None) -> Manifest:
    """A folder that `data.cache` names itself."""
    manifest = load_manifest(folder)
    if known not in (None, manifest.fingerprint):
        raise DataError(f"this run was trained on other data than {folder} holds; {OTHER_DATA}")
    check_settings(manifest, cfg)
    if codec is not None and manifest.codec_fingerprint != codec.fingerprint:
        raise DataError(
            f"the data in {folder} was encoded with codec {manifest.codec_fingerprint}, but this run's is "
            f"{codec.fingerprint}; point data.cache elsewhere"
        )
    if check:
        verify(manifest, range(len(manifest.shards)))
    return _with_captions(manifest, cfg, compared=check)


def _fingerprint(cfg: Config, sources: Sources, codec: Codec) -> str:
    def identity(source: Source) -> list[object]:
        texts = source.captions
        shots = texts.caption, texts.shots, texts.cuts, texts.cut_unit, texts.default_shot, texts.video
        return [source.name, source.split, source.digest, source.weight, source.still, *shots]

    whole = [VERSION, deciding(settings_of(cfg)), codec.fingerprint, sorted(map(identity, sources), key=json.dumps)]
    return hashlib.sha256(json.dumps(whole).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _check_known(cache: Path, fingerprint: str, known: str | None, cfg: Config, sources: Sources) -> None:
    """Raises DataError unless the data is what is known, with what differs as far as the cache still tells."""
    if known in (None, fingerprint):
        return
    sync(cache / str(known), last=MANIFEST)
    differing = ""
    if (cache / str(known) / MANIFEST).is_file():
        with contextlib.suppress(DataError):
            then, now = read_manifest(cache / str(known)), {source.name: source.digest for source in sources}
            kept = [name for name in now if name in then.sources]
            counts = {
                "new": len(now) - len(kept),
                "gone": len(then.sources) - len(kept),
                "changed": sum(then.sources[name] != now[name] for name in kept),
            }
            videos = ", ".join(f"{count(number, 'video')} {what}" for what, number in counts.items() if number)
            settings = deciding(settings_of(cfg))
            others = [f"{key} = {settings[key]!r}" for key in settings if then.settings.get(key) != settings[key]]
            differing = f" ({'; '.join([*filter(None, [videos]), *others]) or 'captions or splits differ'})"
    raise DataError(f"this run was trained on other data than it is given now{differing}; {OTHER_DATA}")


def _found(folder: Path) -> Manifest | None:
    """What was prepared before; None if it was not, or is not there in full."""
    sync(folder, last=MANIFEST)
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if manifest.fingerprint != folder.name:
        raise DataError(
            f"{folder} holds the data of {manifest.fingerprint}, according to its manifest; rename it back, or delete "
            "it and prepare the data again"
        )
    return None if any(damaged_shards(manifest)) else manifest


def _kept(made: Manifest, codec: Codec) -> Manifest:
    """The manifest in its folder, which appears as a whole; nobody else writes in the cache now."""
    folder = made.folder
    if not (folder / MANIFEST).is_file():
        shutil.rmtree(folder, ignore_errors=True)  # without a manifest it is nothing
        remove_partial_folders(folder.parent, "[0-9a-f]" * len(folder.name))  # of other fingerprints, too
        with whole_folder(folder) as partial:
            write_codec(partial / CODEC, codec)
            dataclasses.replace(made, folder=partial).save()
    elif read_manifest(folder).shards != made.shards:  # what was damaged was encoded to other bits
        made.save()
    return read_manifest(folder)


def _noted(manifest: Manifest, notes: Sequence[str]) -> Manifest:
    """With notes on the sources as they are now: other files may have come or gone since it was made."""
    return dataclasses.replace(manifest, notes=(*notes, *manifest.notes))


# ------------------------------------------------------------------------------------------------ captions


def _with_captions(manifest: Manifest, cfg: Config, *, compared: bool = False) -> Manifest:
    """The manifest, once its cache holds its captions by this encoder; with notes if that had to be repaired.
    `compared`: its shards were."""
    with explained(manifest.folder.parent):
        notes = embed_captions(manifest, cfg.text, full=cfg.data.verify == "full")
    return dataclasses.replace(manifest, notes=(*manifest.notes, *notes), compared=compared)


def _given_captions(sources: Sources) -> dict[str, str]:
    """The captions that are known before the shots are, with the file that each comes from."""
    found = {}
    for source in sources:
        captions = source.captions
        for caption in (captions.caption, *captions.shots, captions.shot(len(captions.shots))):
            found.setdefault(caption, captions.where or str(source.path))
    return found


# ------------------------------------------------------------------------------------------------ the manifest


def _manifest(
    cfg: Config, sources: Sources, codec: Codec, entries: Sequence[Entry], folder: Path, reused: str
) -> Manifest:
    """What a run is made of."""
    of = list(zip(sources, entries, strict=True))
    skipped = {source.name: entry.skipped for source, entry in of if entry.skipped}
    used = [(source, entry) for source, entry in of if not entry.skipped]
    shards = {entry.shard.file: entry.shard for _, entry in used}
    numbers = {file: number for number, file in enumerate(shards)}
    remarks = list(_remarks(used, asked=bool(cfg.data.caption_command)))
    used = with_captions(cfg.data, used, folder.parent)
    kept, dropped = _filtered(used, cfg.data)
    scenes = [
        scene
        for (source, entry), parts in zip(used, kept)
        for scene in _scenes(source, entry.parts, parts, numbers[entry.shard.file], cfg.data)
    ]
    if not any(scene.split == "train" for scene in scenes):
        reasons = listed(skipped) + "".join(f"\n  {reason}" for reason in dropped)
        raise DataError(f"no training scene is left of {len(sources)} files{reasons}")
    parts = [entry.parts[k] for (_, entry), of in zip(used, kept) for k in of]
    frames = sum(sum(entry.shots) for _, entry in used)
    psnr = dict[str, list[float]]()
    for source, entry in used:
        psnr.setdefault(source.split, []).extend(entry.psnr)
    return Manifest(
        folder=folder,
        fingerprint=folder.name,
        settings=settings_of(cfg),
        origin=tuple(map(_whole, [*cfg.data.source, "", *cfg.data.validation_source])),
        sources=source_map({source.name: source.digest for source in sources}),
        codec_fingerprint=codec.fingerprint,
        codec_psnr={split: float(np.mean(values)) for split, values in psnr.items()},
        latent_shape=latent_shape(cfg),
        scenes=scene_table(scenes),
        shards=shard_table(shards.values()),
        skipped=skipped,
        notes=tuple([*remarks, *dropped, *([reused] if reused else [])]),
        counts={
            "files": len(used),
            "shots": len(parts),
            "short_shots": sum(len(e.shots) - len({part.shot for part in e.parts}) for _, e in used),
            "frames": frames,
            "unused_frames": frames - sum(part.frames for part in parts),
            "latent_frames": sum(part.latent_frames for part in parts),
        },
    )


def _whole(source: str) -> str:
    return source if is_address(source) else os.path.abspath(source)


def _filtered(used: Sequence[tuple[Source, Entry]], cfg: DataConfig) -> tuple[list[list[int]], list[str]]:
    """Which parts of each file stay, and why others don't."""
    filters, kept, dropped = Filters(cfg.filters), [], []
    for source, entry in used:
        kept.append([])
        for number, part in enumerate(entry.parts):
            name = f"{source.name}, shot {part.shot + 1}, from {part.start / cfg.fps:.1f} s on"
            if reason := filters.reason(name, part.look, still=source.still):
                dropped.append(f"left out {name}: {reason}")
            else:
                kept[-1].append(number)
    if dropped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in filters.count.most_common())
        dropped.append(f"data.filters left out {len(dropped):,} shots: {kinds}")
    return kept, dropped


def _scenes(
    source: Source, parts: Sequence[Part], kept: Sequence[int], shard: int, cfg: DataConfig
) -> Iterator[SceneEntry]:
    """The scenes of one file: its parts in order, split as evenly as can be, and where one is left out."""
    for number, group in enumerate(_groups(parts, kept, cfg)):
        shots = [parts[k] for k in group]
        yield SceneEntry(
            name=f"{source.name}#{number}",
            source=source.name,
            split=source.split,
            caption=source.captions.caption,
            weight=source.weight,
            shots=tuple(
                ShotEntry(
                    caption=source.captions.shot(part.shot),
                    frames=part.latent_frames,
                    start=part.start,
                    continues=k > 0 and shots[k - 1].shot == part.shot,
                )
                for k, part in enumerate(shots)
            ),
            shard=shard,
            record=group[0],
        )


def _groups(parts: Sequence[Part], kept: Sequence[int], cfg: DataConfig) -> Iterator[list[int]]:
    """Which parts make a scene each; none of them is left out in its middle."""

    def is_long(k: int) -> bool:
        near = parts[max(k - 1, 0) : k + 2]
        return cfg.long_shots == "scenes" and sum(part.shot == parts[k].shot for part in near) > 1

    for (alone, _), run in itertools.groupby(enumerate(kept), lambda at: (is_long(at[1]), at[1] - at[0])):
        numbers = [k for _, k in run]
        pieces = len(numbers) if alone else -(-len(numbers) // cfg.shots_per_scene)
        yield from (piece.tolist() for piece in np.array_split(numbers, pieces))


def _remarks(used: Sequence[tuple[Source, Entry]], *, asked: bool) -> Iterator[str]:
    """What the user should know about files that are used, and about their captions; `asked`: a command writes some."""
    for source, entry in used:
        yield from (f"{source.name}: {note}" for note in entry.notes)
        captions, shots = source.captions, len(entry.shots)
        expected = len(captions.shots) if captions.cuts is None else len(captions.cuts) + 1
        if captions.cuts is not None and expected != shots:
            yield f"{captions.where}: its cuts make {expected} shots, but the video ends after {shots}"
        elif captions.shots and expected != shots and not (asked and expected < shots):
            rest = "the rest go unused" if expected > shots else "the others have the default caption"
            yield f"{captions.where}: captions for {expected} shots, but {shots} were found; {rest}"
    bare = [source.name for source, _ in used if source.captions.file is None]
    if bare and not asked:  # perhaps on purpose, perhaps for a caption file of another name
        yield f"{len(bare)} of {len(used)} files have no caption file but the defaults: {some(bare)}"
