"""What of a shot is used: all of it, in as few parts as `data.max_shot_frames` allows, as equal as can be."""

from moc_jax.codecs import crop_frames
from moc_jax.config import DataConfig


def least_frames(cfg: DataConfig, *, stride: int, patch: int) -> int:
    """Of a shot that is used; `stride`, `patch`: frames per latent frame, and latent frames per token."""
    return max(cfg.min_shot_frames, still_frames(stride=stride, patch=patch))


def still_frames(*, stride: int, patch: int) -> int:
    """Of a picture: the shortest shot that there is; `stride`, `patch` as above."""
    return stride * (patch - 1) + 1


def part_lengths(frames: int, cfg: DataConfig, *, stride: int, patch: int) -> list[int]:
    """The frames of each part, one after another; empty if the shot is too short.

    All parts together lack less than a token of the shot, unless equal parts would be too short.
    """
    least, most = least_frames(cfg, stride=stride, patch=patch), cfg.max_shot_frames or frames
    if frames < least:
        return []
    if frames <= most:
        return [crop_frames(frames, stride, patch)]
    # A part of k tokens has unit * k - lost frames, since its first frame stands alone.
    unit, lost = stride * patch, stride - 1
    longest, shortest = (most + lost) // unit, (crop_frames(least, stride, patch) + lost) // unit
    if longest < shortest:
        return []
    for count in range(-(-frames // (unit * longest - lost)), 1, -1):
        tokens = min((frames + count * lost) // unit, count * longest)
        if tokens // count >= shortest:
            return [unit * (tokens // count + (k < tokens % count)) - lost for k in range(count)]
    return [unit * longest - lost]
