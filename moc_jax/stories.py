"""Scene files of other projects: several shots in words, read as captions of data and as storyboards.

StoryMem, EntityBench: one JSON per episode; `cut` says whether a prompt begins with a cut or continues the one before:

    {"story_overview": "...", "scenes": [{"scene_num": 1, "video_prompts": ["...", "..."], "cut": [true, false]}]}

HoloCine: `shot_cut_frames` are the frames at which shots begin, but for the first; without them shots are equally long:

    {"global_caption": "...", "shot_captions": ["...", "..."], "num_frames": 241, "shot_cut_frames": [121]}

LongLive: a folder with `0.json`, `1.json`, ... of one `caption` each, and perhaps `shot_durations.txt` with the blocks
of each shot, and `global.json`.

What else such files hold is not looked at.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from moc_jax.documents import DocumentError, checked_text, read_document, read_text
from moc_jax.showing import shown

PROMPT_SECONDS = 5.0  # of a shot whose length nobody says: what StoryMem's prompts are written for
HOLOCINE_FRAMES, HOLOCINE_FPS = 241, 16.0  # where the file does not say
BLOCK_SECONDS = 8 * 4 / 24  # of LongLive: latent frames, frames of each, frames per second


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoryShot:
    """One shot."""

    caption: str
    seconds: float
    continues: bool = False
    """Whether no cut lies before it."""
    name: str = ""
    """`<scene>_<shot>`, what its own video is called; empty: the whole story is one video."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """What one file says."""

    caption: str
    """Of the whole; may be empty."""
    shots: tuple[StoryShot, ...]
    cut_frames: tuple[int, ...] | None = None
    """The frames at which all shots but the first begin, where they are given."""


def parse_story(content: object) -> Story | None:
    """What the content of a JSON file says; None if it is of none of these kinds.

    Raises:
        DocumentError: it is, but a part that is needed is missing, mistyped or does not fit the others.
    """
    if not isinstance(content, dict):
        return None
    scenes = content.get("scenes")
    if isinstance(scenes, list) and scenes and all(isinstance(s, dict) and "video_prompts" in s for s in scenes):
        return _storymem(content, scenes)
    return _holocine(content) if "shot_captions" in content else None


def is_story_folder(folder: Path) -> bool:
    """Whether it is laid out as one of LongLive's."""
    return os.path.isfile(folder / "0.json")  # which takes any name


def read_story_folder(folder: Path) -> Story:
    """A folder of LongLive.

    Raises:
        DocumentError: a file of it cannot be read or lacks its caption; names it.
    """
    files = list(itertools.takewhile(Path.is_file, (folder / f"{k}.json" for k in itertools.count())))
    captions = [_caption_of(file) for file in files]
    seconds = [PROMPT_SECONDS] * len(captions)
    if (durations := folder / "shot_durations.txt").is_file():
        text = _named(durations, lambda: read_text(durations))
        blocks = re.split(r"[\s,]+", text.strip())
        if not all(re.fullmatch(r"0*[1-9]\d{0,5}", word) for word in blocks) or len(blocks) != len(captions):
            raise DocumentError(
                f"{durations.name} is {shown(text.strip())}; it must hold {len(captions)} whole numbers of blocks, one "
                "for each of the JSON files"
            )
        seconds = [int(word) * BLOCK_SECONDS for word in blocks]
    whole = folder / "global.json"
    return Story(
        caption=_caption_of(whole) if whole.is_file() else "",
        shots=tuple(StoryShot(caption=c, seconds=s) for c, s in zip(captions, seconds)),
    )


