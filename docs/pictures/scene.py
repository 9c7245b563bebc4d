"""The README's picture: one scene, its chunks, and what one query reads, as `moc_jax` itself routes it.

Four shots; in the last one the boat of the second comes back to the lighthouse of the first. Queries and keys are made
of what a token shows, so the picks are the library's own, and so is the map of all pairs below.
"""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np
from frames import draw_frame
from svg import FAINT, INK, LINE, MUTED, OWN, PICK, TEXT, Picture, number

from moc_jax import VIDEO, ChunkConfig, MoCConfig, SceneLengths, SceneShape, chunk_table, route
from moc_jax.attention.routing import anchor_chunks, candidate_chunks

SHOTS = (6, 8, 4, 6)  # latent frames
CAPTIONS = (
    "A lighthouse in the morning.",
    "A boat leaves for the islands.",
    "Tea on deck.",
    "Home to the light, at night.",
)
WORDS, SIDE, HEAD = 4, 2, 32  # tokens of a caption; a frame is SIDE x SIDE tokens; size of the head
CFG = MoCConfig(chunk=ChunkConfig(unit="frames", size=2), top_k=3)
LIGHTHOUSE, SEA, BOAT, INDOORS = np.eye(4)
# What the left and the right half of each shot's frames show.
SHOWN = np.array(
    [
        [LIGHTHOUSE, SEA],
        [SEA + BOAT, SEA + 0.5 * BOAT],
        [INDOORS, INDOORS + 0.4 * BOAT],
        [LIGHTHOUSE + 0.4 * SEA, 0.9 * LIGHTHOUSE + 0.45 * BOAT + 0.1 * SEA],
    ]
)
SEED = 6
QUERY = 20, 1  # the frame and the token in it that asks

_FRAME, _GAP, _CAPTION, _SHOT = 32, 5, 15, 13  # widths: a frame, between chunks, a caption, between shots
_TOP, _HEIGHT = 128, 28  # of the film strip
_BASE = _TOP + _HEIGHT + 62  # of the scores
_GREY = "#c9c9d2"


class Scene:
    """The chunk table, and what its queries pick."""

    def __init__(self):
        shape = SceneShape(shots=4, frames=sum(SHOTS), rows=SIDE, columns=SIDE, text_tokens=5 * WORDS)
        self.table = chunk_table(SceneLengths(jnp.asarray([SHOTS]), jnp.full((1, 5), WORDS)), shape, CFG.chunk)
        q, k = _queries_and_keys()
        self.picks = np.asarray(route(q, k, self.table, CFG))[0, 0]  # [N, K]
        self.token = 5 * WORDS + QUERY[0] * SIDE**2 + QUERY[1]
        fields = ("kind", "shot", "start", "length", "chunk_of")
        self.kind, self.shot, self.start, self.length, self.chunk_of = (
            np.asarray(getattr(self.table, name))[0] for name in fields
        )
        self.anchors, self.candidates = (np.asarray(of(self.table, CFG))[0] for of in (anchor_chunks, candidate_chunks))
        self.own = int(self.chunk_of[self.token])
        q, k = np.asarray(q)[0, self.token, 0], np.asarray(k)[0, :, 0]
        means = [k[self.chunk_of == chunk].mean(axis=0) if n else 0 * q for chunk, n in enumerate(self.length)]
        self.scores = np.asarray(means) @ q  # [C]


def _queries_and_keys():
    draw = np.random.default_rng(SEED)
    meaning = np.linalg.qr(draw.normal(size=(HEAD, SHOWN.shape[2])))[0].T
    shot, frame = (np.repeat(x, SIDE**2) for x in (np.repeat(np.arange(4), SHOTS), np.arange(sum(SHOTS))))
    shown = SHOWN[shot, np.arange(len(shot)) % SIDE] @ meaning
    moment = 0.08 * draw.normal(size=(sum(SHOTS), HEAD))[frame]  # what a frame has of its own
    text = np.zeros((5 * WORDS, HEAD))
    noisy = [shown + moment + 0.05 * draw.normal(size=shown.shape) for _ in range(2)]
    return [jnp.asarray(np.concatenate([text, x]), jnp.float32)[None, :, None] for x in noisy]


