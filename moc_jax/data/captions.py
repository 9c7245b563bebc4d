"""What a video shows, in words: a caption file beside it, or defaults.

`clip.yaml` (or .yml, .json) beside `clip.mp4`:

    caption: A quiet street in the morning.     # of the whole video
    shots:                                      # of each shot, in order
      - A van waits at the lights.
      - caption: A cyclist looks back.
    cuts: [1.2, 3.04]                           # optional, seconds: the shots' borders, instead of detecting them

All keys are optional; what is missing is filled with `DataConfig.default_caption` and `default_shot_caption`.
"""

import dataclasses
import difflib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import yaml

from moc_jax.config import DataConfig

_SUFFIXES = (".yaml", ".yml", ".json")


class CaptionError(ValueError):
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

    def shot(self, index: int) -> str:
        """The caption of shot `index`, counted from 0."""
        if index < len(self.shots):
            return self.shots[index]
        return self.default_shot.format(shot=index + 1, file=self.video)


def load_captions(video: Path, cfg: DataConfig) -> Captions:
    """The captions of `video`, from the file beside it if there is one.

    Raises:
        CaptionError: the file, or the default in the config, is not as described above.
    """
    try:
        cfg.default_shot_caption.format(shot=1, file=video.stem)
    except (KeyError, IndexError, ValueError) as error:
        raise CaptionError(
            f"data.default_shot_caption = {cfg.default_shot_caption!r} cannot be filled in ({error}); "
            "it may hold {shot} and {file}, and braces of its own are doubled"
        ) from None
    found = [path for suffix in _SUFFIXES if (path := video.with_suffix(suffix)).is_file()]
    if len(found) > 1:
        raise CaptionError(f"{video} has several caption files: {', '.join(p.name for p in found)}; keep one")
    content = _parse(found[0]) if found else {}
    return Captions(
        file=found[0] if found else None,
        caption=content.get("caption", cfg.default_caption),
        shots=content.get("shots", ()),
        cuts=content.get("cuts"),
        default_shot=cfg.default_shot_caption,
        video=video.stem,
    )


def _parse(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise CaptionError(f"{file} cannot be read: {error}") from error
    content = {} if content is None else content
    _check_keys(file, "the file", content, ("caption", "shots", "cuts"))
    parsed: dict[str, Any] = {}
    if "caption" in content:
        parsed["caption"] = _text(file, "caption", content["caption"])
    if "shots" in content:
        if not isinstance(content["shots"], list):
            raise CaptionError(f"{file}: shots is {content['shots']!r}; it must be a list, one entry per shot")
        parsed["shots"] = tuple(_shot(file, f"shots[{k}]", entry) for k, entry in enumerate(content["shots"]))
    if "cuts" in content:
        parsed["cuts"] = _cuts(file, content["cuts"])
        if len(parsed.get("shots", ())) > len(parsed["cuts"]) + 1:
            raise CaptionError(
                f"{file}: {len(parsed['cuts'])} cuts make {len(parsed['cuts']) + 1} shots, but shots has "
                f"{len(parsed['shots'])} captions; remove captions or add cuts"
            )
    return parsed


def _check_keys(file: Path, where: str, content: Any, known: tuple[str, ...]) -> None:
    if not isinstance(content, dict):
        raise CaptionError(f"{file}: {where} holds {content!r}; it must hold the keys {', '.join(known)}")
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise CaptionError(f"{file}: {where} has the unknown key {key!r}; {hint}")


def _text(file: Path, where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CaptionError(
            f"{file}: {where} is {value!r} ({type(value).__name__}); it must be text, in quotes if need be"
        )
    return value.strip()


def _shot(file: Path, where: str, entry: Any) -> str:
    if isinstance(entry, str):
        return entry.strip()
    _check_keys(file, where, entry, ("caption",))
    if "caption" not in entry:
        raise CaptionError(f"{file}: {where} lacks its caption")
    return _text(file, f"{where}.caption", entry["caption"])


def _cuts(file: Path, value: Any) -> tuple[float, ...]:
    numbers = isinstance(value, list) and all(type(cut) in (int, float) for cut in value)
    if not (numbers and all(a < b < math.inf for a, b in itertools.pairwise([0, *value]))):
        raise CaptionError(f"{file}: cuts is {value!r}; it must be a list of rising times in seconds, all above 0")
    return tuple(float(cut) for cut in value)
