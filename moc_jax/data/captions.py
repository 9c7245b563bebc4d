"""What a video shows, in words: a caption file beside it, or defaults.

`clip.yaml` (or .yml, .json) beside `clip.mp4`:

    caption: A quiet street in the morning.     # of the whole video
    shots:                                      # of each shot, in order
      - A van waits at the lights.
      - caption: A cyclist looks back.
    cuts: [1.2, 3.04]                           # optional, seconds: the shots' borders, instead of detecting them

All keys are optional; what is missing is filled with `DataConfig.default_caption` and `default_shot_caption`. A plain
text file, `clip.txt`, is the caption of the whole video, its lines joined. Capitals in the suffix make no difference,
and an empty file gives the defaults. Scene files of other projects (moc_jax/stories.py) are read, too, and of
`video/x/clip.mp4` the caption may lie at `caption/x/clip.json`, as LongLive has it.
"""

import dataclasses
import difflib
import itertools
import math
import os
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from moc_jax.config import DataConfig
from moc_jax.documents import DocumentError, checked_text, read_document, read_text
from moc_jax.errors import Failure
from moc_jax.showing import shown
from moc_jax.stories import Story, parse_story

SUFFIXES = (".yaml", ".yml", ".json", ".txt")


class CaptionError(Failure, ValueError):
    """A caption file that cannot be used; the message names the file, the key and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions:
    """The captions of one video."""

    file: Path | None
    """The caption file; None: all captions are defaults."""
    line: int | None = None
    """Its line, if it has one for each video."""
    caption: str
    shots: tuple[str, ...]
    """Given captions only; further shots get `default_shot`."""
    cuts: tuple[float, ...] | None
    """Borders between shots; None: detect them."""
    cut_unit: Literal["seconds", "frames"] = "seconds"
    """Frames are those of the file."""
    default_shot: str
    video: str
    """The video's file name without its suffix."""

    @property
    def where(self) -> str:
        """Where they stand, for messages; empty: nowhere."""
        return "" if self.file is None else str(self.file) if self.line is None else f"{self.file}, line {self.line}"

    def shot(self, index: int) -> str:
        """The caption of shot `index`, counted from 0."""
        if index < len(self.shots):
            return self.shots[index]
        # A name that is not UTF-8 has no letters for its other bytes.
        name = os.fsencode(self.video).decode("utf-8", "replace")
        return _fill_in(self.default_shot, {"shot": str(index + 1), "file": name})


def load_captions(
    video: Path, cfg: DataConfig, beside: Callable[[Path], Mapping[str, Sequence[Path]]] | None = None
) -> Captions:
    """The captions of `video`, from the file beside it if there is one.

    Args:
        video: the video as it was found: a link's captions lie beside the link.
        cfg: the defaults.
        beside: gives the `caption_files` of a folder, for who reads many; None looks there.

    Raises:
        CaptionError: the file, or the default in the config, is not as described above.
    """
    _check_default(cfg)
    beside = beside or caption_files
    found, mirrored = beside(video.parent).get(video.stem, ()), False
    if not found and (other := mirror(video.parent)) is not None:
        found, mirrored = beside(other).get(video.stem, ()), True
    if len(found) > 1:
        raise CaptionError(f"{video} has several caption files: {', '.join(p.name for p in found)}; keep one")
    return filled(_parse(found[0], mirrored=mirrored) if found else Content(), video, cfg, found[0] if found else None)


def filled(content: "Content", video: Path, cfg: DataConfig, file: Path | None, line: int | None = None) -> Captions:
    """What a caption file, or a line of it, says about `video`, with the defaults where it is silent.

    Raises:
        CaptionError: the default in the config cannot be filled in.
    """
    _check_default(cfg)
    frames = None if content.cut_frames is None else tuple(map(float, content.cut_frames))
    return Captions(
        file=file,
        line=line,
        caption=cfg.default_caption if content.caption is None else content.caption,
        shots=content.shots,
        cuts=content.cuts if frames is None else frames,
        cut_unit="seconds" if frames is None else "frames",
        default_shot=cfg.default_shot_caption,
        video=video.stem,
    )


