"""Stories -> arrays: rendered, encoded, and small enough that all of them lie on the device.

A scene of 12 shots of 3 latent frames of 8 x 8 x 16 takes 74 kB in float16, so that 10 000 of them take 0.7 GB; a
gather then replaces the data pipeline, and an update waits for nobody.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from evidence.cache import Arrays, kept
from evidence.spread import ALONE, Spread
from evidence.stories import Stories, Story
from moc_jax.codecs import Codec, fit_codec, load_codec, pixels_to_unit
from moc_jax.codecs.pca import PCACodec
from moc_jax.config import CodecConfig, HashConfig, PcaConfig
from moc_jax.scene import Scene, SceneLengths
from moc_jax.shapes import Array, Bool, Float, Int, UInt8
from moc_jax.text import build_text_encoder

_PER_STORY = "latents", "characters", "reveals", "words", "lengths"  # fields of a `Dataset` with a row for each story
_WORDS = 128  # rows of a table of words are a multiple of it


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
    world: Stories = dataclasses.field(metadata={"static": True})
    seeds: range = dataclasses.field(metadata={"static": True})  # of the n stories

    def first(self, stories: int) -> "Dataset":
        """The first of them."""
        return self.part(slice(stories))

    def part(self, rows: slice) -> "Dataset":
        """Some of them that follow each other."""
        arrays = {name: getattr(self, name)[rows] for name in _PER_STORY}
        return dataclasses.replace(self, **arrays, seeds=self.seeds[rows])

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


def shapes(world: Stories, cfg: PcaConfig, text: HashConfig, seeds: range) -> Dataset:
    """A ShapeDtypeStruct in place of each array of what `make` makes, for a world of less than `_WORDS` words."""
    time, *space = cfg.stride
    stories, frames = len(seeds), world.shots * (1 + (world.frames - 1) // time)
    places = stories, frames, *(world.size // side for side in space)

    def empty() -> Dataset:
        return Dataset(
            latents=jnp.zeros((*places, cfg.channels), jnp.float16),
            characters=jnp.zeros(places, bool),
            reveals=jnp.zeros((stories, world.shots), jnp.int32),
            words=jnp.zeros((stories, world.text_tokens), jnp.int32),
            lengths=jnp.zeros((stories, 1 + world.shots), jnp.int32),
            embeddings=jnp.zeros((_WORDS, text.dim)),
            world=world,
            seeds=seeds,
        )

    return jax.eval_shape(empty)


def fit(
    world: Stories,
    cfg: CodecConfig,
    stories: int = 64,
    spread: Spread = ALONE,
    folder: pathlib.Path | None = None,
) -> Codec:
    """The codec of a world, fitted on the first stories of its split; test on another split."""
    state = kept(
        folder,
        "codec",
        (world.identity, cfg, stories),
        lambda _: spread.once(functools.partial(_fitted, world, cfg, stories)),
    )
    return load_codec(cfg, state)


def _fitted(world: Stories, cfg: CodecConfig, stories: int) -> Arrays:
    shots = (story.render_shot(shot) for story in map(world.story, range(stories)) for shot in range(world.shots))
    return fit_codec(cfg, map(pixels_to_unit, shots)).state()


def make(
    world: Stories,
    codec: Codec,
    text: HashConfig,
    seeds: range,
    spread: Spread = ALONE,
    folder: pathlib.Path | None = None,
) -> Dataset:
    """The stories of these seeds."""

    def arrays(place: pathlib.Path) -> Arrays:
        file = place / "latents.npy"
        open_rows(world, codec, file, seeds)
        encoded = spread(functools.partial(encode, world, codec, file, seeds), seeds)
        characters, reveals = (np.stack([of[i] for of in encoded]) for i in range(2))
        words, lengths, embeddings = _text([captions for *_, captions in encoded], text, world.text_tokens)
        return {
            "characters": characters,
            "reveals": reveals.astype(np.int32),
            "words": words.astype(np.int32),
            "lengths": lengths.astype(np.int32),
            "embeddings": embeddings,
        }

    found = kept(folder, "stories", (world.identity, codec.fingerprint, text, seeds), arrays)
    return Dataset(**jax.tree.map(jnp.asarray, found), world=world, seeds=seeds)


def _text(captions: Sequence[Sequence[str]], cfg: HashConfig, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each story's captions as rows of a table, their lengths, and the table: padding's zeros, then every word once."""
    encoder = build_text_encoder(cfg)
    rows: dict[bytes, int] = {bytes(4 * cfg.dim): 0}

    @functools.cache  # stories have most captions in common
    def rows_of(caption: str) -> list[int]:
        return [rows.setdefault(word.tobytes(), len(rows)) for word in encoder(caption)]

    tokens, lengths = [], []
    for story in captions:
        of_captions = [rows_of(caption) for caption in story]
        words = [row for of_caption in of_captions for row in of_caption]
        if len(words) > limit:
            raise ValueError(f"the story {story[0]!r} has {len(words)} words; the limit is {limit}")
        tokens.append(words + [0] * (limit - len(words)))
        lengths.append([len(of_caption) for of_caption in of_captions])
    table = np.zeros((-(-len(rows) // _WORDS) * _WORDS, cfg.dim), np.float32)
    table[: len(rows)] = np.frombuffer(b"".join(rows), np.float32).reshape(len(rows), cfg.dim)
    return np.array(tokens), np.array(lengths), table


def open_rows(world: Stories, codec: Codec, file: pathlib.Path, seeds: range) -> None:
    """Makes the file that `encode` writes to."""
    first = _latents(world.story(seeds[0]), codec)
    np.lib.format.open_memmap(file, "w+", first.dtype, (len(seeds), *first.shape))


def encode(
    world: Stories, codec: Codec, file: pathlib.Path, seeds: range, seed: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Writes a story's latents into their row of a file, and returns which of them lie in a character's box, each
    shot's reveal, and the captions."""
    story = world.story(seed)
    np.lib.format.open_memmap(file, "r+")[seeds.index(seed)] = _latents(story, codec)
    inside = np.concatenate([_cells(s.box & (s.character is not None), codec.stride) for s in story.shots])
    reveals = np.array([dict(story.recalls).get(shot, -1) for shot in range(world.shots)])
    return inside, reveals, [story.caption, *(shot.caption for shot in story.shots)]


def _latents(story: Story, codec: Codec) -> np.ndarray:
    """Of all shots, in float16."""
    shots = (story.render_shot(shot) for shot in range(len(story.shots)))
    return np.concatenate([_encoded(codec, frames) for frames in shots]).astype(np.float16)


def _encoded(codec: Codec, frames: UInt8[np.ndarray, "F Y X 3"]) -> Float[np.ndarray, "f y x Z"]:
    """A clip's latents; of a still, those of its first frames, as a codec that sees each latent frame alone has it."""
    alike = 1 + codec.stride[0] if isinstance(codec, PCACodec) and (frames[1:] == frames[0]).all() else len(frames)
    latents = codec.encode(pixels_to_unit(frames[:alike]))
    return latents[np.minimum(np.arange(codec.latent_frames(len(frames))), len(latents) - 1)]


def _cells(inside: Bool[np.ndarray, "F Y X"], stride: tuple[int, int, int]) -> Bool[np.ndarray, "f y x"]:
    """The latents that have one of these pixels; the first frame stands alone."""
    time, height, width = stride
    frames = np.repeat(inside[:1], time - 1, axis=0)
    found = np.concatenate([frames, inside]).reshape(-1, time, *inside.shape[1:]).any(axis=1)
    found = found.reshape(len(found), -1, height, inside.shape[2]).any(axis=2)
    return found.reshape(*found.shape[:2], -1, width).any(axis=3)  # axis by axis, the long ones first: much faster
