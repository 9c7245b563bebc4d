"""When each frame of a video is shown, from time stamps that may be missing, out of order, standing still or jumping.

A frame has two stamps: when it is to be presented and when it is to be decoded. FFmpeg's best-effort rule believes the
presentation stamps unless they fail to advance more often than the decoding stamps do. FFmpeg judges by the frames so
far, which distorts the time around the first one that steps back; here the next frames are counted too. A step that no
clock makes (back, standing still, hours ahead) becomes a step of the usual length, so every frame keeps its place.
"""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

_AHEAD = 16  # frames looked at in advance: no codec reorders more
_SURE = 1.0  # seconds between two frames that need no other evidence, and how inexact a container's duration may be
_LONGEST_GAP = 60.0  # seconds between two frames where no duration says what to expect
_LONG_STILL = 10.0  # seconds from which on a still is mentioned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stamp:
    """What a file says about the time of one frame, in seconds; None where it says nothing."""

    presented: float | None
    decoded: float | None = None
    lasts: float | None = None


def show_times[Frame](
    frames: Iterable[tuple[Stamp, Frame]],
    step: float,
    ends: float | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[float, float, Frame]]:
    """When each frame is shown. A few frames are held while their successors' stamps are looked at.

    Args:
        frames: in the order in which they are shown.
        step: seconds from one frame to the next, where the stamps do not tell.
        ends: the time stamp with which the container says it ends; None if it does not say.
        note: called with what the stamps made impossible, at the end.

    Yields:
        (start, end, frame): in seconds from the first frame on; each starts where the one before ends.
    """
    clock, held = _Clock(step, ends), collections.deque[tuple[Stamp, Frame]]()
    shown: tuple[Stamp, Frame] | None = None

    def place() -> Iterator[tuple[float, float, Frame]]:
        nonlocal shown
        before, start, shown = shown, clock.time, held.popleft()
        clock.advance(shown[0], [stamp for stamp, _ in held])
        if before is not None:
            yield start, clock.time, before[1]

    for stamp, frame in frames:
        clock.look_at(stamp)
        held.append((stamp, frame))
        if len(held) > _AHEAD:
            yield from place()
    while held:
        yield from place()
    if shown is not None:
        start = clock.time
        clock.finish(shown[0])
        yield start, clock.time, shown[1]
    for text in clock.notes():
        note(text)


_REPAIRS = {
    "back": "its time stamps step back: the clock continues from there",
    "stand": "its time stamps stand still: the clock continues at the usual rate",
    "astray": "a time stamp is far ahead of those after it: the frame is shown at the usual rate",
    "jump": "its time stamps jump ahead, farther than its duration allows: the clock continues at the usual rate",
    "still": f"a frame is shown for more than {_LONG_STILL:g} s",
    "no length": "a frame has the time stamp of the next one and is not shown",
}


class _Stamps:
    """The stamps of one kind: how far they can be trusted, and how they relate to the time shown."""

    def __init__(self, kind: str):
        self._kind = kind
        self._newest: float | None = None
        self._frames_since = 0
        self.faults = 0  # stamps that do not advance, among all frames looked at
        self.steps = collections.deque[float](maxlen=64)  # forward ones, the newest last
        self.last: float | None = None  # among the frames shown
        self.offset = 0.0  # time shown less stamp

    def of(self, stamp: Stamp) -> float | None:
        return getattr(stamp, self._kind)

    @property
    def any(self) -> bool:
        return self._newest is not None

    def look_at(self, stamp: Stamp) -> None:
        value = self.of(stamp)
        self._frames_since += 1
        if value is None:
            return
        if self._newest is not None:
            if value > self._newest:
                self.steps.append((value - self._newest) / self._frames_since)
            else:
                self.faults += 1
        self._newest, self._frames_since = value, 0

    def astray(self, stamp: Stamp, ahead: Sequence[Stamp]) -> bool:
        """Whether a stamp is far ahead, and the clock then continues as if it had not been."""
        value = self.of(stamp)
        if value is None or self.last is None or value - self.last <= _SURE:
            return False
        back = (later for later in map(self.of, ahead) if later is not None and later < value)
        return next(back, self.last) > self.last  # else it is a clock that restarts

    def set(self, stamp: Stamp, time: float, keep_offset: bool) -> None:
        value = self.of(stamp)
        if value is not None:
            self.last = value
            if not keep_offset:
                self.offset = time - value


