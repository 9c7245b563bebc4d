"""What PEFT and diffusers say of adapters: in their file's metadata, or in the adapter_config.json beside it."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

from moc_jax.reading import DocumentError, parse_json
from moc_jax.showing import named, shown
from moc_jax.tensor_files.places import settings_of
from moc_jax.tensor_files.safetensors import WeightsError

WORDS = "lora_adapter_metadata"
"""Where they stand in a file's metadata."""
LARGEST = 1e6
"""Of alpha and of scales."""
_BESIDE = "adapter_config.json"
_NUMBERS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}  # and the values of single maps, by patterns
_FLAGS = "use_rslora", "use_dora"


@dataclasses.dataclass(frozen=True)
class PeftSettings:
    """Settings that are known to be possible; none where nothing is said."""

    said: Mapping[str, object]

    def rank(self, module: str) -> float | None:
        """Of a linear map, by the name that its file has for it."""
        return self._number("r", module)

    def alpha(self, module: str, rank: int) -> float | None:
        """What is divided by the rank, also where PEFT divides by its root (rsLoRA, arXiv 2312.03732)."""
        alpha = self._number("lora_alpha", module)
        if not self.said.get("use_rslora"):
            return alpha
        return math.sqrt(rank) * (rank if alpha is None else alpha)

    def _number(self, name: str, module: str) -> float | None:
        own = self.said.get(_NUMBERS[name]) or {}
        assert isinstance(own, dict)
        for key, value in own.items():
            if re.match(rf"(.*\.)?({key})$", module):  # as PEFT does
                return float(value)
        value = self.said.get(name)
        return float(value) if isinstance(value, int | float) else None


def peft_settings(file: Path, words: Mapping[str, object]) -> PeftSettings:
    """What is said of the adapters in a file.

    Args:
        words: its metadata.

    Raises:
        WeightsError: it can't be read, is impossible, or asks for what is not supported; all of it is named.
    """
    config = file.with_name(_BESIDE)
    beside, inside = settings_of(config), _inside(file, words)
    names = *_NUMBERS, *_NUMBERS.values(), *_FLAGS
    if beside and inside and (differ := [name for name in names if (beside.get(name) or 0) != (inside.get(name) or 0)]):
        raise WeightsError(f"{named(file)}: its {WORDS} and {named(config)} differ in {', '.join(differ)}; keep one")
    said = inside or beside
    where = f"{named(file)}: its {WORDS}" if inside else named(config)
    if problems := _problems(said):
        raise WeightsError("\n".join(f"{where} says {problem}" for problem in problems))
    return PeftSettings(said)


def _inside(file: Path, words: Mapping[str, object]) -> Mapping[str, object]:
    text = words.get(WORDS)
    if text is None:
        return {}
    try:
        found = parse_json(str(text))
    except DocumentError as error:
        raise WeightsError(f"{named(file)}: its {WORDS} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{named(file)}: its {WORDS} is {shown(found)}; it must be an object")
    return {str(name).removeprefix("transformer."): value for name, value in found.items()}


def _problems(said: Mapping[str, object]) -> list[str]:
    problems = []
    for name in _FLAGS:
        if not isinstance(said.get(name), bool | None):
            problems.append(f"{name} {shown(said[name])}; it must be true or false")
    if said.get("use_dora") is True:
        problems.append("use_dora true: DoRA also scales whole weights, and is not supported; train plain LoRA")
    for name, pattern in _NUMBERS.items():
        own = said.get(pattern) or {}
        if not isinstance(own, dict):
            problems.append(f"{pattern} {shown(own)}; it must be an object")
            own = {}
        for key, value in ((None, said.get(name)), *own.items()):
            at = name if key is None else f"{pattern} {shown(key)}:"
            number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
            if not number and not (key is None and value is None):
                problems.append(f"{at} {shown(value)}; it must be a number of at most {LARGEST:,.0f}")
            try:
                re.compile(key or "")
            except re.error as error:
                problems.append(f"{at} the name is not a regular expression, as PEFT reads it: {error}")
    return problems
