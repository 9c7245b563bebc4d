"""Storyboards: what a scene should show, shot by shot, as a YAML file.

    caption: Two cyclists ride through a mountain village       # of the whole scene
    negative_prompt: blurry, frozen                             # optional
    seed: 7                                                     # optional
    shots:
      - caption: wide shot of the valley
        seconds: 2.5
      - caption: close-up of the first rider
        seconds: 3
        seed: 12                                                # optional: noise of this shot alone
        image: rider.png                                        # optional: its first frame
      - caption: the finish line
        video: finish.mp4                                       # given, not sampled; `seconds` would cut it off
      - caption: the bicycle
        image: bicycle.jpg                                      # without `seconds`: a reference picture, not shown
      - cut: false                                              # continues the shot before, under its caption or
        seconds: 3                                              # another one: a take that is longer than a shot

A generation (generation.py) is made shot by shot, and its shots may say which earlier ones they are shown, counted from
1 over all of the generation: `remember: [1, 4]` in any case, `forget: [2]` not.

Paths are relative to the file. Whatever is missing, mistyped or unknown is an error that names its place.

Scene files of other projects (moc_jax/stories.py) are storyboards, too.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import stat
import typing
from pathlib import Path
from typing import Any, NoReturn

from moc_jax.config import ConfigError
from moc_jax.config.base import expanded
from moc_jax.documents import DocumentError, checked_text, read_document
from moc_jax.showing import shown
from moc_jax.stories import is_story_folder, parse_story, read_story_folder

if typing.TYPE_CHECKING:  # a command line is read without it
    import numpy as np

SEED_LIMIT = 2**32
SHOT_LIMIT = 100_000
SECONDS_LIMIT = 86_400  # of one shot


class StoryboardError(ConfigError):
    """An impossible storyboard: the message names the file, the place in it, and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """One shot: sampled, or given by a video, or a still picture as a reference for the others."""

    caption: str
    seconds: float | None = None
    seed: int | None = None
    image: Path | None = None
    video: Path | None = None
    continues: bool = False
    """Whether it continues the shot before, without a cut."""
    file: str = ""
    """What its own video is called, without the suffix; empty: the scene is one video."""
    remember: tuple[int, ...] = ()
    """In a generation: earlier shots that it is shown in any case, counted from 1 over all of the generation."""
    forget: tuple[int, ...] = ()
    """And those that it is not shown."""
    latents: "np.ndarray | None" = dataclasses.field(default=None, compare=False, repr=False)
    """[F, Y, X, Z] float32: what it is given by in Python, in place of a video."""
    pixels: "np.ndarray | None" = dataclasses.field(default=None, compare=False, repr=False)
    """[F, Y, X, 3] uint8: what its `image` or `video` holds; None: that is read whenever it is needed."""

    @property
    def is_reference(self) -> bool:
        """A picture without duration: the model sees it, the video does not show it."""
        return self.image is not None and self.seconds is None

    @property
    def starts_given(self) -> bool:
        """Sampled from a given first frame on."""
        return self.image is not None and self.seconds is not None

    @property
    def is_given(self) -> bool:
        """Known from the start; every other shot is sampled."""
        return self.video is not None or self.latents is not None or self.is_reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storyboard:
    """One scene."""

    caption: str
    shots: tuple[Shot, ...]
    negative_prompt: str | None = None
    """None: the sampling configuration's."""
    seed: int | None = None
    """None: the sampling configuration's."""
    name: str = "storyboard"
    """Who is named when something is wrong: the file's path."""

    def __post_init__(self):
        for where, part in (("", self), *((f"shots[{s}].", shot) for s, shot in enumerate(self.shots))):
            if part.seed is not None and not (isinstance(part.seed, int) and 0 <= part.seed < SEED_LIMIT):
                raise StoryboardError(
                    f"{self.name}: {where}seed is {shown(part.seed)}; it must lie in 0..{SEED_LIMIT - 1}"
                )
        for s, shot in enumerate(self.shots):
            known = isinstance(shot.seconds, int | float) and 0 < shot.seconds <= SECONDS_LIMIT
            if shot.seconds is not None and not known:
                raise StoryboardError(f"{self.name}: shots[{s}].seconds is {shown(shot.seconds)}; {_SECONDS}")


_SECONDS = f"it must be a number of seconds above 0 and at most {SECONDS_LIMIT:,}, which is a day"
_SCENE_FIELDS = ("caption", "negative_prompt", "seed", "shots")
_SHOT_FIELDS = ("caption", "seconds", "seed", "image", "video", "cut", "remember", "forget")