class _Clock:
    """The time shown so far, and what had to be repaired."""

    def __init__(self, step: float, ends: float | None):
        self.time = 0.0
        self._step, self._ends = step, ends
        self._presented, self._decoded = _Stamps("presented"), _Stamps("decoded")
        self._begun = self._standing = False
        self._whole: float | None = None  # seconds from the first frame to the end, as the container says
        self._repairs = collections.Counter[str]()
        self._first: dict[str, tuple[float, float]] = {}  # of each kind of repair: time shown, seconds moved

    def look_at(self, stamp: Stamp) -> None:
        """A frame that will be shown later."""
        self._presented.look_at(stamp)
        self._decoded.look_at(stamp)

    def advance(self, stamp: Stamp, ahead: Sequence[Stamp]) -> None:
        """Moves on to a frame; `ahead` are those that follow it."""
        kind = self._choose(stamp)
        if kind.astray(stamp, ahead):
            self._repair("astray")
            stamp = Stamp(presented=None)
        value = kind.of(stamp)
        if not self._begun:
            self._begun, exact = True, False
            if value is not None and self._ends is not None:
                self._whole = self._ends - value
        else:
            before = self.time
            exact = self._move(kind, value, ahead)
            if self.time == before:
                self._repair("no length")
        for each in (self._presented, self._decoded):
            each.set(stamp, self.time, keep_offset=exact and each is kind)

    def finish(self, stamp: Stamp) -> None:
        """Moves on to the end of the last frame."""
        usual = self._usual(self._choose(stamp))
        self._jump_to(self.time + max(usual, stamp.lasts or 0.0), usual)

    def notes(self) -> Iterator[str]:
        """What was repaired, in words."""
        for kind, text in _REPAIRS.items():
            if count := self._repairs[kind]:
                at, by = self._first[kind]
                where = f"once, at {at:.2f} s" if count == 1 else f"{count} times, first at {at:.2f} s"
                yield f"{text} ({where}{f'; {by:.2f} s' if by else ''})"

    def _repair(self, kind: str, by: float = 0.0) -> None:
        self._repairs[kind] += 1
        self._first.setdefault(kind, (self.time, by))

    def _choose(self, stamp: Stamp) -> _Stamps:
        if self._presented.faults > self._decoded.faults and self._decoded.any:
            return self._decoded
        if stamp.presented is None and self._decoded.faults <= self._presented.faults:
            return self._decoded
        return self._presented

    def _move(self, kind: _Stamps, value: float | None, ahead: Sequence[Stamp]) -> bool:
        """Moves on to a stamp; whether the time shown is exactly what it says."""
        usual = self._usual(kind)
        if value is None or kind.last is None:
            self.time += usual
            return False
        if value < kind.last:
            self._repair("back")
            self.time += usual
            return False
        # Two equal stamps leave a frame without length; a clock that stands for as long as we can see is broken.
        endless = len(ahead) == _AHEAD or self.time == 0
        self._standing = value == kind.last and (self._standing or (endless and {kind.of(s) for s in ahead} <= {value}))
        if self._standing:
            self._repair("stand")
            self.time += usual
            return False
        # Not back: after frames without stamps, the usual step may have led too far.
        return self._jump_to(max(self.time, value + kind.offset), usual)

    def _jump_to(self, time: float, usual: float) -> bool:
        """Moves on by as much as can be trusted; whether that is all."""
        gap = time - self.time
        whole = self._whole
        latest = self.time + _LONGEST_GAP if whole is None or self.time > whole else whole + _SURE
        if gap > _SURE and time > latest:
            self._repair("jump", gap)
            self.time += usual
            return False
        if gap > _LONG_STILL:
            self._repair("still", gap)
        self.time = time
        return True

    def _usual(self, kind: _Stamps) -> float:
        """The median of the last steps: a header's rate may be any number."""
        return min(statistics.median_low(kind.steps), _SURE) if kind.steps else self._step
