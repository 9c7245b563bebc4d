"""Chunks that you cut by hand -> chunk table, and the order in which their tokens must lie in memory."""

import jax.numpy as jnp
import numpy as np

from moc_jax.scene import GLOBAL, NO_SHOT, PAD, TEXT, VIDEO, ChunkTable, at_tokens, chunks_of_tokens
from moc_jax.shapes import Array, Int, as_array, concrete

_WHAT = {
    "tokens": "tokens",
    "text_tokens": "tokens of text",
    "max_chunk": "tokens in a video chunk",
    "max_shots": "shots (or parts that text splits them into, or captions beside one)",
}


def chunk_table_from(
    lengths: Int[Array, "B C"],
    kinds: Int[Array, "B C"] | Int[Array, " C"] | None = None,
    shots: Int[Array, "B C"] | Int[Array, " C"] | None = None,
    *,
    tokens: int | None = None,
    text_tokens: int | None = None,
    max_chunk: int | None = None,
    max_shots: int | None = None,
) -> tuple[ChunkTable, Int[Array, "B N"]]:
    """A table from chunks cut by hand, and the order in which their tokens must lie in memory.

    The chunks follow one another in a sequence of N tokens of yours, text wherever it stands; what comes after the last
    is padding. Row c of the table, which routes name, is your video chunk c. `order` permutes your tokens:

        table, order = chunk_table_from(lengths, kinds, shots, tokens=q.shape[1])
        q, k, v = (jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (q, k, v))
        out = moc_attention(q, k, v, table, cfg)
        out = jnp.take_along_axis(out, jnp.argsort(order)[:, :, None, None], axis=1)  # in your order again

    Args:
        lengths: Tokens of each chunk.
        kinds: TEXT, VIDEO, or PAD for tokens that take no part; None: all that have tokens are video.
        shots: The shot of each chunk, from 0, and never falling from one video chunk to the next; GLOBAL for text of
            no shot. None: each video chunk is a shot of its own, and all text is global.
        tokens: N; None: what the longest scene has.
        text_tokens, max_chunk, max_shots: As in `ChunkTable`, for tables of different lengths to share one compiled
            program; None: what these lengths need. A shot that text or padding interrupts counts as several. Inside jit
            all but `max_shots` must be given.

    Raises:
        TypeError: an argument is not an array of integers.
        ValueError: shapes disagree, or a size is missing inside jit. Where values are known, also for those out of
            range, and for scenes that don't fit: text takes `text_tokens` places in every scene, so where one of a
            batch has much of it and another much video, N must be more than either's tokens.
    """
    given = {"lengths": lengths, "kinds": kinds, "shots": shots}
    arrays = {name: as_array(name, x, integers=True) for name, x in given.items() if x is not None}
    lengths = arrays["lengths"]
    shape = lengths.shape
    if len(shape) != 2:
        raise ValueError(f"lengths has shape {shape}; it must be [scenes, chunks]")
    for name, x in arrays.items():
        if x.shape not in (shape, shape[1:]):
            raise ValueError(f"{name} has shape {x.shape}; it must be that of lengths, {shape}, or {shape[1:]}")
    kind = jnp.broadcast_to(arrays.get("kinds", jnp.where(lengths > 0, VIDEO, PAD)), shape)
    each = jnp.where(kind == VIDEO, jnp.cumsum(kind == VIDEO, axis=1) - 1, GLOBAL)
    shot = jnp.where(kind == PAD, NO_SHOT, jnp.broadcast_to(arrays.get("shots", each), shape))
    sizes = {"tokens": tokens, "text_tokens": text_tokens, "max_chunk": max_chunk, "max_shots": max_shots}
    sizes = _checked(lengths, kind, shot, sizes)
    begin = jnp.cumsum(lengths, axis=1) - lengths
    rows = _rows(kind, shot)
    kind, shot, lengths, begin = (jnp.take_along_axis(x, rows, axis=1) for x in (kind, shot, lengths, begin))
    table = _laid_out(kind, shot, jnp.where(kind == PAD, 0, lengths), sizes)
    return table, _order(table, begin)


def _rows(kind: Array, shot: Array) -> Int[Array, "B C"]:
    """The chunk of each row: its own, but captions, where they stand, by their shots, so that anchors are runs."""
    group = jnp.select([kind == TEXT, kind == VIDEO], [0, 1], 2)
    there, chunk = jnp.argsort(group, axis=1), jnp.lexsort((shot, group), axis=1)
    return jnp.put_along_axis(there, there, chunk, axis=1, inplace=False)