def _storymem(content: dict[str, object], scenes: Sequence[dict[str, object]]) -> Story:
    shots: list[StoryShot] = []
    for k, scene in enumerate(scenes):
        at = f"scenes[{k}]"
        prompts = _texts(scene["video_prompts"], f"{at}.video_prompts")
        cuts = scene.get("cut", [True] * len(prompts))
        cuts = cuts if isinstance(cuts, list) else [cuts]
        if len(cuts) != len(prompts) or not all(str(cut).lower() in ("true", "false") for cut in cuts):
            raise DocumentError(f"{at}.cut is {shown(cuts)}; it must hold true or false for {len(prompts)} prompts")
        number = scene.get("scene_num", k + 1)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 10**6:
            raise DocumentError(f"{at}.scene_num is {shown(number)}; it must be a whole number from 0 on")
        for n, (prompt, cut) in enumerate(zip(prompts, cuts), start=1):
            continues = str(cut).lower() == "false" and bool(shots)
            name = f"{number:02d}_{n:02d}"
            shots.append(StoryShot(caption=prompt, seconds=PROMPT_SECONDS, continues=continues, name=name))
    if not shots:
        raise DocumentError("scenes has no video_prompts")
    if len({shot.name for shot in shots}) < len(shots):
        raise DocumentError("two scenes have the same scene_num; number them apart")
    return Story(caption=_text(content.get("story_overview", ""), "story_overview"), shots=tuple(shots))


def _holocine(content: dict[str, object]) -> Story:
    captions = _texts(content["shot_captions"], "shot_captions")
    if not captions:
        raise DocumentError("shot_captions is empty; it must hold a text for each shot")
    fps, frames = content.get("fps", HOLOCINE_FPS), content.get("num_frames", HOLOCINE_FRAMES)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0.01 <= fps <= 1000:
        raise DocumentError(f"fps is {shown(fps)}; it must lie in 0.01..1000")
    if isinstance(frames, bool) or not isinstance(frames, int) or not len(captions) <= frames <= 10**7:
        raise DocumentError(f"num_frames is {shown(frames)}; it must lie in {len(captions)}..{10**7}")
    cuts = frame_cuts(content["shot_cut_frames"], "shot_cut_frames") if content.get("shot_cut_frames") else None
    if cuts is not None and (len(cuts) != len(captions) - 1 or (cuts and cuts[-1] >= frames)):
        raise DocumentError(
            f"shot_cut_frames is {shown(list(cuts))}; for {len(captions)} shots of {frames} frames it must hold "
            f"{len(captions) - 1} rising numbers below {frames}"
        )
    borders = (
        [0, *cuts, frames]
        if cuts is not None
        else [round(k * frames / len(captions)) for k in range(len(captions) + 1)]
    )
    shots = (
        StoryShot(caption=caption, seconds=(end - begin) / fps)
        for caption, (begin, end) in zip(captions, itertools.pairwise(borders))
    )
    return Story(
        caption=_text(content.get("global_caption", ""), "global_caption"), shots=tuple(shots), cut_frames=cuts
    )


def frame_cuts(value: object, at: str) -> tuple[int, ...]:
    """Frames at which shots begin, in rising order.

    Raises:
        DocumentError: they are not; `at` is where they stand.
    """
    whole = isinstance(value, list) and all(type(cut) is int for cut in value)
    if not (whole and all(a < b for a, b in itertools.pairwise([0, *value]))):
        raise DocumentError(f"{at} is {shown(value)}; it must be a list of rising frame numbers, all above 0")
    return tuple(value)


def _caption_of(file: Path) -> str:
    content = _named(file, lambda: read_document(file))
    if not isinstance(content, dict) or not isinstance(content.get("caption"), str):
        raise DocumentError(f"{file.name} holds {shown(content)}; it must be an object with a text `caption`")
    return _named(file, lambda: checked_text(content["caption"]))


def _named[T](file: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except DocumentError as error:
        raise DocumentError(f"{file.name}: {error}") from error


def _texts(value: object, at: str) -> list[str]:
    if not isinstance(value, list):
        raise DocumentError(f"{at} is {shown(value)}; it must be a list of texts")
    return [_text(text, f"{at}[{k}]") for k, text in enumerate(value)]


def _text(value: object, at: str) -> str:
    if not isinstance(value, str):
        raise DocumentError(f"{at} is {shown(value)}; it must be text")
    try:
        return checked_text(value)
    except DocumentError as error:
        raise DocumentError(f"{at}: {error}") from error
