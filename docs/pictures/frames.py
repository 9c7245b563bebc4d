"""Small drawings of what four shots show; `time` in [0, 1) moves them."""

import math

from svg import Picture, number


def draw_frame(picture: Picture, x: float, y: float, width: float, height: float, shot: int, time: float) -> None:
    """One frame of shot 0 to 3 at (x, y)."""
    (_lighthouse_by_day, _boat, _tea, _lighthouse_by_night)[shot](picture, x, y, width, height, time)


def _polygon(picture: Picture, fill: str, *points: tuple[float, float], **more) -> None:
    picture.path("M" + "L".join(f"{number(a)} {number(b)}" for a, b in points) + "Z", fill=fill, **more)


def _disc(picture: Picture, x: float, y: float, radius: float, fill: str) -> None:
    picture.add("circle", cx=float(x), cy=float(y), r=float(radius), fill=fill)


def _lighthouse(picture: Picture, x, y, w, h, wall, stripe, lamp, rock) -> None:
    left, top = x + 0.22 * w, y + 0.18 * h
    _polygon(
        picture,
        rock,
        (x, y + h),
        (x, y + 0.82 * h),
        (x + 0.2 * w, y + 0.72 * h),
        (x + 0.5 * w, y + 0.76 * h),
        (x + 0.62 * w, y + h),
    )
    _polygon(
        picture, wall, (left - 3.2, y + 0.76 * h), (left - 2, top + 4), (left + 2, top + 4), (left + 3.2, y + 0.76 * h)
    )
    for share in (0.25, 0.65):
        a, b = top + 4 + share * (0.58 * h - 4), top + 4 + (share + 0.2) * (0.58 * h - 4)
        _polygon(
            picture,
            stripe,
            (left - 2 - 1.2 * share, a),
            (left + 2 + 1.2 * share, a),
            (left + 2.3 + 1.2 * share, b),
            (left - 2.3 - 1.2 * share, b),
        )
    picture.box(left - 1.8, top + 0.8, 3.6, 3.2, lamp)
    _polygon(picture, stripe, (left - 2.6, top + 0.8), (left, top - 2.2), (left + 2.6, top + 0.8))


def _lighthouse_by_day(picture: Picture, x, y, w, h, time) -> None:
    picture.box(x, y, w, h, "#cfe8f7")
    _disc(picture, x + 0.75 * w, y + (0.62 - 0.35 * time) * h, 3.4, "#ffd166")
    picture.box(x, y + 0.7 * h, w, 0.3 * h, "#4d9cc9")
    _lighthouse(picture, x, y, w, h, "#ffffff", "#d64545", "#ffe8a3", "#6b705c")


def _boat(picture: Picture, x, y, w, h, time) -> None:
    picture.box(x, y, w, h, "#dff1f7")
    picture.box(x, y + 0.62 * h, w, 0.38 * h, "#3f88b5")
    _polygon(picture, "#8fb996", (x + 0.72 * w, y + 0.62 * h), (x + 0.86 * w, y + 0.44 * h), (x + w, y + 0.62 * h))
    at, sea = x + (0.2 + 0.45 * time) * w, y + 0.66 * h
    _boat_at(picture, at, sea, "#7f4f24", "#ffffff", "#f4a261")


def _boat_at(picture: Picture, x, sea, hull, sail, jib) -> None:
    _polygon(picture, hull, (x - 6, sea), (x + 7, sea), (x + 4, sea + 4), (x - 4, sea + 4))
    _polygon(picture, sail, (x, sea - 1.5), (x, sea - 13), (x + 6, sea - 1.5))
    _polygon(picture, jib, (x - 1, sea - 1.5), (x - 1, sea - 10), (x - 5.5, sea - 1.5))


def _tea(picture: Picture, x, y, w, h, time) -> None:
    picture.box(x, y, w, h, "#f3dfc1")
    picture.box(x + 0.56 * w, y + 0.14 * h, 0.32 * w, 0.36 * h, "#9ad1e3", radius=1)
    picture.box(x, y + 0.76 * h, w, 0.24 * h, "#8d5b38")
    picture.box(x + 0.2 * w, y + 0.5 * h, 0.28 * w, 0.27 * h, "#ffffff", radius=2)
    picture.add("circle", cx=x + 0.5 * w, cy=y + 0.61 * h, r=2.2, fill="none", stroke="#ffffff", stroke_width=1.3)
    for i in (0, 1):
        left, wave = x + (0.28 + 0.12 * i) * w, 2 * math.sin(6 * time + i)
        picture.path(f"M{number(left)} {number(y + 0.44 * h)}q{number(wave)} -3 0 -5t0 -4", stroke="#b08968", width=1.1)


def _lighthouse_by_night(picture: Picture, x, y, w, h, time) -> None:
    picture.box(x, y, w, h, "#1d2b53")
    for a, b in ((0.55, 0.15), (0.72, 0.32), (0.9, 0.12), (0.42, 0.3)):
        _disc(picture, x + a * w, y + b * h, 0.6, "#ffffff")
    picture.box(x, y + 0.7 * h, w, 0.3 * h, "#16213e")
    left, top, turn = x + 0.22 * w, y + 0.18 * h + 2.4, (0.05 + 0.5 * time) * h
    _polygon(picture, "#ffe8a3", (left, top), (x + w, top - 4 + turn), (x + w, top + 5 + turn), fill_opacity=0.6)
    _boat_at(picture, x + (0.84 - 0.2 * time) * w, y + 0.8 * h, "#5c3d24", "#dfe4f2", "#c9803f")
    _lighthouse(picture, x, y, w, h, "#b8c0d9", "#8f2d3c", "#fff3c4", "#2d3142")
