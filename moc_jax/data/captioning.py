"""Captions by a command of the user's: it is shown a contact sheet of each shot that has none.

The command runs once per preparation. For each shot it reads a line of JSON from its standard input,

    {"sheet": "/tmp/.../shot.png", "video": "a.mp4", "shot": 1, "start": 0.0, "seconds": 3.2}

and prints one, {"caption": "..."}, before it reads the next. Answers are kept in the cache, by the command, the video
and the shot, so each shot is asked about once.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moc_jax.config import DataConfig
from moc_jax.data.cache import Entry, Part, key_of, only_one
from moc_jax.data.captions import CaptionError
from moc_jax.data.copies import send, sync
from moc_jax.data.encode import read_shots
from moc_jax.data.sources import Source
from moc_jax.dialogue import Dialogue
from moc_jax.documents import DocumentError, checked_text
from moc_jax.files import write_text
from moc_jax.progress import Progress
from moc_jax.reading import parse_json
from moc_jax.shapes import UInt8
from moc_jax.showing import shown

_FRAMES, _COLUMNS = 6, 3  # of a sheet
_ROWS = 240  # pixels that a frame on it has at least
FOLDER = "captioned"


def with_captions(cfg: DataConfig, used: Sequence[tuple[Source, Entry]], cache: Path) -> list[tuple[Source, Entry]]:
    """The sources, with the command's captions for shots that have none of their own.

    Args:
        cfg: with `caption_command`; without one nothing is done.
        used: sources with what they were encoded to.
        cache: where answers are kept.

    Raises:
        CaptionError: the command cannot be run, ends early, or answers something else.
        VideoError: a video cannot be read any more.
    """
    if not cfg.caption_command:
        return list(used)
    with only_one(cache):  # another process finds the answers
        sync(cache / FOLDER)
        answers = _answers(cfg, used, cache)
    return [(_with(source, answers[source.name]), entry) for source, entry in used]


def _answers(cfg: DataConfig, used: Sequence[tuple[Source, Entry]], cache: Path) -> dict[str, dict[int, str]]:
    lacking = [(source, _lacking(source, entry)) for source, entry in used]
    answers: dict[str, dict[int, str]] = {}
    left = list[tuple[Source, list[Part]]]()
    for source, parts in lacking:
        kept = {part.shot: _kept(_file(cfg, source, part, cache)) for part in parts}
        answers[source.name] = {shot: caption for shot, caption in kept.items() if caption is not None}
        if asked := [part for part in parts if kept[part.shot] is None]:
            left.append((source, asked))
    total, done = sum(len(parts) for _, parts in left), itertools.count(1)
    if not total:
        return answers
    with (
        Dialogue(cfg.caption_command, setting="data.caption_command", error=CaptionError) as dialogue,
        tempfile.TemporaryDirectory() as folder,
        Progress("captioning", total=total, unit="shot") as progress,
    ):
        for source, parts in left:
            for part, sheet in zip(parts, _sheets(source, parts, cfg)):
                caption = _ask(dialogue, _question(source, part, cfg), sheet, Path(folder, "shot.png"))
                answers[source.name][part.shot] = caption
                write_text(_file(cfg, source, part, cache), json.dumps({"caption": caption}))
                send(_file(cfg, source, part, cache))
                progress.reach(next(done))
    return answers


def _lacking(source: Source, entry: Entry) -> list[Part]:
    """The first part of each shot without a caption of its own."""
    first = {part.shot: part for part in reversed(entry.parts)}
    return [first[shot] for shot in sorted(first) if shot >= len(source.captions.shots)]


def _with(source: Source, answers: dict[int, str]) -> Source:
    if not answers:
        return source
    own = source.captions
    shots = [own.shot(k) if k not in answers else answers[k] for k in range(max(answers) + 1)]
    captions = dataclasses.replace(own, shots=(*own.shots, *shots[len(own.shots) :]))
    return dataclasses.replace(source, captions=captions)


def _file(cfg: DataConfig, source: Source, part: Part, cache: Path) -> Path:
    key = key_of(cfg.caption_command, source.digest, part.start, part.frames, cfg.fps, cfg.height / cfg.width)
    return cache / FOLDER / f"{key}.json"


def _kept(file: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        caption = parse_json(file.read_bytes())["caption"]
        return caption if isinstance(caption, str) else None
    return None


def _question(source: Source, part: Part, cfg: DataConfig) -> dict[str, object]:
    where = {"start": round(part.start / cfg.fps, 3), "seconds": round(part.frames / cfg.fps, 3)}
    return {"video": source.name, "shot": part.shot + 1, **where}


def _sheets(source: Source, parts: Sequence[Part], cfg: DataConfig) -> Iterator[UInt8[np.ndarray, "Y X 3"]]:
    """Frames from the beginning to the end of each shot, in rows; the video is decoded once."""
    scale = math.ceil(_ROWS / cfg.height)
    large = dataclasses.replace(cfg, height=scale * cfg.height, width=scale * cfg.width)
    if source.still:
        yield from (frames[0] for frames in read_shots(source.path, large, [(0, 1)]))
        return
    for frames in read_shots(source.path, large, [(part.start, part.frames) for part in parts]):
        picks = frames[np.linspace(0, len(frames) - 1, _FRAMES).round().astype(int)]
        rows = [np.concatenate(list(picks[k : k + _COLUMNS]), axis=1) for k in range(0, _FRAMES, _COLUMNS)]
        yield np.concatenate(rows)


def _ask(dialogue: Dialogue, question: dict[str, object], sheet: UInt8[np.ndarray, "Y X 3"], file: Path) -> str:
    """The caption of one shot; `file` is where the command finds its sheet."""
    Image.fromarray(sheet).save(file)
    about = f"shot {question['shot']} of {question['video']}"
    return dialogue.ask({"sheet": os.fspath(file), **question}, about, _caption)


def _caption(answer: object) -> str:
    caption = answer.get("caption") if isinstance(answer, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise DocumentError(f'it answered {shown(answer)}; it must print {{"caption": "..."}} in one line')
    return checked_text(" ".join(caption.split()))
