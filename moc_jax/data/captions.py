"""What a video shows, in words: a caption file beside it, or defaults.

`clip.yaml` (or .yml, .json) beside `clip.mp4`:

    caption: A quiet street in the morning.     # of the whole video
    shots:                                      # of each shot, in order
      - A van waits at the lights.
      - caption: A cyclist looks back.
    cuts: [1.2, 3.04]                           # optional, seconds: the shots' borders, instead of detecting them

All keys are optional; what is missing is filled with `DataConfig.default_caption` and `default_shot_caption`. A plain
text file, `clip.txt`, is the caption of the whole video, its lines joined. Capitals in the suffix make no difference,
and an empty file gives the defaults.
"""

import dataclasses
import difflib
import itertools
import math
import os
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from moc_jax.config import DataConfig
from moc_jax.documents import DocumentError, checked_text, read_document, read_text
from moc_jax.errors import Failure
from moc_jax.showing import shown

SUFFIXES = (".yaml", ".yml", ".json", ".txt")


class CaptionError(Failure, ValueError):
    """A caption file that cannot be used; the message names the file, the key and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions:
    """The captions of one video."""

    file: Path | None
    """The caption file; None: all captions are defaults."""
    caption: str
    shots: tuple[str, ...]
    """Given captions only; further shots get `default_shot`."""
    cuts: tuple[float, ...] | None
    """Borders between shots in seconds; None: detect them."""
    default_shot: str
    video: str
    """The video's file name without its suffix."""

    def shot(self, index: int) -> str:
        """The caption of shot `index`, counted from 0."""
        if index < len(self.shots):
            return self.shots[index]
        # A name that is not UTF-8 has no letters for its other bytes.
        name = os.fsencode(self.video).decode("utf-8", "replace")
        return _fill_in(self.default_shot, {"shot": str(index + 1), "file": name})


def load_captions(video: Path, cfg: DataConfig, beside: Mapping[str, Sequence[Path]] | None = None) -> Captions:
    """The captions of `video`, from the file beside it if there is one.

    Args:
        video: the video as it was found: a link's captions lie beside the link.
        cfg: the defaults.
        beside: `caption_files` of its folder, for who reads many; None looks there.

    Raises:
        CaptionError: the file, or the default in the config, is not as described above.
    """
    try:
        _fill_in(cfg.default_shot_caption, {"shot": "1", "file": ""})
    except ValueError as error:
        raise CaptionError(
            f"data.default_shot_caption = {shown(cfg.default_shot_caption)} cannot be filled in ({error}); "
            "it may hold {shot} and {file}, and literal braces are doubled"
        ) from None
    found = (caption_files(video.parent) if beside is None else beside).get(video.stem, ())
    if len(found) > 1:
        raise CaptionError(f"{video} has several caption files: {', '.join(p.name for p in found)}; keep one")
    content = _parse(found[0]) if found else _Content()
    return Captions(
        file=found[0] if found else None,
        caption=cfg.default_caption if content.caption is None else content.caption,
        shots=content.shots,
        cuts=content.cuts,
        default_shot=cfg.default_shot_caption,
        video=video.stem,
    )


def caption_files(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder that look like captions, by the name of the video that they belong to, suffix left out.

    Raises:
        CaptionError: the folder cannot be read.
    """
    found: dict[str, list[Path]] = {}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return found
    except OSError as error:
        raise CaptionError(f"{folder} cannot be searched for captions: {error.strerror}") from error
    paths = [path for name in names if (path := folder / name).suffix.lower() in SUFFIXES]
    for path in sorted(paths, key=lambda path: (SUFFIXES.index(path.suffix.lower()), path.name)):
        found.setdefault(path.stem, []).append(path)
    return found


def _fill_in(template: str, values: dict[str, str]) -> str:
    """Puts `values` in place of {names}: no attributes, no formats, nothing but these names.

    Raises:
        ValueError: another name, or a brace alone.
    """
    filled = []
    for text, name, spec, conversion in string.Formatter().parse(template):
        filled.append(text)
        if name is not None:
            if name not in values or spec or conversion:
                raise ValueError(f"{{{name[:60]}}} is not one of {', '.join(f'{{{known}}}' for known in values)}")
            filled.append(values[name])
    return "".join(filled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Content:
    """What a caption file says; None where it is silent."""

    caption: str | None = None
    shots: tuple[str, ...] = ()
    cuts: tuple[float, ...] | None = None


def _parse(file: Path) -> _Content:
    try:
        if file.suffix.lower() == ".txt":
            return _Content(caption=checked_text(" ".join(read_text(file).split())) or None)
        document = read_document(file)
    except DocumentError as error:
        raise CaptionError(f"{file} cannot be read: {error}") from error
    content = _checked_keys(file, "the file", {} if document is None else document, ("caption", "shots", "cuts"))
    shots = content.get("shots", [])
    if not isinstance(shots, list):
        raise CaptionError(f"{file}: shots is {shown(shots)}; it must be a list, one entry per shot")
    parsed = _Content(
        caption=_text(file, "caption", content["caption"]) if "caption" in content else None,
        shots=tuple(_shot(file, f"shots[{k}]", entry) for k, entry in enumerate(shots)),
        cuts=_cuts(file, content["cuts"]) if "cuts" in content else None,
    )
    if parsed.cuts is not None and len(parsed.shots) > len(parsed.cuts) + 1:
        raise CaptionError(
            f"{file}: {len(parsed.cuts)} cuts make {len(parsed.cuts) + 1} shots, but shots has "
            f"{len(parsed.shots)} captions; remove captions or add cuts"
        )
    return parsed


def _checked_keys(file: Path, where: str, content: object, known: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(content, dict):
        keys = ", ".join(known)
        example = f"; write caption: {shown(content)}" if isinstance(content, str) else ""
        raise CaptionError(f"{file}: {where} holds {shown(content)}; it must hold the keys {keys}{example}")
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:60], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            # YAML takes text with a colon for a key and a value.
            if len(content) == 1 and isinstance(content[key], str) and not near:
                hint += f'; if it is text, put it in quotes: "{str(key)[:60]}: {content[key][:60]}"'
            raise CaptionError(f"{file}: {where} has the unknown key {shown(key)}; {hint}")
    return content


def _text(file: Path, where: str, value: object) -> str:
    if not isinstance(value, str):
        raise CaptionError(
            f"{file}: {where} is {shown(value)} ({type(value).__name__}); it must be text, in quotes if necessary"
        )
    try:
        return checked_text(value)
    except DocumentError as error:
        raise CaptionError(f"{file}: {where}: {error}") from error


def _shot(file: Path, where: str, entry: object) -> str:
    if isinstance(entry, str):
        return _text(file, where, entry)
    keys = _checked_keys(file, where, entry, ("caption",))
    if "caption" not in keys:
        raise CaptionError(f"{file}: {where} lacks its caption")
    return _text(file, f"{where}.caption", keys["caption"])


def _cuts(file: Path, value: object) -> tuple[float, ...]:
    numbers = isinstance(value, list) and all(type(cut) in (int, float) for cut in value)
    if not (numbers and all(a < b < math.inf for a, b in itertools.pairwise([0, *value]))):
        raise CaptionError(f"{file}: cuts is {shown(value)}; it must be a list of rising times in seconds, all above 0")
    return tuple(float(cut) for cut in value)