def _check_default(cfg: DataConfig) -> None:
    try:
        _fill_in(cfg.default_shot_caption, {"shot": "1", "file": ""})
    except ValueError as error:
        raise CaptionError(
            f"data.default_shot_caption = {shown(cfg.default_shot_caption)} cannot be filled in ({error}); "
            "it may hold {shot} and {file}, and literal braces are doubled"
        ) from None


_MIRRORS = {"video": "caption", "videos": "captions"}


def mirror(folder: Path) -> Path | None:
    """The folder of captions that has the place of a folder of videos: `caption/x` of `video/x`."""
    for at, part in reversed(list(enumerate(folder.parts))):
        if part in _MIRRORS:
            return Path(*folder.parts[:at], _MIRRORS[part], *folder.parts[at + 1 :])
    return None


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
class Content:
    """What a caption file says; None where it is silent."""

    caption: str | None = None
    shots: tuple[str, ...] = ()
    cuts: tuple[float, ...] | None = None
    """In seconds."""
    cut_frames: tuple[int, ...] | None = None
    """Instead, in frames of the file."""

    def check(self) -> None:
        """Raises DocumentError for more captions than shots."""
        cuts = self.cuts if self.cut_frames is None else self.cut_frames
        if cuts is not None and len(self.shots) > len(cuts) + 1:
            raise DocumentError(
                f"{len(cuts)} cuts make {len(cuts) + 1} shots, but shots has {len(self.shots)} captions; remove "
                "captions or add cuts"
            )


def _parse(file: Path, *, mirrored: bool) -> Content:
    """`mirrored`: in a folder of another project's captions, whose files may hold more."""
    try:
        if file.suffix.lower() == ".txt":
            return Content(caption=checked_text(" ".join(read_text(file).split())) or None)
        document = read_document(file)
        if (story := parse_story(document)) is not None:
            return _of_story(story)
    except DocumentError as error:
        raise CaptionError(f"{file} cannot be read: {error}") from error
    if mirrored and isinstance(document, dict):
        document = {key: value for key, value in document.items() if key == "caption"}
    content = _checked_keys(file, "the file", {} if document is None else document, ("caption", "shots", "cuts"))
    shots = content.get("shots", [])
    if not isinstance(shots, list):
        raise CaptionError(f"{file}: shots is {shown(shots)}; it must be a list, one entry per shot")
    try:
        parsed = Content(
            caption=_text(file, "caption", content["caption"]) if "caption" in content else None,
            shots=tuple(_shot(file, f"shots[{k}]", entry) for k, entry in enumerate(shots)),
            cuts=parsed_cuts(content["cuts"]) if "cuts" in content else None,
        )
        parsed.check()
    except DocumentError as error:
        raise CaptionError(f"{file}: {error}") from error
    return parsed


def _of_story(story: Story) -> Content:
    """A prompt that continues the one before belongs to the same shot."""
    shots: list[str] = []
    for shot in story.shots:
        if shot.continues:
            shots[-1] = f"{shots[-1]} {shot.caption}"
        else:
            shots.append(shot.caption)
    return Content(caption=story.caption or None, shots=tuple(shots), cut_frames=story.cut_frames)


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


def parsed_cuts(value: object) -> tuple[float, ...]:
    """Cuts in seconds; raises DocumentError where they are not rising times."""
    numbers = isinstance(value, list) and all(type(cut) in (int, float) for cut in value)
    if not (numbers and all(a < b < math.inf for a, b in itertools.pairwise([0, *value]))):
        raise DocumentError(f"cuts is {shown(value)}; it must be a list of rising times in seconds, all above 0")
    return tuple(float(cut) for cut in value)
