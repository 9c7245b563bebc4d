"""Small scenes for attention tests, cut by hand or at random, and q, k, v that provoke ties and overflow."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from moc_jax.scene import GLOBAL, NO_SHOT, PAD, TEXT, VIDEO, ChunkTable
from tests.attention.oracle import Chunk

# One static size for all small tests, so that every config compiles once: lengths are data.
BATCH, HEADS, HEAD_DIM = 2, 2, 16
TEXT_TOKENS, VIDEO_TOKENS, CHUNKS, LONGEST_CHUNK, SHOTS = 12, 52, 16, 17, 5
TOKENS = TEXT_TOKENS + VIDEO_TOKENS


def cut(global_caption: int, *shots: tuple[int, list[int]], text_tokens: int = TEXT_TOKENS) -> list[Chunk]:
    """A scene from lengths: cut(2, (1, [4, 4]), (0, [3])) has captions of 2, 1 and 0 tokens and shots of 8 and 3."""
    scene = [Chunk(TEXT, GLOBAL, 0, global_caption)]
    text, video = global_caption, text_tokens
    for shot, (caption, lengths) in enumerate(shots):
        scene.append(Chunk(TEXT, shot, text, caption))
        text += caption
        for length in lengths:
            scene.append(Chunk(VIDEO, shot, video, length))
            video += length
    assert text <= text_tokens
    return scene


def table_of(
    scenes: list[list[Chunk]],
    *,
    text_tokens: int = TEXT_TOKENS,
    tokens: int = TOKENS,
    chunks: int = CHUNKS,
    max_chunk: int = LONGEST_CHUNK,
) -> ChunkTable:
    """The chunk table of scenes given as lists of chunks, padded to static sizes."""
    rows = np.tile(np.array([PAD, NO_SHOT, 0, 0]), (len(scenes), chunks, 1))
    chunk_of = np.full((len(scenes), tokens), -1)
    for b, scene in enumerate(scenes):
        rows[b, : len(scene)] = scene
        for c, chunk in enumerate(scene):
            chunk_of[b, chunk.tokens] = c
            assert chunk.kind != VIDEO or chunk.length <= max_chunk
    kind, shot, start, length = (jnp.asarray(rows[..., i], jnp.int32) for i in range(4))
    shots = max([SHOTS, *(chunk.shot + 1 for scene in scenes for chunk in scene)])
    return ChunkTable(kind, shot, start, length, jnp.asarray(chunk_of, jnp.int32), text_tokens, max_chunk, shots)


# Two shots of uneven chunks beside three shots, one of them empty and one without a caption; both with padding.
PAIR = [
    cut(2, (3, [5, 4, 6]), (2, [7, 7, 3, 4])),
    cut(3, (1, [17]), (2, []), (0, [1, 9, 4, 8]), (2, [2, 3])),
]


# Longer than any tile or block, and one token around their borders; captions too.
LARGE = [
    cut(130, (3, [1, 127, 128, 129]), (40, [300, 7]), text_tokens=180),
    cut(0, (180, [257, 64, 63]), (0, []), (0, [256, 100, 2]), text_tokens=180),
]


@st.composite
def random_scenes(draw) -> list[list[Chunk]]:
    """A batch of scenes of 0 to 4 shots (some empty) in uneven chunks, captions of 0 to 3 tokens, and padding."""

    def one():
        text, video, chunks = TEXT_TOKENS, VIDEO_TOKENS, CHUNKS - 1

        def caption():
            nonlocal text
            length = draw(st.integers(0, min(3, text)))
            text -= length
            return length

        first, shots = caption(), []
        longest = draw(st.sampled_from([LONGEST_CHUNK, 9, 5]))
        for _ in range(draw(st.sampled_from([3, 4, 2, 1, 0]))):
            words, lengths = caption(), []
            chunks -= 1
            for _ in range(draw(st.sampled_from([3, 4, 2, 1, 0]))):
                length = draw(st.integers(1, longest))
                if length > video or chunks < 5:
                    break
                lengths.append(length)
                video, chunks = video - length, chunks - 1
            shots.append((words, lengths))
        return cut(first, *shots)

    return [one() for _ in range(BATCH)]


HUGE = 64
KINDS_OF_DATA = ("normal", "integers", "equal chunks", "zero queries", "huge queries")


def qkv(
    seed: int,
    scenes: list[list[Chunk]],
    kind: str = "normal",
    shape=(TOKENS, HEADS, HEAD_DIM),
    *,
    backend: str = "reference",
    dtype=None,
):
    """q, k, v [B, N, H, D] in `dtype`; by default what `backend` knows best: bfloat16 for the kernels, else float32.

    `equal chunks`: all keys of a scene are equal, so all scores are.
    """
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, len(scenes), *shape)).astype(np.float32)
    if kind == "integers":
        q, k = np.round(q), np.round(k)
    elif kind == "equal chunks":
        k[:] = k[:, :1]
    elif kind == "zero queries":
        q[:] = 0
    elif kind == "huge queries":
        q, k = HUGE * np.round(q), np.round(k)  # exact logits in the hundreds, where exp overflows
    dtype = dtype or (jnp.bfloat16 if backend == "pallas_gpu" else jnp.float32)
    return tuple(x.astype(dtype) for x in (q, k, v))