def draw(path: pathlib.Path) -> None:
    """Writes the picture."""
    scene, picture = Scene(), Picture(1040, 572, "A scene of four shots, its chunks, and what one query attends to")
    spans = _strip(picture, scene)
    _arcs(picture, scene, spans)
    _scores(picture, scene, spans)
    _names(picture, scene, spans)
    _legend(picture, skipped=_map(picture, scene, 30, 314, 2))
    picture.save(path)


def _strip(picture: Picture, scene: Scene) -> dict[int, tuple[float, float]]:
    """The film; returns the left and right edge of each chunk."""
    spans, x, frame = {}, 24.0, 0
    for chunk in np.flatnonzero(scene.length):
        shot = scene.shot[chunk]
        if scene.kind[chunk] == VIDEO:
            frames = scene.length[chunk] // SIDE**2
            for i in range(frames):
                time = (frame - sum(SHOTS[:shot])) / SHOTS[shot]
                draw_frame(picture, x + i * _FRAME, _TOP, _FRAME, _HEIGHT, shot, time)
                frame += 1
            picture.box(x, _TOP, frames * _FRAME, _HEIGHT, "none", radius=3, stroke=INK, stroke_width=1.2)
            spans[chunk] = x, x + frames * _FRAME
        else:
            x += (_SHOT - _GAP) * (chunk > 0)
            picture.box(x, _TOP, _CAPTION, _HEIGHT, TEXT, radius=3)
            for line in range(4):
                y = _TOP + 6.5 + 5 * line
                picture.line(x + 3.5, y, x + 11.5 - 3 * (line == 3), y, "#fff", 1.2)
            spans[chunk] = x, x + _CAPTION
        x = spans[chunk][1] + _GAP
    return spans


def _arcs(picture: Picture, scene: Scene, spans) -> None:
    """From the query to all that it attends to."""
    left, right = spans[scene.own]
    start = left + (right - left) * (QUERY[0] % 2 + 0.75) / 2
    for chunk, (a, b) in spans.items():
        arc = functools.partial(_arc, picture, start, (a + b) / 2)
        if chunk in scene.picks[scene.token]:
            arc(PICK, 2.4)
        elif scene.anchors[scene.own, chunk] and chunk != scene.own:
            arc(OWN if scene.kind[chunk] == VIDEO else TEXT, 1.3)
    picture.add("circle", cx=float(start), cy=float(_TOP), r=5.0, fill=INK, stroke="#fff", stroke_width=1.5)
    picture.text(start + 3, 30, "one query token", size=13, bold=True, anchor="middle")
    picture.line(start, 38, start, _TOP - 6, INK, 1.2, stroke_dasharray="2 3")
    third = next(c for c in spans if scene.shot[c] == 2)
    words = {"size": 11.5, "bold": True, "anchor": "middle"}
    picture.text((spans[third][0] + start) / 2 - 46, _TOP - 16, "anchors: all captions", colour=TEXT, **words)
    own = [spans[c] for c in spans if scene.shot[c] == 3 and scene.kind[c] == VIDEO]
    y = _TOP + _HEIGHT + 14
    picture.path(f"M{number(own[0][0])} {y}v6H{number(own[-1][1])}v-6", stroke=OWN, width=1.6)
    picture.text((own[0][0] + own[-1][1]) / 2, y + 22, "anchors: its own shot", colour=OWN, **words)


def _arc(picture: Picture, start: float, end: float, colour: str, width: float) -> None:
    top = _TOP - 4
    control = top - (26 + abs(start - end) * 0.088) * 4 / 3
    curve = f"C{number(start)} {number(control)} {number(end)} {number(control)} {number(end)} {number(top)}"
    picture.path(f"M{number(start)} {top}{curve}", stroke=colour, width=width, stroke_linecap="round")
    picture.path(f"M{number(end - 3.6)} {top - 5}L{number(end)} {top + 1}L{number(end + 3.6)} {top - 5}Z", fill=colour)


