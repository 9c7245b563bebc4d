"""A run's data: a folder with `manifest.json`, `columns` and `codec.npz`, in a cache that holds the shards it names.

A shard has what one video file was encoded to, a record for each part of a shot; a scene is several in a row. What
there is a million of lies in columns, which are mapped into memory: scenes, their captions, shards and sources.
"""

import dataclasses
import hashlib
import json
import os
import re
import stat
import typing
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np

from moc_jax.codecs import Codec, load_codec
from moc_jax.config import PLACES, TRADES, CodecConfig, Config, DataConfig
from moc_jax.config_json import settings_from_tree
from moc_jax.data.arrays_file import ArraysFile, write_arrays
from moc_jax.data.copies import address_of, fetched, pull
from moc_jax.data.sources import Split
from moc_jax.data.table import Table, TextMap
from moc_jax.data.typed_json import fields_of
from moc_jax.errors import Failure
from moc_jax.files import whole_file, write_text
from moc_jax.progress import track
from moc_jax.reading import parse_json
from moc_jax.showing import printable, shown

VERSION = 5
MANIFEST, COLUMNS, CODEC, ENCODED = "manifest.json", "columns", "codec.npz", "encoded"
SHARD = re.compile(r"encoded/[0-9a-f]{2}/[0-9a-f]{32}\.array_record")  # in a cache
REMEDY = "moc-prepare --data.verify full with the same settings encodes its video again"
OTHER_DATA = (
    "resume with the same data; or with this, whose first epoch then begins, by --train.allow-new-data True; or start "
    "another run from these weights, by --train.init-from and another --workdir"
)
COUNTS = {"files", "shots", "short_shots", "frames", "unused_frames", "latent_frames"}


class DataError(Failure):
    """Prepared data that cannot be made, or is damaged or does not belong to the configuration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShotEntry:
    caption: str
    frames: int
    """Latent frames."""
    start: int
    """Its first frame in the video, at the frame rate of the data."""
    continues: bool
    """Whether it continues the one before it in the scene: both are parts of one long shot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneEntry:
    name: str
    """The source's name and the scene's number in it."""
    source: str
    split: Split
    caption: str
    weight: int = 1
    """How often it is shown in an epoch of training."""
    shots: tuple[ShotEntry, ...]
    shard: int
    record: int
    """Of its first shot; the others follow."""

    @property
    def frames(self) -> int:
        """Latent frames of all shots."""
        return sum(shot.frames for shot in self.shots)

    @property
    def captions(self) -> tuple[str, ...]:
        """The global caption, then each shot's."""
        return (self.caption, *(shot.caption for shot in self.shots))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardEntry:
    file: str
    """Its path in the cache."""
    records: int
    size: int
    """Bytes."""
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a prepared folder, and how it came about."""

    folder: Path
    fingerprint: str
    settings: dict[str, object]
    """Every setting that the content depends on, by its dotted name."""
    origin: tuple[str, ...]
    """Where videos were looked for, and held-out ones."""
    sources: TextMap
    """Digest of each source, by name."""
    codec_fingerprint: str
    codec_psnr: dict[str, float]
    """By split: the mean PSNR, in dB, of the codec's reconstruction of the first frames of shots."""
    latent_shape: tuple[int, int, int]
    """Rows, columns and channels of a latent frame."""
    scenes: Table[SceneEntry]
    shards: Table[ShardEntry]
    skipped: dict[str, str]
    """Files that were left out, with the reason."""
    notes: tuple[str, ...]
    """What the user should know about files that were used."""
    counts: dict[str, int]
    compared: bool = dataclasses.field(default=False, compare=False)
    """Whether all shards were just compared with their digests."""

    def shard_path(self, shard: int) -> Path:
        """Where a shard lies: in the cache that the manifest's folder is in."""
        return self.folder.parent / self.shards[shard].file

    def split(self, split: Split) -> Table[SceneEntry]:
        """The scenes of one split."""
        return self.scenes.select(np.flatnonzero(self.scenes.chosen("split", split)))

    def summary(self) -> str:
        """What was used, what was left out, and why."""
        of = {split: len(self.split(split)) for split in typing.get_args(Split)}
        parts = int(self.scenes.inner("shots", "continues").sum())
        c, words = self.counts, {"train": "training", "validation": "held-out"}
        quality = (f"PSNR {value:.1f} dB on {words[split]} scenes" for split, value in sorted(self.codec_psnr.items()))
        lines = [
            f"{of['train']} training and {of['validation']} held-out scenes from {c['files']} files: "
            f"{c['shots']} shots{f' ({parts} of them continue the one before)' * bool(parts)}, "
            f"{c['latent_frames']} latent frames ({self.folder})",
            f"left out: {len(self.skipped)} files, {c['short_shots']} short shots; {c['unused_frames']} of "
            f"{c['frames']} frames, there and at the ends of shots ({c['unused_frames'] / max(c['frames'], 1):.1%})",
            f"the codec's reconstruction, which no sample surpasses: {', '.join(quality)}",
            *(f"  skipped {name}: {reason}" for name, reason in self.skipped.items()),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(map(printable, lines))

    def save(self) -> None:
        """Writes columns and manifest.json into the folder, with digests of what they say."""
        with whole_file(self.folder / COLUMNS) as partial:  # the present one may be mapped
            write_arrays(partial, self.scenes.columns | self.shards.columns | self.sources.table.columns)
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _ELSEWHERE}
        content["columns"] = sha256(self.folder / COLUMNS)
        content = {"version": VERSION, "sha256": _digest(content), **content}
        write_text(self.folder / MANIFEST, json.dumps(content, indent=1))


