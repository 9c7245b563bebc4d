"""Which shots are left out on request: black, dark, without motion, or seen before.

What decides is measured when a shot is encoded and kept beside it, so filters can change without encoding again.
"""

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np

from moc_jax.config import FilterConfig
from moc_jax.shapes import Float, UInt8

_LOOKED_AT = 5  # frames of a shot
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BLACK = 8.0  # mean brightness, of 255, that no frame of a black shot exceeds
_HASH_SIZE, _FACTOR = 8, 2  # of each frame's hash: rows and columns; how much larger the picture is that it is made of
_BITS = 2 * _HASH_SIZE**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What a few frames of a shot look like."""

    brightness: float
    """Mean over the frames, of 255."""
    brightest: float
    """Mean over the brightest frame."""
    change: float
    """Mean difference between one frame and the next of these, of 255."""
    hash: str
    """Perceptual hashes of a frame near the beginning and of one near the end, in hexadecimal digits."""


def look_at(frames: UInt8[np.ndarray, "F Y X 3"]) -> Look:
    """Looks at a shot."""
    picks = np.linspace(0, len(frames) - 1, _LOOKED_AT).round().astype(int)
    luma = np.stack([frames[k].astype(np.float32) @ _LUMA for k in picks])
    means = luma.mean((1, 2))
    return Look(
        brightness=round(float(means.mean()), 3),
        brightest=round(float(means.max()), 3),
        change=round(float(np.abs(np.diff(luma, axis=0)).mean()), 3),
        hash="".join(_hash(frames[picks[k]]) for k in (1, -2)),
    )


def _hash(frame: UInt8[np.ndarray, "Y X 3"]) -> str:
    from scenedetect.detectors import HashDetector  # with OpenCV, which prepared data doesn't need

    bits = HashDetector.hash_frame(np.ascontiguousarray(frame[..., ::-1]), _HASH_SIZE, _FACTOR)
    return np.packbits(bits).tobytes().hex()


class Filters:
    """Looks at one shot after another; of those that are alike the first stays."""

    def __init__(self, cfg: FilterConfig):
        self._cfg = cfg
        self._seen: list[dict[bytes, list[tuple[Float[np.ndarray, " b"], str]]]] = []
        self.count = collections.Counter[str]()
        """Shots that were left out, by kind."""

    def reason(self, name: str, look: Look, *, still: bool) -> str:
        """Why a shot is left out; empty: it is not.

        Args:
            name: what it is called, for those that are like it.
            look: at it.
            still: whether it is a picture, which may stand still.
        """
        cfg, kind, found = self._cfg, "", ""
        if cfg.black and look.brightest <= _BLACK:
            kind, found = "black", f"it is black: no frame is brighter than {look.brightest:.1f} of 255"
        elif look.brightness < cfg.dark:
            kind, found = "dark", f"it is too dark: its brightness is {look.brightness:.1f} of 255"
        elif look.change < cfg.still and not still:
            kind, found = "still", f"it stands still: its frames differ by {look.change:.2f} of 255"
        elif cfg.duplicates >= 0 and (other := self._like(name, look)):
            kind, found = "duplicate", f"it looks like {other}"
        if found:
            self.count[kind] += 1
        return found

    def _like(self, name: str, look: Look) -> str:
        """An earlier shot whose hash differs in few enough bits; if there is none, this one is remembered.

        Of hashes that differ in at most n bits, one of n + 1 pieces is equal.
        """
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(look.hash), np.uint8))
        pieces = [piece.tobytes() for piece in np.array_split(bits, self._cfg.duplicates + 1)]
        if not self._seen:
            self._seen = [{} for _ in pieces]
        for other, earlier in self._candidates(pieces):
            if np.count_nonzero(bits != other) <= self._cfg.duplicates:
                return earlier
        for seen, piece in zip(self._seen, pieces):
            seen.setdefault(piece, []).append((bits, name))
        return ""

    def _candidates(self, pieces: list[bytes]) -> Iterator[tuple[np.ndarray, str]]:
        for seen, piece in zip(self._seen, pieces):
            yield from seen.get(piece, ())