def load_storyboard(file: str | Path, before: Shot | None = None) -> Storyboard:
    """Reads and checks a storyboard: a file, or a folder of another project's.

    `before` is the shot that its first one may continue.

    Raises:
        StoryboardError: no such file, no YAML, a field that is missing, mistyped or unknown, or a number or text beyond
            its limit; names it.
    """
    path = Path(file)
    folder = is_story_folder(path)
    if not (folder or _is_file(path)):
        raise StoryboardError(f"{path}: there is no such storyboard{_hint(path, '.yaml', '.yml', '.json')}")
    try:
        content = None if folder else read_document(path)
        story = read_story_folder(path) if folder else parse_story(content)
    except DocumentError as error:
        raise StoryboardError(f"{path} cannot be read: {error}") from error
    if story is None:
        return parse_storyboard(content, name=str(path), folder=path.parent, before=before)
    shots = [Shot(caption=s.caption, seconds=s.seconds, continues=s.continues, file=s.name) for s in story.shots]
    if len(shots) > SHOT_LIMIT:
        raise StoryboardError(f"{path} has {len(shots):,} shots; the limit is {SHOT_LIMIT:,}")
    return Storyboard(caption=story.caption, shots=tuple(shots), name=str(path))


def parse_storyboard(
    content: object, *, name: str = "storyboard", folder: Path = Path(), before: Shot | None = None
) -> Storyboard:
    """The storyboard that a YAML file's content describes.

    Args:
        folder: where relative paths start.
        before: the shot that its first one may continue.

    Raises:
        StoryboardError: see `load_storyboard`.
    """
    scene = _Fields(name, "", content, _SCENE_FIELDS)
    caption, shots = scene.text("caption"), scene.required("shots")
    if not isinstance(shots, list) or not shots:
        scene.fail("shots", "it must be a list of at least one shot, each starting with `- caption:`")
    if len(shots) > SHOT_LIMIT:
        raise StoryboardError(f"{name}: shots has {len(shots):,} entries; the limit is {SHOT_LIMIT:,}")
    parsed = list[Shot]()
    for k, shot in enumerate(shots):
        parsed.append(_shot(name, folder, f"shots[{k}]", shot, parsed[-1] if parsed else before))
    if all(shot.is_reference for shot in parsed):
        raise StoryboardError(f"{name}: shots holds reference pictures only; give at least one shot its `seconds`")
    return Storyboard(
        caption=caption,
        shots=tuple(parsed),
        negative_prompt=scene.text("negative_prompt") if "negative_prompt" in scene.content else None,
        seed=scene.seed(),
        name=name,
    )


def check_pins(board: Storyboard) -> None:
    """Raises StoryboardError where a shot says which earlier ones it is shown; all shots of one scene are."""
    for s, shot in enumerate(board.shots):
        for field in ("remember", "forget"):
            if getattr(shot, field):
                raise StoryboardError(
                    f"{board.name}: shots[{s}].{field} is for a generation, whose shots are made one after another; "
                    "give --extend, or drop it"
                )


def storyboard_digest(board: Storyboard) -> str:
    """SHA-256 of what a storyboard asks for, whatever its files are called: it covers what is in them.

    Raises:
        StoryboardError: one of them can't be read.
    """
    shots = []
    for s, shot in enumerate(board.shots):
        try:
            files = [path and file_digest(path) for path in (shot.image, shot.video)]
        except OSError as error:
            raise StoryboardError(
                f"{board.name}: shots[{s}]: {error.filename} cannot be read: {error.strerror or error}"
            ) from error
        given = None if shot.latents is None else hashlib.sha256(shot.latents.tobytes()).hexdigest()
        pins = [{"remember": shot.remember, "forget": shot.forget}] if shot.remember or shot.forget else []
        shots.append([shot.caption, shot.seconds, shot.seed, shot.continues, *files, given, *pins])
    said = board.caption, board.negative_prompt, board.seed, shots
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of what is in a file; raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def frames_of(seconds: float, fps: float, stride: int, patch: int = 1) -> int:
    """Frames of a shot: the count nearest to seconds * fps that the codec and the model can hold; 0 if there is none.

    A clip of n latent frames has stride * (n - 1) + 1 frames, and n is a multiple of the model's temporal `patch`.
    """
    wanted = seconds * fps
    if wanted < 0.5:
        return 0
    unit = stride * patch
    least = stride * (patch - 1) + 1
    return least + unit * max(0, math.floor((wanted - least) / unit + 0.5))


