"""The picture of the kernels: what becomes of a small scene before a kernel walks it, in the kernels' words.

Chunks and picks are the library's own; tiles and blocks have 8 rows here, so that one can count them.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from svg import FAINT, INK, LINE, MUTED, OWN, PICK, TEXT, Picture, number

from moc_jax import ChunkConfig, MoCConfig, SceneLengths, SceneShape, chunk_table, route

SHOTS, CAPTIONS, TEXT_TOKENS, VIDEO_TOKENS = (12, 20, 10), (3, 4, 3, 4), 16, 48
CFG = MoCConfig(chunk=ChunkConfig(size=4), top_k=2)
TILE = 8
WALKER = 3  # the tile of video whose keys are shown

_LEFT, _CELL, _HIGH = 118, 14.2, 24
_SHADES = ("#9db7e8", "#5f8bdc", OWN)  # of the three shots
_HATCH = "#ececf1"


class Walk:
    """The scene's chunks, segments, tiles and slots."""

    def __init__(self):
        shape = SceneShape(shots=3, frames=VIDEO_TOKENS, rows=1, columns=1, text_tokens=TEXT_TOKENS)
        lengths = SceneLengths(jnp.asarray([SHOTS]), jnp.asarray([CAPTIONS]))
        table = chunk_table(lengths, shape, CFG.chunk)
        q, k = jax.random.normal(jax.random.key(4), (2, 1, shape.tokens, 1, 8))
        self.picks = np.asarray(route(q, k, table, CFG))[0, 0]
        fields = ("kind", "shot", "start", "length", "chunk_of")
        self.kind, self.shot, self.start, self.length, self.chunk_of = (
            np.asarray(getattr(table, name))[0] for name in fields
        )
        self.chunks = np.flatnonzero(self.length)
        text = [(int(self.start[c]), int(self.length[c])) for c in self.chunks if self.kind[c] == 1]
        video = [(TEXT_TOKENS + sum(SHOTS[:s]), SHOTS[s]) for s in range(3)]
        self.segments = [*text, *video]

    def colour(self, chunk: int) -> str:
        """Green for text; for video, a shade by shot."""
        return TEXT if self.kind[chunk] == 1 else _SHADES[self.shot[chunk]]

    def tiles(self) -> list[tuple[int, int]]:
        """(first row, rows in use) of every tile."""
        return [(a + i, min(TILE, n - i)) for a, n in self.segments for i in range(0, n, TILE)]

    def slots(self) -> list[tuple[int, list[int]]]:
        """(chunk, its queries) for every tile of slots: pairs sorted by chunk, in whole tiles for each chunk."""
        found = []
        for chunk in self.chunks:
            readers = [n for n in range(len(self.picks)) if chunk in self.picks[n]]
            found += [(int(chunk), readers[i : i + TILE]) for i in range(0, len(readers), TILE)]
        return found


def draw(path: pathlib.Path) -> None:
    """Writes the picture."""
    walk, picture = Walk(), Picture(1040, 640, "A scene, its chunks, segments, tiles and slots")
    _chunks(picture, walk)
    _tiles(picture, walk)
    _runs(picture, walk)
    _slots(picture, walk)
    _merge(picture)
    picture.save(path)


def _name(picture: Picture, y: float, name: str, *words: str) -> None:
    picture.text(20, y + 11, name, size=13, bold=True)
    for i, line in enumerate(words):
        picture.text(20, y + 26 + 13 * i, line, size=10.5, colour=MUTED)


def _cells(picture: Picture, first: float, count: float, y: float, colour: str, label: str = "", **more) -> None:
    x = _LEFT + first * _CELL
    picture.box(x + 0.6, y, count * _CELL - 1.2, _HIGH, colour, radius=3, **more)
    if label:
        fill = MUTED if colour in (_HATCH, FAINT, "none") else "#fff"
        picture.text(x + count * _CELL / 2, y + 16, label, size=11, colour=fill, anchor="middle", bold=True)


def _bracket(picture: Picture, first: float, count: float, y: float, words: str, colour: str = MUTED) -> None:
    left, right = _LEFT + first * _CELL + 1, _LEFT + (first + count) * _CELL - 1
    picture.path(f"M{number(left)} {y}v5H{number(right)}v-5", stroke=colour, width=1.2)
    picture.text((left + right) / 2, y + 17, words, size=11, colour=colour, anchor="middle")


def _chunks(picture: Picture, walk: Walk) -> None:
    _name(picture, 24, "chunks", "scene order")
    place = 0
    for chunk in walk.chunks:
        _cells(picture, place, walk.length[chunk], 24, walk.colour(chunk), str(chunk))
        place += walk.length[chunk]
    _name(picture, 82, "chunks", "in memory")
    for chunk in walk.chunks:
        _cells(picture, walk.start[chunk], walk.length[chunk], 82, walk.colour(chunk), str(chunk))
    text, video = sum(CAPTIONS), sum(SHOTS)
    _cells(picture, text, TEXT_TOKENS - text, 82, _HATCH)
    _cells(picture, TEXT_TOKENS + video, VIDEO_TOKENS - video, 82, _HATCH, "padding")
    _bracket(picture, 0, TEXT_TOKENS, 111, "text block")
    _bracket(picture, TEXT_TOKENS, VIDEO_TOKENS, 111, "video block")


