"""A folder of encoded scenes: `manifest.json`, `codec.npz` and ArrayRecord shards with one record per scene."""

import collections
import dataclasses
import functools
import hashlib
import json
import re
import typing
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moc_jax.codecs import Codec, load_codec
from moc_jax.config import CodecConfig, Config, DataConfig
from moc_jax.config_json import settings_from_tree
from moc_jax.data.sources import Split
from moc_jax.errors import Failure
from moc_jax.progress import track
from moc_jax.reading import parse_json
from moc_jax.showing import printable, shown

VERSION = 4
MANIFEST, CODEC = "manifest.json", "codec.npz"
COUNTS = {"files", "shots", "short_shots", "frames", "cut_frames", "latent_frames"}


class DataError(Failure):
    """Prepared data that cannot be made, or is damaged or does not belong to the configuration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShotEntry:
    caption: str
    frames: int
    """Latent frames."""
    start: int
    """Its first frame in the video, at the frame rate of the data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneEntry:
    name: str
    """The source's name and the scene's number in it."""
    source: str
    split: Split
    caption: str
    shots: tuple[ShotEntry, ...]
    shard: int
    record: int

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
    sources: dict[str, str]
    """Digest of each source, by name."""
    codec_fingerprint: str
    codec_psnr: dict[str, float]
    """By split: the mean PSNR, in dB, of the codec's reconstruction of the first frames of shots."""
    latent_shape: tuple[int, int, int]
    """Rows, columns and channels of a latent frame."""
    scenes: tuple[SceneEntry, ...]
    shards: tuple[ShardEntry, ...]
    skipped: dict[str, str]
    """Files that were left out, with the reason."""
    notes: tuple[str, ...]
    """What the user should know about files that were used."""
    counts: dict[str, int]

    def split(self, split: Split) -> list[SceneEntry]:
        """The scenes of one split."""
        return [scene for scene in self.scenes if scene.split == split]

    def summary(self) -> str:
        """What was used, what was left out, and why."""
        of = collections.Counter(scene.split for scene in self.scenes)
        c, words = self.counts, {"train": "training", "validation": "held-out"}
        quality = (f"PSNR {value:.1f} dB on {words[split]} scenes" for split, value in sorted(self.codec_psnr.items()))
        lines = [
            f"{of['train']} training and {of['validation']} held-out scenes from {c['files']} files: "
            f"{c['shots']} shots, {c['latent_frames']} latent frames ({self.folder})",
            f"left out: {len(self.skipped)} files, {c['short_shots']} short shots, {c['cut_frames']} of "
            f"{c['frames']} frames at the ends of shots",
            f"the codec's reconstruction, which no sample surpasses: {', '.join(quality)}",
            *(f"  skipped {name}: {reason}" for name, reason in self.skipped.items()),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(map(printable, lines))

    def save(self) -> None:
        """Writes manifest.json into the folder, with a digest of what it says."""
        content = dataclasses.asdict(self)
        del content["folder"]
        content = {"version": VERSION, "sha256": _digest(content), **content}
        (self.folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def load_manifest(folder: str | Path) -> Manifest:
    """Reads manifest.json and checks that all shards are there in full.

    Raises:
        DataError: the manifest is missing, damaged, edited or of another version, or a shard's size differs; names the
            file.
    """
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
        manifest = Manifest(folder=folder, **_fields(Manifest, content, "", left_out=("folder",)))
        _check_consistent(manifest)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete {folder} and prepare the data again") from error
    for shard in manifest.shards:
        file = folder / shard.file
        size = file.stat().st_size if file.is_file() else None
        if size != shard.size:
            state = "is missing" if size is None else f"has {size} bytes instead of {shard.size}"
            raise DataError(f"the shard {file} {state}; delete {folder} and prepare the data again")
    return manifest


def _digest(content: dict[str, object]) -> str:
    """SHA-256 of what a manifest says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fields(kind: type, tree: object, where: str, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of the dataclass `kind`, each of its type; raises ValueError naming the first that is not."""
    hints = _hints(kind)
    names = hints.keys() - set(left_out)
    if not isinstance(tree, dict) or tree.keys() != names:
        raise ValueError(f"{where or 'it'} must have the fields {', '.join(sorted(names))}, not {shown(tree)}")
    return {name: _value(hints[name], tree[name], f"{where}.{name}".lstrip(".")) for name in tree}


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _value(kind: Any, tree: object, where: str) -> Any:
    """What JSON holds, as `kind` says: a dataclass, tuple, dict, Literal, int, float or str."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return typing.cast(type, kind)(**_fields(typing.cast(type, kind), tree, where))
    if origin is tuple and isinstance(tree, list):
        kinds = arguments[:1] * len(tree) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(tree):
            return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, tree)))
    if origin is dict and isinstance(tree, dict):
        return {key: _value(arguments[1], value, f"{where}[{shown(key)}]") for key, value in tree.items()}
    if (
        kind is object
        or (origin is Literal and tree in arguments)
        or (kind in (int, float, str) and type(tree) is kind)
    ):
        return tree
    raise ValueError(f"{where} is {shown(tree)}; it must be {getattr(kind, '__name__', kind)}")


def _check_consistent(manifest: Manifest) -> None:
    """Raises ValueError for what no program can have written."""
    for k, shard in enumerate(manifest.shards):
        if not re.fullmatch(r"\w[\w.-]{0,199}", shard.file):
            raise ValueError(f"shards[{k}].file is {shown(shard.file)}; it must be the name of a file in the folder")
    for k, scene in enumerate(manifest.scenes):
        held = manifest.shards[scene.shard].records if 0 <= scene.shard < len(manifest.shards) else 0
        if not 0 <= scene.record < held:
            raise ValueError(f"scenes[{k}] is record {scene.record} of shard {scene.shard}, which does not exist")
        if not scene.shots or min(shot.frames for shot in scene.shots) < 1:
            raise ValueError(f"scenes[{k}] must have shots of at least one frame")
    if len({scene.name for scene in manifest.scenes}) < len(manifest.scenes):
        raise ValueError("two scenes have the same name")
    if not manifest.codec_psnr.keys() <= set(typing.get_args(Split)):
        raise ValueError(f"codec_psnr is {shown(manifest.codec_psnr)}; it must be by split")
    if missing := COUNTS - manifest.counts.keys():
        raise ValueError(f"counts lacks {', '.join(sorted(missing))}")


def verify(manifest: Manifest, shards: Iterable[int]) -> None:
    """Reads the shards of these numbers and compares their checksums.

    Raises:
        DataError: a shard cannot be read, or its content has changed; names it.
    """
    for number in track(list(shards), "checking shards", unit="file", keep=False):
        shard = manifest.shards[number]
        path = manifest.folder / shard.file
        try:
            found = sha256(path)
        except OSError as error:
            raise DataError(f"the shard {path} cannot be read ({error})") from error
        if found != shard.sha256:
            raise DataError(
                f"the shard {path} is damaged: its SHA-256 is {found[:12]}… instead of {shard.sha256[:12]}…; "
                f"delete {manifest.folder} and prepare the data again"
            )


def codec_of(manifest: Manifest) -> Codec:
    """The codec that the scenes were encoded with.

    Raises:
        DataError: its file is missing or damaged.
    """
    path = manifest.folder / CODEC
    prefix = "codec."
    settings = {k.removeprefix(prefix): value for k, value in manifest.settings.items() if k.startswith(prefix)}
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            codec = load_codec(settings_from_tree(CodecConfig, settings, "codec", name=str(path)), dict(arrays))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read ({error}); delete {manifest.folder} and prepare the data again"
        ) from error
    if codec.fingerprint != manifest.codec_fingerprint:
        raise DataError(f"{path} is not the codec that the scenes were encoded with; prepare the data again")
    return codec


# What the encoded scenes depend on; all else in the config can change without preparing again.
_DATA_FIELDS = (
    *("height", "width", "fps", "min_shot_frames", "max_shot_frames", "shot_threshold", "shots_per_scene"),
    *("default_caption", "default_shot_caption", "keyframes"),
)


def settings_of(cfg: Config) -> dict[str, object]:
    """The settings that prepared data depends on, by dotted name, as JSON would give them back."""
    assert {f.name for f in dataclasses.fields(DataConfig)} >= set(_DATA_FIELDS)
    settings = {f"codec.{key}": value for key, value in dataclasses.asdict(cfg.codec).items()}
    settings |= {f"data.{key}": getattr(cfg.data, key) for key in _DATA_FIELDS}
    settings["model.patch[0]"] = cfg.model.patch[0]
    return parse_json(json.dumps(settings))


def check_settings(manifest: Manifest, cfg: Config) -> None:
    """Raises DataError, naming each field, if the scenes were encoded under other settings than `cfg`."""
    ours = settings_of(cfg)
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