def _scores(picture: Picture, scene: Scene, spans) -> None:
    """A bar for every chunk that the query may pick."""
    there = np.flatnonzero(scene.candidates[scene.own])
    picks, scale = list(scene.picks[scene.token]), 44 / max(scene.scores[there])
    for chunk in there:
        (a, b), height = spans[chunk], max(scene.scores[chunk] * scale, 1.5)
        picture.box(a + 14, _BASE - height, b - a - 28, height, PICK if chunk in picks else _GREY, radius=2)
        if chunk in picks:
            rank = {"size": 11, "colour": "#fff", "anchor": "middle", "bold": True}
            picture.text((a + b) / 2, _BASE - height + 14, str(picks.index(chunk) + 1), **rank)
    picture.line(spans[there[0]][0], _BASE, spans[there[-1]][1], _BASE, _GREY)
    picture.text(spans[there[-2]][0], _BASE - 10, "score: query · mean key", size=11, colour=MUTED)


def _names(picture: Picture, scene: Scene, spans) -> None:
    for shot, words in enumerate(CAPTIONS):
        x = next(a for chunk, (a, _) in spans.items() if scene.shot[chunk] == shot)
        picture.text(x, _BASE + 24, f"shot {shot + 1}", size=12, bold=True)
        picture.text(x, _BASE + 41, words, size=11, colour=MUTED)


def _map(picture: Picture, scene: Scene, x: float, y: float, cell: int) -> float:
    """All pairs, in scene order: rows are queries, columns keys. Returns the share that is skipped."""
    order = np.argsort(scene.chunk_of, kind="stable")
    of, size = scene.chunk_of[order], cell * len(order)
    picked = (of[None, None] == scene.picks[order][:, :, None]).any(axis=1)
    anchored, video = scene.anchors[of][:, of], scene.kind[of] == VIDEO
    picture.box(x, y, size, size, FAINT)
    for colour, pairs in ((TEXT, anchored & ~video), (OWN, anchored & video), (PICK, picked)):
        for top, bottom, left, right in _rectangles(pairs):
            place = x + left * cell, y + top * cell, (right - left) * cell, (bottom - top) * cell
            picture.box(*place, colour, shape_rendering="crispEdges")
    for edge in np.flatnonzero(np.diff(scene.shot[of])) + 1:
        at = edge * cell
        picture.line(x + at, y, x + at, y + size, "#fff", 1.0)
        picture.line(x, y + at, x + size, y + at, "#fff", 1.0)
    picture.text(x, y - 9, "keys, in the scene's order", size=11, colour=MUTED)
    picture.text(x - 8, y + size, "queries", size=11, colour=MUTED, transform=f"rotate(-90 {x - 8} {y + size})")
    return float(1 - (picked | anchored).mean())


def _rectangles(cells):
    """(top, bottom, left, right) of the runs of True in each row, equal runs of rows that follow each other as one."""
    open_, done = {}, []
    for row in range(len(cells) + 1):
        edges = np.flatnonzero(np.diff(np.pad(cells[row].astype(int), 1))) if row < len(cells) else []
        runs = {(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)}
        done += [(top, row, *run) for run, top in open_.items() if run not in runs]
        open_ = {run: open_.get(run, row) for run in sorted(runs)}
    return sorted(done)


def _legend(picture: Picture, skipped: float) -> None:
    steps = {
        "Score": "A chunk is a few frames. Its mean key times the query is its score:\none number for every chunk of "
        "the past, and no new parameter.",
        "Pick": f"Each query token of each head keeps its {CFG.top_k} best chunks, however long ago.\nHere, home at "
        "night, the lighthouse and the boat are found again.",
        "Attend": "One softmax over the picks and the anchors: all captions, and the own shot.",
    }
    x, y = 330, 322
    for i, (name, words) in enumerate(steps.items()):
        picture.add("circle", cx=float(x + 11), cy=float(y), r=11.0, fill=INK)
        picture.text(x + 11, y + 4.5, str(i + 1), size=12.5, colour="#fff", anchor="middle", bold=True)
        picture.text(x + 34, y + 5, name, size=14.5, bold=True)
        for line, part in enumerate(words.split("\n")):
            picture.text(x + 34, y + 25 + 17 * line, part, size=12.5)
        y += 68
    y += 2
    colours = {"picks": PICK, "own shot": OWN, "captions": TEXT}
    skips = f"skipped: {skipped:.0%} of the pairs, and more the longer the video"
    for place, (name, colour) in zip((0, 72, 168, 262), {**colours, skips: FAINT}.items(), strict=True):
        picture.box(x + place, y - 10, 13, 13, colour, radius=3, stroke=LINE if colour == FAINT else None)
        picture.text(x + place + 19, y + 1, name, size=12.5)