def _tiles(picture: Picture, walk: Walk) -> None:
    _name(picture, 152, "segments", "same anchors")
    for first, count in walk.segments:
        _cells(picture, first, count, 152, walk.colour(walk.chunk_of[first]))
    for shot, (first, count) in enumerate(walk.segments[-3:]):
        x = _LEFT + (first + count / 2) * _CELL
        picture.text(x, 168, f"shot {shot + 1}", size=11, colour="#fff", anchor="middle", bold=True)
    _name(picture, 202, "tiles", "of queries;", "8 rows here")
    video = [tile for tile in walk.tiles() if tile[0] >= TEXT_TOKENS]
    for i, (first, used) in enumerate(walk.tiles()):
        y = 202 + 28 * (i % 2)
        if used < TILE and first >= TEXT_TOKENS:
            _cells(picture, first, TILE, y, _HATCH)
        _cells(picture, first, used, y, walk.colour(walk.chunk_of[first]))
    first, used = video[WALKER]
    y = 202 + 28 * (walk.tiles().index(video[WALKER]) % 2)
    picture.box(_LEFT + first * _CELL, y - 1, TILE * _CELL, _HIGH + 2, "none", radius=4, stroke=INK, stroke_width=2)


def _runs(picture: Picture, walk: Walk) -> None:
    """The keys that one tile walks: two runs, in blocks."""
    y = 292
    _name(picture, y, "runs", "of keys, walked", "by that tile")
    for chunk in walk.chunks:
        _cells(picture, walk.start[chunk], walk.length[chunk], y, FAINT)
    shot = walk.shot[walk.chunk_of[[t for t in walk.tiles() if t[0] >= TEXT_TOKENS][WALKER][0]]]
    own = (*walk.segments[shot - 3], _SHADES[shot])
    runs = {"all captions: one run": (0, sum(CAPTIONS), TEXT), "its own shot: one run": own}
    for words, (first, count, colour) in runs.items():
        for at in range(0, count, TILE):
            used = min(TILE, count - at)
            _cells(picture, first + at, used, y, colour, "block" if used > 3 else "")
        _bracket(picture, first, count, y + 29, words)
    picture.text(
        _LEFT, y + 66, "masks are needed only where a run begins or ends inside a block", size=11, colour=MUTED
    )


def _slots(picture: Picture, walk: Walk) -> None:
    """The sorted pairs of one head."""
    y, slots = 392, walk.slots()
    _name(picture, y, "slots", "of picks, one", "head; sorted", "by chunk")
    cell = (1022 - _LEFT) / (TILE * len(slots))
    for i, (chunk, readers) in enumerate(slots):
        left = _LEFT + i * TILE * cell
        for j in range(TILE):
            query = readers[j] if j < len(readers) else None
            colour = _HATCH if query is None else walk.colour(walk.chunk_of[query])
            picture.box(left + j * cell + 0.5, y + 1, cell - 1, _HIGH - 2, colour, radius=1.5)
        picture.box(left, y - 1, TILE * cell - 1, _HIGH + 2, "none", radius=4, stroke=PICK, stroke_width=1.6)
        label = {"size": 11, "colour": PICK, "anchor": "middle", "bold": True}
        picture.text(left + TILE * cell / 2, y + 42, f"reads {chunk}", **label)
    words = "each pair (query, chunk) has a slot, in the shade of its query's shot; a tile of slots reads one chunk"
    picture.text(_LEFT, y + 62, words, size=11, colour=MUTED)


def _merge(picture: Picture) -> None:
    y = 500
    _name(picture, y + 10, "parts", "of one query")
    for i, (words, colour) in enumerate([("anchors", OWN), ("1st pick", PICK), ("2nd pick", PICK)]):
        x = _LEFT + 118 * i
        picture.box(x, y, 100, 46, "#fff", radius=6, stroke=colour, stroke_width=1.6)
        picture.text(x + 50, y + 19, words, size=12, colour=colour, anchor="middle", bold=True)
        picture.text(x + 50, y + 36, "out, lse", size=11, colour=MUTED, anchor="middle", mono=True)
        if i:
            picture.text(x - 9, y + 28, "+", size=15, colour=MUTED, anchor="middle")
    x = _LEFT + 354
    picture.line(x - 8, y + 23, x + 16, y + 23, INK, 1.6)
    picture.path(f"M{x + 14} {y + 18}l9 5l-9 5z", fill=INK)
    picture.text(x + 36, y + 18, "lse = log( sum of exp(lse_p) )", size=12, mono=True)
    picture.text(x + 36, y + 38, "out = sum of exp(lse_p - lse) * out_p", size=12, mono=True)
    picture.line(20, y + 74, 1020, y + 74, LINE)
    picture.text(20, y + 98, "Forward: every part by itself, then the merge.", size=12)
    picture.text(
        20, y + 117, "Backward: given the final lse, every part knows its final weights, and gradients add up.", size=12
    )