def _shot(name: str, folder: Path, where: str, content: object, before: Shot | None) -> Shot:
    shot = _Fields(name, where, content, _SHOT_FIELDS)
    continues = shot.continues()
    if continues and (before is None or before.is_reference):
        shot.fail("cut", "there is no shot before it that it could continue")
    caption = before.caption if before and continues and "caption" not in shot.content else shot.text("caption")
    image, video = shot.file("image", folder), shot.file("video", folder)
    if image and video:
        shot.fail("image", "a shot with `video` is given as a whole and has no first frame to set; remove one of them")
    if "seconds" not in shot.content and not image and not video:
        shot.required("seconds")
    seconds, seed = shot.seconds(), shot.seed()
    remember, forget = shot.numbers("remember"), shot.numbers("forget")
    if both := sorted({*remember} & {*forget}):
        shot.fail("forget", f"it names shot {both[0]}, as `remember` does; remove it from one of them")
    given = {"image": image, "video": video, "remember": remember, "forget": forget}
    return Shot(caption=caption, seconds=seconds, seed=seed, continues=continues, **given)


class _Fields:
    """The fields of one mapping in the file, each checked when it is taken."""

    def __init__(self, name: str, where: str, content: object, known: tuple[str, ...]):
        self.name, self.where, self.known = name, where, known
        if not isinstance(content, dict):
            place = where or "the file"
            raise StoryboardError(f"{name}: {place} is {shown(content)}; it must hold the fields {', '.join(known)}")
        self.content = content
        for key in content:
            if key not in known:
                key, value = shown(key).strip("'"), content[key]
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {self._path(near[0])}?" if near else f"known fields: {', '.join(known)}"
                if len(content) == 1 and isinstance(value, str):  # YAML took text with a colon for a field
                    hint += "; if it is text, put it in quotes, after `caption:`"
                raise StoryboardError(f"{name}: unknown field {self._path(key)}; {hint}")

    def _path(self, field: str) -> str:
        return f"{self.where}.{field}" if self.where else field

    def fail(self, field: str, problem: str) -> NoReturn:
        value = self.content.get(field)
        raise StoryboardError(f"{self.name}: {self._path(field)} is {shown(value)} ({type(value).__name__}); {problem}")

    def required(self, field: str) -> Any:
        if field not in self.content:
            raise StoryboardError(f"{self.name}: {self._path(field)} is missing")
        return self.content[field]

    def text(self, field: str) -> str:
        value = self.required(field)
        if not isinstance(value, str):
            self.fail(field, "it must be text, in quotes if necessary")
        try:
            return checked_text(value)
        except DocumentError as error:
            raise StoryboardError(f"{self.name}: {self._path(field)}: {error}") from error

    def continues(self) -> bool:
        value = self.content.get("cut", True)
        if not isinstance(value, bool):
            self.fail("cut", "it must be false for a shot that continues the one before, or true")
        return not value

    def seconds(self) -> float | None:
        value = self.content.get("seconds")
        if "seconds" not in self.content:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= SECONDS_LIMIT:
            text = isinstance(value, str) and re.fullmatch(r"[\d.]+(e[-+]?\d+)?", value)  # in YAML, 1e3 is not a number
            self.fail("seconds", _SECONDS + "; to YAML this is text: write it without quotes and exponent" * bool(text))
        return float(value)

    def seed(self) -> int | None:
        value = self.content.get("seed")
        if "seed" not in self.content:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail("seed", f"it must be a whole number in 0..{SEED_LIMIT - 1}")
        return value

    def numbers(self, field: str) -> tuple[int, ...]:
        values = self.content.get(field, [])
        if not isinstance(values, list) or not all(type(value) is int and value > 0 for value in values):
            self.fail(field, "it must be a list of shots, counted from 1, such as [1, 4]")
        return tuple(dict.fromkeys(values))

    def file(self, field: str, folder: Path) -> Path | None:
        if field not in self.content:
            return None
        try:
            given = Path(expanded(self.text(field), f"{self.name}: {self._path(field)}"))
        except ConfigError as error:
            raise StoryboardError(str(error)) from None
        path = folder / given
        if not _is_file(path):
            hint = _hint(path) or "; paths are relative to the storyboard's folder" * (not given.is_absolute())
            raise StoryboardError(f"{self.name}: {self._path(field)}: there is no file {shown(str(path))}{hint}")
        return path


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # not there, or no name that a file can have
        return False


def _hint(path: Path, *suffixes: str) -> str:
    """What is there instead of a file, or the file beside `path` whose name is most like its own."""
    if os.path.lexists(path):
        return ", but a folder of that name" if os.path.isdir(path) else ", but a device, a pipe or a broken link"
    try:
        names = [name for name in os.listdir(path.parent) if name.endswith(suffixes or "")]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""
