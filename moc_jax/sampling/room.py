"""Whether keys and values of finished shots may be kept while a scene is sampled, how much that is, and if it fits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moc_jax import models
from moc_jax.attention.api import RoutedAttention
from moc_jax.attention.kept import Size
from moc_jax.attention.sharded import deal_of
from moc_jax.config import BucketConfig, MoCConfig, ModelConfig, SampleConfig
from moc_jax.errors import Failure
from moc_jax.processes import gather
from moc_jax.sampling.in_turn import Round, Turn, rounds_of
from moc_jax.sampling.scenes import Request
from moc_jax.scene import Scene

_USABLE = 0.9  # of the memory that is free; the rest is for what a call computes


class RoomError(Failure):
    """Devices have no room for what is to be kept of finished shots: says how much it is, and what would fit."""


def why_not(cfg: SampleConfig, plan: Sequence[MoCConfig], model: ModelConfig) -> str:
    """Why nothing is kept, whatever the memory; empty: it may be."""
    if cfg.cache == "off":
        return "sample.cache is off"
    if cfg.order != "shots":
        return f"sample.order is {cfg.order}: no shot is finished before the others; choose shots"
    if len(set(plan)) > 1:
        return "what finished shots attend to changes with the steps: leave moc's settings of steps and levels alone"
    return models.why_not(plan[0], model)


def free_memory() -> int | None:
    """Bytes that are free on the fullest device of all processes; None where devices don't tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    free = [s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats if "bytes_limit" in s]
    least = [int(each) for each in gather(str(min(free, default=-1)))]  # all have to decide alike
    return None if -1 in least else min(least)


class Planned(NamedTuple):
    """How scenes are sampled."""

    rounds: list[Round]
    size: Size | None
    """Of what is kept of finished shots; None: nothing is."""
    line: str
    """What is to be said about it."""


def planned(
    cfg: SampleConfig,
    plan: Sequence[MoCConfig],
    model: ModelConfig,
    attention: RoutedAttention,
    turn: np.ndarray,
    request: Request,
    *,
    twice: bool,
    least: BucketConfig | None = None,
) -> Planned:
    """Turn by turn with what is kept, if that may be and something is finished before the end.

    Args:
        plan: What each call of the model attends to.
        turn: [B, S]: `Denoising`'s turns.
        twice: Whether guidance calls the model with two captions.
        least: See `rounds_of`.

    Raises:
        RoomError: it does not fit these devices, and `sample.cache` asks for it.
    """
    together = [Round(np.int32(now)) for now in range(int(turn.max()) + 1)]
    if why_not(cfg, plan, model):
        return Planned(together, None, "")
    lengths = request.lengths
    texts = [lengths.text_lengths, *([request.negative_lengths.text_lengths] if twice else [])]
    rounds, scene = rounds_of(turn, lengths, texts, least), Scene(request.known.video, request.text, lengths)
    if len(rounds) == 1:
        return Planned(together, None, "")
    turn_of_all = rounds[0].turn
    assert turn_of_all is not None
    size = size_of(model, plan[0], attention, turn_of_all, scene, twice=twice, small=cfg.cache == "float8")
    free = free_memory()
    if wrong := misfit(size, free, twice=twice):
        if cfg.cache != "auto":
            raise RoomError(wrong)
        return Planned(together, None, f"finished shots are computed again at each step: {wrong}")
    of_free = "" if free is None else f" of {free / 2**30:.3g} GiB that are free"
    both = ", for both captions of guidance" if twice else ""
    gib = f"{size.device_bytes / 2**30:.3g} GiB"
    return Planned(rounds, size, f"keys and values of finished shots take {gib} on each device{of_free}{both}")


def misfit(size: Size, free: int | None, *, twice: bool) -> str:
    """What is wrong where devices have no room for what is kept beside what a call computes, and what would have."""
    needed = size.device_bytes
    if free is None or needed <= _USABLE * free:
        return ""
    share = _USABLE * free / needed
    ways = [f"{share:.0%} of the video", f"{math.ceil(1 / share)} times as many devices along mesh.context"]
    ways += ["sample.guidance 1, which keeps half as much"] if twice else []
    ways += [] if size.small else ["sample.cache float8, which keeps about half as much"]
    return (
        f"keys and values of finished shots need {needed / 2**30:.3g} GiB on each device, and {_USABLE:.0%} of the "
        f"{free / 2**30:.3g} GiB that are free may be taken. What would fit: {'; '.join(ways)}; or sample.cache off, "
        "which computes them again at each step"
    )


def size_of(
    model: ModelConfig,
    moc: MoCConfig,
    attention: RoutedAttention,
    turn: Turn,
    scene: Scene,
    *,
    twice: bool,
    small: bool,
) -> Size:
    """How much is kept of such scenes in all their turns, on the mesh in context; `twice`: for both captions of
    guidance; `small`: in 8 bits."""
    video, text, lengths = scene.video.shape, scene.text.shape, scene.lengths
    whole, _ = models.scene_shape(model, video, text, lengths)
    given, _ = models.scene_shape(model, (video[0], turn.frames, *video[2:]), (text[0], turn.text_tokens), lengths)
    deal = deal_of(given, model.heads, attention)
    return models.kept_size(model, moc, whole, deal, batch=video[0] * (2 if twice else 1), small=small)