def _laid_out(kind: Array, shot: Array, length: Array, sizes: dict[str, int]) -> ChunkTable:
    """Text first, then video, each as its rows come."""
    text, video = (jnp.where(kind == which, length, 0) for which in (TEXT, VIDEO))
    text_start, video_start = (jnp.cumsum(x, axis=1) - x for x in (text, video))
    start = jnp.select([kind == TEXT, kind == VIDEO], [text_start, sizes["text_tokens"] + video_start], 0)
    return ChunkTable(
        kind=kind,
        shot=shot,
        start=start,
        length=length,
        chunk_of=chunks_of_tokens(start, length, sizes["tokens"]),
        text_tokens=sizes["text_tokens"],
        max_chunk=sizes["max_chunk"],
        max_shots=sizes.get("max_shots"),
    )


def _order(table: ChunkTable, given: Int[Array, "B C"]) -> Int[Array, "B N"]:
    """The token at each place, where chunks began at `given`; tokens of no chunk take the places of none."""
    tokens = table.chunk_of.shape[1]
    outside = chunks_of_tokens(given, table.length, tokens) < 0
    rest = jnp.argsort(~outside, axis=1)  # stable: those first, as they come
    nth = jnp.maximum(jnp.cumsum(~table.valid, axis=1) - 1, 0)
    moved = at_tokens(given - table.start, table.chunk_of, 0)
    return jnp.where(table.valid, jnp.arange(tokens)[None] + moved, jnp.take_along_axis(rest, nth, axis=1))


def _checked(lengths: Array, kind: Array, shot: Array, sizes: dict[str, int | None]) -> dict[str, int]:
    """The sizes, those that are None by the lengths, where these are known; raises ValueError for what can't be."""
    known = {name: size for name, size in sizes.items() if size is not None}
    values = [concrete(x) for x in (lengths, kind, shot)]
    length, kinds, shots = (None if x is None else x.astype(np.int64) for x in values)
    if length is None or kinds is None or shots is None:
        missing = [name for name in ("tokens", "text_tokens", "max_chunk") if name not in known]
        if missing:
            raise ValueError(f"inside jit the lengths are not known: give {', '.join(missing)} too")
        return known
    _check_chunks(length, kinds, shots)
    text, video = kinds == TEXT, kinds == VIDEO
    follows = video[:, 1:] & video[:, :-1] & (shots[:, 1:] == shots[:, :-1])
    pieces = video.sum(axis=1) - follows.sum(axis=1)  # runs of chunks of one shot
    needs = {
        "tokens": length.sum(axis=1),
        "text_tokens": (length * text).sum(axis=1),
        "max_chunk": (length * video).max(axis=1, initial=1),
        "max_shots": np.maximum(pieces, text.sum(axis=1) - 1),
    }
    known = {name: known.get(name, int(need.max(initial=0))) for name, need in needs.items()}
    for name, need in needs.items():
        if (need > known[name]).any():
            b, most = need.argmax(), need.max()
            raise ValueError(
                f"scene {b} has {most:,} {_WHAT[name]} but {name} is {known[name]:,}; give {most:,} or more"
            )
    places = (length * video).sum(axis=1) + known["text_tokens"]
    if (places > known["tokens"]).any():
        raise ValueError(
            f"scene {places.argmax()} does not fit, as text takes {known['text_tokens']:,} places in every scene: pad "
            f"q, k and v to {places.max():,} tokens or more, and give that as `tokens` (now {known['tokens']:,})"
        )
    return known


def _check_chunks(length: np.ndarray, kind: np.ndarray, shot: np.ndarray) -> None:
    text, video = kind == TEXT, kind == VIDEO
    latest = np.maximum.accumulate(np.where(video, shot, 0), axis=1)
    for wrong, rule in (
        (length < 0, "a length is 0 or more"),
        (~np.isin(kind, (PAD, TEXT, VIDEO)), f"a kind is PAD ({PAD}), TEXT ({TEXT}) or VIDEO ({VIDEO})"),
        (video & (shot < 0), "video has a shot, from 0"),
        (text & (shot < GLOBAL), f"text has a shot, from 0, or is GLOBAL ({GLOBAL})"),
        (video & (shot < latest), "it comes after video of a later shot; number shots as they follow one another"),
    ):
        if wrong.any():
            b, c = np.argwhere(wrong)[0]
            raise ValueError(
                f"chunk {c} of scene {b} has length {length[b, c]}, kind {kind[b, c]} and shot {shot[b, c]}: {rule}"
            )
