"""Stories -> arrays: rendered, encoded, and small enough that all of them lie on the device.

A scene of 12 shots of 3 latent frames of 8 x 8 x 16 takes 74 kB in float16, so that 10 000 of them take 0.7 GB; a
gather then replaces the data pipeline, and an update waits for nobody.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from evidence.cache import Arrays, kept
from evidence.world import Story, World, boxes, render
from moc_jax.codecs import Codec, fit_codec, load_codec, pixels_to_unit
from moc_jax.config import CodecConfig, HashConfig
from moc_jax.scene import Scene, SceneLengths
from moc_jax.shapes import Array, Bool, Float, Int
from moc_jax.text import build_text_encoder

PER_STORY = "latents", "characters", "reveals", "words", "lengths"
"""Fields of a `Dataset` with a row for each story."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MarkedScene(Scene):
    """Scenes of which it is known where the characters are, and which shot showed each before."""

    characters: Bool[Array, "B F Y X"]
    reveals: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dataset:
    """Encoded stories, all of equal shots."""

    latents: Float[Array, "n F Y X Z"]  # float16
    characters: Bool[Array, "n F Y X"]  # latents in the box of a character
    reveals: Int[Array, "n S"]  # the earlier shot that showed the shot's character; -1 where there is none
    words: Int[Array, "n L"]  # of all captions, as rows of `embeddings`; row 0 is padding
    lengths: Int[Array, "n P"]
    embeddings: Float[Array, "words E"]
    world: World = dataclasses.field(metadata={"static": True})
    seeds: range = dataclasses.field(metadata={"static": True})  # of the n stories

    def scenes(self, rows: Int[Array, " B"]) -> MarkedScene:
        """Some of them as a batch."""
        latents = self.latents[rows].astype(jnp.float32)
        shots = self.world.shots
        shot_frames = jnp.full((rows.shape[0], shots), latents.shape[1] // shots, jnp.int32)
        return MarkedScene(
            latents,
            self.embeddings[self.words[rows]],
            SceneLengths(shot_frames, self.lengths[rows]),
            self.characters[rows],
            self.reveals[rows],
        )


def fit(world: World, cfg: CodecConfig, stories: int = 64, folder: pathlib.Path | None = None) -> Codec:
    """The codec of a world, fitted on the first stories of its split; test on another split."""
    clips = (clip for seed in range(stories) for clip in _clips(world.story(seed)))
    return load_codec(cfg, kept(folder, "codec", (world, cfg, stories), lambda: fit_codec(cfg, clips).state()))


def make(
    world: World, codec: Codec, text: HashConfig, seeds: range, processes: int, folder: pathlib.Path | None = None
) -> Dataset:
    """The stories of these seeds; so many processes share the work, or with 1 this one does it."""

    def arrays() -> Arrays:
        encoded = spread(functools.partial(_encode, world, codec), seeds, processes)
        latents, characters, reveals = (np.stack([of[i] for of in encoded]) for i in range(3))
        words, lengths, embeddings = _text([captions for *_, captions in encoded], text, world.text_tokens)
        return {
            "latents": latents,
            "characters": characters,
            "reveals": reveals,
            "words": words,
            "lengths": lengths,
            "embeddings": embeddings,
        }

    found = kept(folder, "stories", (world, codec.fingerprint, text, seeds), arrays)
    return Dataset(**jax.tree.map(jnp.asarray, found), world=world, seeds=seeds)


def spread[T](work: Callable[[int], T], seeds: range, processes: int) -> list[T]:
    """`work` of each seed, by so many processes of one thread each."""
    if processes == 1:
        return list(map(work, seeds))
    with (
        _environment(**_ALONE),
        concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        return list(pool.map(work, seeds, chunksize=max(1, min(32, len(seeds) // processes))))


# A matrix product of one clip is too small to be shared: each process's threads would wait for all others'.
_ALONE = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")} | {"JAX_PLATFORMS": "cpu"}


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """What processes that start meanwhile find in their environment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _text(captions: Sequence[Sequence[str]], cfg: HashConfig, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each story's captions as rows of a table, their lengths, and the table: padding's zeros, then every word once."""
    encoder = functools.lru_cache(maxsize=None)(build_text_encoder(cfg))
    rows: dict[bytes, int] = {bytes(4 * cfg.dim): 0}
    tokens, lengths = [], []
    for story in captions:
        embedded = [encoder(caption) for caption in story]
        words = [rows.setdefault(word.tobytes(), len(rows)) for word in np.concatenate(embedded)]
        if len(words) > limit:
            raise ValueError(f"the story {story[0]!r} has {len(words)} words; the limit is {limit}")
        tokens.append(words + [0] * (limit - len(words)))
        lengths.append([len(caption) for caption in embedded])
    return np.array(tokens), np.array(lengths), np.stack([np.frombuffer(word, np.float32) for word in rows])


def _encode(world: World, codec: Codec, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """A story's latents, which of them lie in a character's box, each shot's reveal, and its captions."""
    story = world.story(seed)
    latents = np.concatenate([codec.encode(clip) for clip in _clips(story)]).astype(np.float16)
    inside = np.concatenate([_cells(boxes(s) & (s.character is not None), codec.stride) for s in story.shots])
    reveals = np.array([dict(story.recalls).get(shot, -1) for shot in range(world.shots)])
    return latents, inside, reveals, [story.caption, *(shot.caption for shot in story.shots)]


def _cells(inside: Bool[np.ndarray, "F Y X"], stride: tuple[int, int, int]) -> Bool[np.ndarray, "f y x"]:
    """The latents that have one of these pixels; the first frame stands alone."""
    time, *space = stride
    frames = np.repeat(inside[:1], time - 1, axis=0)
    blocks = np.concatenate([frames, inside]).reshape(
        -1, time, inside.shape[1] // space[0], space[0], inside.shape[2] // space[1], space[1]
    )
    return blocks.any(axis=(1, 3, 5))


def _clips(story: Story) -> Iterator[np.ndarray]:
    return iter(np.split(pixels_to_unit(render(story)), len(story.shots)))