_ELSEWHERE = "folder", "sources", "scenes", "shards", "compared"  # fields that are not in manifest.json


def scene_table(scenes: Iterable[SceneEntry]) -> Table[SceneEntry]:
    """The scenes of a manifest."""
    return Table.of(SceneEntry, scenes, "scenes.")


def shard_table(shards: Iterable[ShardEntry]) -> Table[ShardEntry]:
    """The shards of a manifest."""
    return Table.of(ShardEntry, shards, "shards.")


def source_map(digests: Mapping[str, str]) -> TextMap:
    """The sources of a manifest: digests by name."""
    return TextMap.of(digests, "sources.")


def load_manifest(folder: str | Path) -> Manifest:
    """Reads manifest.json and checks that all shards are there in full.

    Raises:
        DataError: the manifest is missing, damaged, edited or of another version, or a shard's size differs; names the
            file.
    """
    manifest = read_manifest(folder)
    for number, state in damaged_shards(manifest):
        raise DataError(f"the shard {manifest.shard_path(number)} {state}; {REMEDY}")
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """Reads manifest.json alone; errors of `load_manifest`."""
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds {shown(content)}")
        if content.pop("version", None) != VERSION:
            raise DataError(
                f"{path} was written by another version of this program; delete {folder} and prepare the data again"
            )
        if content.pop("sha256", None) != _digest(content):
            raise ValueError("it was changed after it was written: its digest does not match")
        columns = _columns(folder / COLUMNS, content.pop("columns", None))
        manifest = Manifest(folder=folder, **columns, **fields_of(Manifest, content, left_out=_ELSEWHERE))
        _check_consistent(manifest)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete {folder} and prepare the data again") from error
    return manifest


def damaged_shards(manifest: Manifest) -> Iterator[tuple[int, str]]:
    """The shards that are missing or have another size, with what is wrong; of a copy, those in the bucket."""
    cache, shards = os.fspath(manifest.folder.parent), manifest.shards
    held = pull(manifest.folder.parent / ENCODED, lambda _: False) if address_of(manifest.folder) else None
    for number, (file, size) in enumerate(zip(shards.values("file"), shards.column("size").tolist())):
        path = f"{cache}/{file}"
        found = _size(path) if held is None else held[there].object.size if (there := Path(path)) in held else None
        if found is None:
            yield number, "is missing"
        elif found != size:
            yield number, f"has {found} bytes instead of {size}"


def _size(path: str) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def shard_here(manifest: Manifest, number: int) -> Path:
    """Where a shard can be read. Of a copy it is fetched, unless it is there, and compared with its digest.

    Raises:
        DataError: what was fetched has another digest.
        CloudError, OSError: it can't be fetched.
    """
    path, shard = manifest.shard_path(number), manifest.shards[number]
    if fetched(path, shard.size) and (found := sha256(path)) != shard.sha256:
        path.unlink(missing_ok=True)
        raise _damaged(path, found, shard)
    return path


def _damaged(path: Path, found: str, shard: ShardEntry) -> DataError:
    return DataError(
        f"the shard {path} is damaged: its SHA-256 is {found[:12]}… instead of {shard.sha256[:12]}…; {REMEDY}"
    )


class _Columns(TypedDict):
    scenes: Table[SceneEntry]
    shards: Table[ShardEntry]
    sources: TextMap


def _columns(path: Path, digest: object) -> _Columns:
    """Raises OSError or ValueError where they are not those that manifest.json was written with."""
    if sha256(path) != digest:
        raise ValueError(f"{path.name} was changed after it was written: its digest does not match")
    arrays = ArraysFile(path)
    return {
        "scenes": Table.checked(SceneEntry, arrays, "scenes."),
        "shards": Table.checked(ShardEntry, arrays, "shards."),
        "sources": TextMap(Table.checked(TextMap.Entry, arrays, "sources.")),
    }


