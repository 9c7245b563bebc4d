"""Shots and captions -> one token stream -> chunk table, with static shapes (MoC, section 3.1; LCT, section 3).

A scene reads   [global caption] [caption 1][video 1] [caption 2][video 2] ... [caption S][video S]   and a *chunk* is
a run of tokens that never crosses a shot or caption boundary. Chunks are numbered in that order, and the rotary
positions follow it. In memory, all text comes first and all video after it,

    [global caption][caption 1] ... [caption S][padding] [video 1][video 2] ... [video S][padding]

because text and video have weights of their own and attention does not care about the order of its tokens.
Sizes are static (`SceneShape`), lengths inside them are data (`SceneLengths`): one compiled program serves them all.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.config import ChunkConfig
from moc_jax.config.base import INT32, Natural, Settings, check
from moc_jax.shapes import Array, Bool, Float, Int, as_array, concrete, typed

PAD, TEXT, VIDEO = 0, 1, 2  # kinds of chunk
GLOBAL, NO_SHOT = -1, -2  # `shot` of the global caption, and of padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneShape(Settings):
    """The static sizes of a scene, in tokens (after patching). Tokens are numbered with 32 bits."""

    shots: Natural
    frames: Natural  # all shots together
    rows: Natural
    columns: Natural
    text_tokens: Natural

    def check_together(self):
        check(self.tokens <= INT32, f"{self} has {self.tokens:,} tokens; at most {INT32:,} are possible")

    @property
    def video_tokens(self) -> int:
        """Of all frames."""
        return self.frames * self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Of text and video: N."""
        return self.text_tokens + self.video_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SceneLengths:
    """What of a `SceneShape` is in use. Both sums must stay within the shape's bounds."""

    shot_frames: Int[Array, "B S"]  # token frames of each shot; 0: no shot there
    text_lengths: Int[Array, "B P"]  # tokens of the global caption, then of each shot's
    continues: Bool[Array, "B S"] | None = None  # shots that continue the one before, a long take in parts; None: none
    clean_first: Bool[Array, "B S"] | None = None  # shots whose first frame is given and stands at t = 0; None: none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scene:
    """A batch of encoded scenes: what data yields, diffusion noises and the model reads.

    Here, before patching, `lengths.shot_frames` counts latent frames.
    """

    video: Float[Array, "B F Y X Z"]  # latents of all shots, one after another along F, then zeros
    text: Float[Array, "B L E"]  # embeddings of all captions, the global one first, then zeros
    lengths: SceneLengths
    # What is given of the video, to models with `condition_channels`.
    condition: Float[Array, "B F Y X C"] | None = dataclasses.field(default=None, kw_only=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkTable:
    """Which tokens belong together. Chunks are in scene order; `start` is where each lies in memory.

    Video chunks of one shot lie one after another in memory, in chunk order.
    """

    kind: Int[Array, "B C"]  # PAD, TEXT or VIDEO
    shot: Int[Array, "B C"]  # 0..S-1, GLOBAL or NO_SHOT
    start: Int[Array, "B C"]  # first token in memory
    length: Int[Array, "B C"]  # tokens; 0 for padding and for empty captions
    chunk_of: Int[Array, "B N"]  # chunk of each token; -1 for padding tokens
    text_tokens: int = dataclasses.field(metadata={"static": True})  # tokens [0, text_tokens) are the text block
    max_chunk: int = dataclasses.field(metadata={"static": True})  # no video chunk is longer
    # No scene has more shots, or captions beside the global one; None: no more than there are chunks.
    max_shots: int | None = dataclasses.field(default=None, metadata={"static": True})
    chunk: ChunkConfig | None = dataclasses.field(default=None, metadata={"static": True})  # that cut it; None: by hand

    @property
    def token_kind(self) -> Int[Array, "B N"]:
        """The kind of each token's chunk; PAD for padding."""
        return at_tokens(self.kind, self.chunk_of, PAD)

    @property
    def token_shot(self) -> Int[Array, "B N"]:
        """The shot of each token's chunk; NO_SHOT for padding."""
        return at_tokens(self.shot, self.chunk_of, NO_SHOT)

    @property
    def valid(self) -> Bool[Array, "B N"]:
        """False for padding."""
        return self.chunk_of >= 0


def at_tokens(per_chunk: Int[Array, "B C"], chunk_of: Int[Array, "B N"], padding: int) -> Int[Array, "B N"]:
    """Each token's value of a value per chunk; `padding` for tokens of no chunk."""
    picked = jnp.take_along_axis(per_chunk, jnp.maximum(chunk_of, 0), axis=-1)
    return jnp.where(chunk_of >= 0, picked, padding)


def max_video_chunks(shape: SceneShape, chunk: ChunkConfig) -> int:
    """The most video chunks that any scene of this shape can have.

    A shot of T units has 1 + (T - 1) // size chunks, so S shots of T units in all have at most S + (T - S) // size.
    """
    units = shape.frames if chunk.unit == "frames" else shape.video_tokens
    shots = min(shape.shots, units)
    return shots + (units - shots) // chunk.size


def max_chunks(shape: SceneShape, chunk: ChunkConfig) -> int:
    """Rows of the chunk table: the global caption, a caption per shot, and the video chunks."""
    return 1 + shape.shots + max_video_chunks(shape, chunk)


def chunk_table(lengths: SceneLengths, shape: SceneShape, chunk: ChunkConfig) -> ChunkTable:
    """Cuts every shot into chunks of at most `chunk.size` frames or tokens.

    Raises:
        TypeError: `lengths` are not arrays of integers.
        ValueError: `lengths` and `shape` disagree about the number of shots; or where their values are known, which
            inside jit they aren't, they are negative or beyond the shape.
    """
    lengths = _checked(lengths, shape)
    shots = shape.shots
    unit = shape.rows * shape.columns if chunk.unit == "frames" else 1
    rows = max_chunks(shape, chunk)

    def one(shot_frames, text_lengths):
        frame = shape.rows * shape.columns
        units = shot_frames * (frame // unit)
        parts = -(-units // chunk.size)  # [S]
        # Shot s fills the rows [row_start[s], row_start[s] + 1 + parts[s]): its caption, then its video chunks.
        present = units > 0
        row_count = jnp.where(present | (text_lengths[1:] > 0), 1 + parts, 0)
        row_end = 1 + jnp.cumsum(row_count)
        row = jnp.arange(rows)
        shot = jnp.searchsorted(row_end, row, side="right")  # row 0 is the global caption
        inside = jnp.minimum(shot, shots - 1)
        part = row - (row_end - row_count)[inside] - 1  # -1: the caption
        is_global, is_pad = row == 0, shot >= shots
        is_text = is_global | ((part < 0) & ~is_pad)

        caption = jnp.where(is_global, 0, inside + 1)
        text_start = (jnp.cumsum(text_lengths) - text_lengths)[caption]
        n, p = units[inside], jnp.maximum(parts[inside], 1)
        if chunk.remainder == "even":
            cut = part * (n // p) + jnp.minimum(part, n % p)
            size = n // p + (part < n % p)
        else:
            cut = part * chunk.size
            size = jnp.minimum(chunk.size, n - cut)
        video_start = shape.text_tokens + (jnp.cumsum(shot_frames) - shot_frames)[inside] * frame + cut * unit

        kind = jnp.where(is_pad, PAD, jnp.where(is_text, TEXT, VIDEO))
        length = jnp.where(is_text, text_lengths[caption], size * unit)
        return (
            kind,
            jnp.where(is_global, GLOBAL, jnp.where(is_pad, NO_SHOT, inside)),
            jnp.where(is_pad, 0, jnp.where(is_text, text_start, video_start)),
            jnp.where(is_pad, 0, length),
        )

    kind, shot, start, length = jax.vmap(one)(lengths.shot_frames, lengths.text_lengths)
    return ChunkTable(
        kind=kind,
        shot=shot,
        start=start,
        length=length,
        chunk_of=chunks_of_tokens(start, length, shape.tokens),
        text_tokens=shape.text_tokens,
        max_chunk=min(chunk.size * unit, shape.video_tokens),
        max_shots=shape.shots,
        chunk=chunk,
    )


def _checked(lengths: SceneLengths, shape: SceneShape) -> SceneLengths:
    """The lengths as arrays; raises TypeError or ValueError unless they are lengths of scenes of this shape."""
    if not isinstance(lengths, SceneLengths):
        raise TypeError(f"lengths is a {type(lengths).__name__}; give SceneLengths(shot_frames, text_lengths)")
    given = {"shot_frames": shape.frames, "text_lengths": shape.text_tokens}
    arrays = {name: as_array(name, getattr(lengths, name), integers=True) for name in given}
    frames, text = (x.shape for x in arrays.values())
    if len(frames) != 2 or len(text) != 2 or frames[0] != text[0]:
        raise ValueError(
            f"shot_frames has shape {frames} and text_lengths {text}; they must be [scenes, shots] and "
            "[scenes, captions] of as many scenes"
        )
    if frames[1] != shape.shots or text[1] != shape.shots + 1:
        raise ValueError(
            f"lengths are for {frames[1]} shots and {text[1]} captions, but the scene's shape has {shape.shots} shots "
            f"and needs {shape.shots + 1} captions (the global one first)"
        )
    for name, limit in given.items():
        _check_lengths(name, getattr(lengths, name), limit)
    return dataclasses.replace(lengths, **arrays)


def _check_lengths(name: str, lengths: Array, limit: int) -> None:
    values = concrete(lengths)
    if values is None:
        return
    what = "frames" if name == "shot_frames" else "tokens"
    for scene, each in enumerate(values.astype(np.int64)):
        if (each < 0).any():
            raise ValueError(f"{name} of scene {scene} are {each.tolist()}; a length is 0 or more")
        if each.sum() > limit:
            raise ValueError(
                f"{name} of scene {scene} are {each.tolist()}, {each.sum()} {what} in all, but the scene's shape holds "
                f"at most {limit}; shorten them, or use a larger SceneShape"
            )


def chunks_of_tokens(start: Int[Array, "B C"], length: Int[Array, "B C"], tokens: int) -> Int[Array, "B N"]:
    """The chunk that holds each token: the last non-empty one that starts at or before it, if it reaches that far."""

    def one(start, length):
        order = jnp.argsort(jnp.where(length > 0, start, tokens))
        begin = jnp.where(length > 0, start, tokens)[order]
        token = jnp.arange(tokens)
        slot = jnp.maximum(jnp.searchsorted(begin, token, side="right") - 1, 0)
        chunk = order[slot]
        inside = (token >= start[chunk]) & (token < start[chunk] + length[chunk])
        return jnp.where(inside, chunk, -1)

    return jax.vmap(one)(start, length)


def frame_shot(shot_frames: Int[Array, "B S"], frames: int) -> Int[Array, "B F"]:
    """The shot of each of `frames` frames, shots lying one after another; NO_SHOT for padding.

    Raises:
        TypeError, ValueError: as `chunk_table`.
    """
    _check_lengths("shot_frames", as_array("shot_frames", shot_frames, integers=True), frames)
    end = jnp.cumsum(shot_frames, axis=1)
    frame = jnp.arange(frames)
    shot = jnp.sum(frame[None, :, None] >= end[:, None, :], axis=-1)
    return jnp.where(shot < shot_frames.shape[1], shot, NO_SHOT)


@typed
def clean_frames(lengths: SceneLengths, frames: int) -> Bool[Array, "B {frames}"]:
    """Which of `frames` frames are given first frames that stand at t = 0, whatever their shots' noise level."""
    if lengths.clean_first is None:
        return jnp.zeros((lengths.shot_frames.shape[0], frames), bool)
    begin = jnp.cumsum(lengths.shot_frames, axis=1) - lengths.shot_frames
    mine = lengths.clean_first & (lengths.shot_frames > 0)
    return (mine[:, None] & (begin[:, None] == jnp.arange(frames)[None, :, None])).any(axis=-1)


@typed
def noisiest(
    t: Float[Array, "B S"], lengths: SceneLengths, among: Bool[Array, "B S"] | None = None
) -> Float[Array, " B"]:
    """The highest noise level of each scene's shots, which decides among experts by noise level.

    Args:
        among: Which shots count; none given: all. A scene without any follows the others of its batch.
    """
    counts = lengths.shot_frames > 0 if among is None else (lengths.shot_frames > 0) & among
    level = jnp.max(jnp.where(counts, t, 0), axis=1)
    return jnp.where(counts.any(axis=1), level, jnp.max(level))


def positions(lengths: SceneLengths, shape: SceneShape) -> Int[Array, "B N 3"]:
    """Interleaved 3-D rotary positions (t, h, w) of every token, text block first (LCT, section 3.2).

    Text advances all three together; a shot's video starts where its caption ended on that diagonal, and the next
    group starts past the video's largest extent, so no two tokens of a scene share a position. A shot that continues
    the one before without a caption of its own starts a frame after that one's last.

    Raises:
        TypeError, ValueError: as `chunk_table`.
    """
    lengths = _checked(lengths, shape)
    frame = shape.rows * shape.columns

    def one(shot_frames, text_lengths, continues):
        extent = jnp.where(shot_frames > 0, jnp.maximum(shot_frames, max(shape.rows, shape.columns)), 0)
        if continues is not None:
            runs_on = jnp.append(continues & (shot_frames > 0) & (text_lengths[1:] == 0), False)[1:]
            extent = jnp.where(runs_on, shot_frames, extent)
        advance = text_lengths + jnp.concatenate([jnp.zeros(1, extent.dtype), extent])  # [P]
        begin = jnp.cumsum(advance) - advance  # where each caption starts on the diagonal

        token = jnp.arange(shape.text_tokens)
        end = jnp.cumsum(text_lengths)
        caption = jnp.minimum(jnp.searchsorted(end, token, side="right"), text_lengths.shape[0] - 1)
        text = begin[caption] + token - (end - text_lengths)[caption]

        token = jnp.arange(shape.video_tokens)
        end = jnp.cumsum(shot_frames)
        shot = jnp.minimum(jnp.searchsorted(end, token // frame, side="right"), shape.shots - 1)
        corner = (begin + text_lengths)[shot + 1]
        t = token // frame - (end - shot_frames)[shot]
        video = jnp.stack([t, token % frame // shape.columns, token % shape.columns], axis=-1) + corner[:, None]
        return jnp.concatenate([jnp.stack([text] * 3, axis=-1), video])

    return jax.vmap(one)(lengths.shot_frames, lengths.text_lengths, lengths.continues)
