"""Stories -> arrays: rendered, encoded, and small enough that all of them lie on the device.

A scene of 12 shots of 3 latent frames of 8 x 8 x 16 takes 74 kB in float16, so that 10 000 of them take 0.7 GB; a
gather then replaces the data pipeline, and an update waits for nobody.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from evidence.world import Story, World, render
from moc_jax.codecs import Codec, fit_codec, pixels_to_unit
from moc_jax.config import CodecConfig, HashConfig
from moc_jax.scene import Scene, SceneLengths
from moc_jax.shapes import Array, Float, Int
from moc_jax.text import build_text_encoder

TEXT_TOKENS_PER_CAPTION = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dataset:
    """Encoded stories, all of equal shots."""

    latents: Float[Array, "n F Y X Z"]  # float16
    words: Int[Array, "n L"]  # of all captions, as rows of `embeddings`; row 0 is padding
    lengths: Int[Array, "n P"]
    embeddings: Float[Array, "words E"]
    world: World = dataclasses.field(metadata={"static": True})
    seeds: range = dataclasses.field(metadata={"static": True})  # of the n stories

    def scenes(self, rows: Int[Array, " B"]) -> Scene:
        """Some of them as a batch."""
        latents = self.latents[rows].astype(jnp.float32)
        shots = self.world.shots
        shot_frames = jnp.full((rows.shape[0], shots), latents.shape[1] // shots, jnp.int32)
        return Scene(latents, self.embeddings[self.words[rows]], SceneLengths(shot_frames, self.lengths[rows]))


def fit(world: World, cfg: CodecConfig, stories: int = 64) -> Codec:
    """The codec of a world, fitted on the first stories of its split; test on another split."""
    clips = (clip for seed in range(stories) for clip in _clips(world.story(seed)))
    return fit_codec(cfg, clips)


def make(world: World, codec: Codec, text: HashConfig, seeds: range, processes: int) -> Dataset:
    """The stories of these seeds; so many processes share the work, or with 1 this one does it."""
    encode = functools.partial(_encode, world, codec)
    size = max(1, min(64, len(seeds) // processes))
    parts = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    if processes == 1:
        encoded = list(map(encode, parts))
    else:
        with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            encoded = list(pool.map(encode, parts))
    captions = [of_story for _, of_part in encoded for of_story in of_part]
    latents = np.concatenate([of_part for of_part, _ in encoded])
    return Dataset(*map(jnp.asarray, (latents, *_text(captions, text))), world=world, seeds=seeds)


def _text(captions: Sequence[Sequence[str]], cfg: HashConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each story's captions as rows of a table, their lengths, and the table: padding's zeros, then every word once."""
    encoder = functools.lru_cache(maxsize=None)(build_text_encoder(cfg))
    rows: dict[bytes, int] = {bytes(4 * cfg.dim): 0}
    tokens, lengths = [], []
    for story in captions:
        embedded = [encoder(caption) for caption in story]
        words = [rows.setdefault(word.tobytes(), len(rows)) for word in np.concatenate(embedded)]
        limit = TEXT_TOKENS_PER_CAPTION * len(story)
        if len(words) > limit:
            raise ValueError(f"the story {story[0]!r} has {len(words)} words; the limit is {limit}")
        tokens.append(words + [0] * (limit - len(words)))
        lengths.append([len(caption) for caption in embedded])
    return np.array(tokens), np.array(lengths), np.stack([np.frombuffer(word, np.float32) for word in rows])


def _encode(world: World, codec: Codec, seeds: Sequence[int]) -> tuple[np.ndarray, list[list[str]]]:
    """Latents and captions of some stories."""
    stories = [world.story(seed) for seed in seeds]
    latents = [np.concatenate([codec.encode(clip) for clip in _clips(story)]) for story in stories]
    captions = [[story.caption, *(shot.caption for shot in story.shots)] for story in stories]
    return np.stack(latents).astype(np.float16), captions


def _clips(story: Story) -> list[np.ndarray]:
    return np.split(pixels_to_unit(render(story)), len(story.shots))