def _digest(content: dict[str, object]) -> str:
    """SHA-256 of what a manifest says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_consistent(manifest: Manifest) -> None:
    """Raises ValueError for what no program can have written."""
    for k, file in enumerate(manifest.shards.values("file")):
        if not SHARD.fullmatch(file):
            raise ValueError(f"shards[{k}].file is {shown(file)}; it must be a shard's path in the cache")
    scenes, held = manifest.scenes, manifest.shards.column("records")
    empty = scenes.sums("shots", scenes.inner("shots", "frames") < 1) > 0
    for k in np.flatnonzero(empty | (scenes.counts("shots") == 0)).tolist():
        raise ValueError(f"scenes[{k}] must have shots of at least one frame")
    shard, record, exists = scenes.column("shard"), scenes.column("record"), np.zeros(len(scenes), bool)
    inside, end = (shard >= 0) & (shard < len(held)), record + scenes.counts("shots")
    exists[inside] = (record[inside] >= 0) & (end[inside] <= held[shard[inside]])
    for k in np.flatnonzero(~exists).tolist():
        where = f"records {record[k]} to {end[k] - 1} of shard {shard[k]}"
        raise ValueError(f"scenes[{k}] is {where}, which do not exist")
    for k in np.flatnonzero(scenes.column("weight") < 1).tolist():
        raise ValueError(f"scenes[{k}].weight is {scenes[k].weight}; it must be 1 or more")
    if len(np.unique(scenes.column("name"))) < len(scenes):
        raise ValueError("two scenes have the same name")
    if not manifest.codec_psnr.keys() <= set(typing.get_args(Split)):
        raise ValueError(f"codec_psnr is {shown(manifest.codec_psnr)}; it must be by split")
    if missing := COUNTS - manifest.counts.keys():
        raise ValueError(f"counts lacks {', '.join(sorted(missing))}")


def verify(manifest: Manifest, shards: Iterable[int], *, shown: bool = True) -> None:
    """Reads the shards of these numbers and compares their checksums; `shown`: with progress.

    Raises:
        DataError: a shard cannot be read, or its content has changed; names it.
    """
    shards = list(shards)
    for number in track(shards, "checking shards", unit="file", keep=False) if shown else shards:
        shard, path = manifest.shards[number], manifest.shard_path(number)
        try:
            found = sha256(shard_here(manifest, number))
        except OSError as error:
            raise DataError(f"the shard {path} cannot be read ({error})") from error
        if found != shard.sha256:
            raise _damaged(path, found, shard)


def codec_of(manifest: Manifest, cfg: CodecConfig | None = None) -> Codec:
    """The codec that the scenes were encoded with.

    Args:
        cfg: its settings in this run, which say where its files lie now; None: as they were.

    Raises:
        DataError: its file is missing or damaged.
    """
    path = manifest.folder / CODEC
    prefix = "codec."
    settings = {k.removeprefix(prefix): value for k, value in manifest.settings.items() if k.startswith(prefix)}
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            cfg = cfg or settings_from_tree(CodecConfig, settings, "codec", name=str(path))
            codec = load_codec(cfg, dict(arrays))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read ({error}); delete {manifest.folder} and prepare the data again"
        ) from error
    if codec.fingerprint != manifest.codec_fingerprint:
        raise DataError(f"{path} is not the codec that the scenes were encoded with; prepare the data again")
    return codec


# What the encoded scenes depend on; all else in the config can change without preparing again.
_DATA_FIELDS = (
    *("height", "width", "fps", "min_shot_frames", "max_shot_frames", "long_shots", "shot_threshold"),
    "shots_per_scene",
    *("default_caption", "default_shot_caption", "caption_command", "keyframes"),
)


def settings_of(cfg: Config) -> dict[str, object]:
    """The settings that prepared data depends on, by dotted name, as JSON would give them back."""
    assert {f.name for f in dataclasses.fields(DataConfig)} >= set(_DATA_FIELDS)
    settings = {f"codec.{key}": value for key, value in dataclasses.asdict(cfg.codec).items()}
    settings |= {f"data.{key}": getattr(cfg.data, key) for key in _DATA_FIELDS}
    settings |= {f"data.filters.{key}": value for key, value in dataclasses.asdict(cfg.data.filters).items()}
    settings["model.patch[0]"] = cfg.model.patch[0]
    if cfg.condition_channels:  # other models have no need of what these read, and take it as it is
        settings["model.condition_channels"] = cfg.condition_channels
    return parse_json(json.dumps(settings))


def deciding(settings: Mapping[str, object]) -> dict[str, object]:
    """Those of `settings_of` by which scenes are encoded otherwise."""
    return {key: value for key, value in settings.items() if key not in PLACES | TRADES}


def check_settings(manifest: Manifest, cfg: Config) -> None:
    """Raises DataError, naming each field, if the scenes were encoded under other settings than `cfg`."""
    ours = deciding(settings_of(cfg))
    differing = [key for key in ours if manifest.settings.get(key) != ours[key]]
    if differing:
        listed = "; ".join(
            f"{key} = {ours[key]!r}, but it was prepared with {manifest.settings.get(key)!r}" for key in differing
        )
        raise DataError(
            f"the data in {manifest.folder} does not fit the config: {listed}. "
            "Change the config, or point data.cache elsewhere"
        )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def latent_shape(cfg: Config) -> tuple[int, int, int]:
    """Rows, columns and channels of a latent frame."""
    return (*cfg.latent_size, cfg.codec.channels)
