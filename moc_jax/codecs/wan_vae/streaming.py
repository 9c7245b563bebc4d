"""Videos through an autoencoder in memory that does not grow with their length: piece by piece in time, and where asked
for, tile by tile in space.

Each piece is a call of the same program, whose state is what convolutions keep of the last frames; so however long a
video is, two programs are compiled, of its first frame and of a piece. While a piece is computed, the one before it
comes back from the device.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from moc_jax.codecs.wan_vae.layers import Kept, Weights
from moc_jax.codecs.wan_vae.network import Sizes, decode_piece, encode_piece
from moc_jax.shapes import Array, Float, Float32

Piece = Callable[[Weights, Sizes, Kept | None, Array], tuple[Array, Kept]]

_encode = jax.jit(encode_piece, static_argnums=1, donate_argnums=2)
_decode = jax.jit(decode_piece, static_argnums=1, donate_argnums=2)


def encoded(
    w: Weights, sizes: Sizes, video: Float[np.ndarray, "B F Y X 3"], place: Callable[[np.ndarray], Array], piece: int
) -> Iterator[Float32[np.ndarray, "B _ y x Z"]]:
    """Latents, not normalised, of 1 + 4 n frames, as they come: the first frame's, then of `piece` latent frames."""
    return _streamed(functools.partial(_encode, w, sizes), video, place, 4 * piece)


def decoded(
    w: Weights, sizes: Sizes, latents: Float[np.ndarray, "B f y x Z"], place: Callable[[np.ndarray], Array], piece: int
) -> Iterator[Float32[np.ndarray, "B _ Y X 3"]]:
    """Pixels, as they come: the first frame, then of `piece` latent frames."""
    return _streamed(functools.partial(_decode, w, sizes), latents, place, piece)


def _streamed(step, given: np.ndarray, place: Callable[[np.ndarray], Array], size: int) -> Iterator[np.ndarray]:
    """A last piece that is too short is filled with its last frame, and of what comes of that, nothing is used: frames
    don't know of later ones."""
    frames, kept = given.shape[1], None
    begins = [0, *range(1, frames, size)]
    coming: list[tuple[Array, float]] = []
    for begin, end in itertools.pairwise([*begins, None]):
        part = given[:, begin:end]
        lacking = size - part.shape[1] if begin else 0
        if lacking:
            part = np.concatenate([part, np.repeat(part[:, -1:], lacking, axis=1)], axis=1)
        out, kept = step(kept, place(part))
        out.copy_to_host_async()
        coming.append((out, 1 - lacking / size if begin else 1))
        if len(coming) > 1:
            yield _used(*coming.pop(0))
    yield from itertools.starmap(_used, coming)


def _used(out: Array, share: float) -> np.ndarray:
    return np.asarray(out)[:, : round(share * out.shape[1])]


# ------------------------------------------------------------------------------------------------ tiles


def tiles(size: int, tile: int, overlap: int) -> list[int]:
    """Where along an axis tiles begin: `tile` long, each `overlap` or more over the one before it."""
    if not tile or size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def fading(tile: int, overlap: int) -> Float32[np.ndarray, " tile"]:
    """How much each position of a tile counts: less towards its ends, over the overlap."""
    at = np.arange(tile, dtype=np.float32)
    return np.minimum(1, (np.minimum(at, at[::-1]) + 1) / (overlap + 1))


def tiled(
    run: Callable[[np.ndarray], Iterator[np.ndarray]],
    given: Float[np.ndarray, "B F y x c"],
    out: tuple[int, int, int, int, int],
    tile: tuple[int, int],
    overlap: tuple[int, int],
) -> Float32[np.ndarray, "B f Y X d"]:
    """What `run` makes of `given`, tile by tile; where tiles overlap, their means, the nearer to a tile's end the less
    that tile counts.

    Args:
        out: the shape of the result.
        tile, overlap: along rows and columns of `given` and of the result.
    """
    starts = [tiles(size, tile[0], overlap[0]) for size in given.shape[2:4]]
    whole = all(len(of) == 1 for of in starts)
    if whole:
        return _whole(run(given), out)
    total, counts = np.zeros(out, np.float32), np.zeros((*out[2:4], 1), np.float32)
    for y, x in itertools.product(*starts):
        part = given[:, :, y : y + tile[0], x : x + tile[0]]
        y, x, begin = y * tile[1] // tile[0], x * tile[1] // tile[0], 0
        for made in run(part):
            rows, columns = made.shape[2:4]
            place = slice(y, y + rows), slice(x, x + columns)
            weight = np.outer(fading(rows, overlap[1]), fading(columns, overlap[1]))[..., None]
            total[:, begin : begin + made.shape[1], *place] += made * weight
            counts[place] += 0 if begin else weight
            begin += made.shape[1]
    return total / counts


def _whole(pieces: Iterator[np.ndarray], out: tuple[int, int, int, int, int]) -> np.ndarray:
    total, begin = np.empty(out, np.float32), 0
    for made in pieces:
        total[:, begin : begin + made.shape[1]] = made
        begin += made.shape[1]
    return total
