"""Films: stories of many shots, sampled one after another. What is each shot to be shown of those before it?

    python -m evidence.run --setting in-turn --arms "moc 8x6, past"    # a model that learned to follow finished shots
    python -m evidence.films                                           # its films, with each memory
    python -m evidence.films --memories retrieved --levels 0 0.05 0.1 0.2 0.3     # with more noise on finished shots

A film is a story of the still world, but longer. Its reveals are given; every later shot is sampled in a scene with
earlier ones, which are shown at the noise level t_c:

    window      the last ones, as many as in the stories that the model was trained on
    retrieved   as many, chosen by outer retrieval, as `moc-sample --extend --retrieve-shots` does
    all         all of them, more than the model ever saw; its tokens pick among their chunks as always

Asked are the film's recalls, by how far back their reveal lies, and how near each shot's background comes to one of the
story's places: where films decay, that falls from the first shots to the last.
"""

import dataclasses
import math
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import results
from evidence import dataset
from evidence.arms import arm_of
from evidence.cache import load_weights
from evidence.dataset import Dataset
from evidence.exam import Exam, frames_of, grade, make_exam, reconstructed, threads
from evidence.experiment import Programs
from evidence.findings import save_rows, share
from evidence.measures import psnr
from evidence.results import RESULTS, best_rates, finished, kept_in, name_of
from evidence.runs import task_of
from evidence.settings import CHOICES, FINAL, SETTINGS
from evidence.spread import Spread
from evidence.world import DrawnStory, World
from moc_jax.cli import clean_exit
from moc_jax.config import ConfigError
from moc_jax.sampling.retrieval import chosen, mean_score
from moc_jax.scene import Scene, SceneLengths
from moc_jax.shapes import Float, Int
from moc_jax.sharding import Params

Memory = Literal["window", "retrieved", "all"]
SPANS = (1, 11), (12, 23), (24, 35), (36, 47), (48, math.inf)
"""Of gaps, and of shots after the reveals, both ends included, that figures are of."""
HISTORY_NOISE = 0.02
"""The level t_c of the films that pictures show."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Whose films, and which."""

    setting: str = "in-turn"
    arm: str = "moc 8x6, past"
    seed: int = 0
    """Of the training; its learning rate is the one that was best."""
    memories: tuple[Memory, ...] = ("window", "retrieved", "all")
    levels: tuple[float, ...] = (HISTORY_NOISE,)
    """Noise levels at which finished shots are shown."""
    shots: int = 64
    films: int = 128
    final: bool = False
    """Films that no choice was made on."""
    together: int = 64
    """Films that are sampled at a time."""
    out: pathlib.Path = RESULTS
    cache: pathlib.Path = pathlib.Path("cache/evidence")
    processes: int = 1


class Maker:
    """Makes films of one model."""

    def __init__(self, programs: Programs, weights: Params, shown: int):
        """`shown`: earlier shots in a scene, at most, unless all are."""
        self._programs, self._weights, self._shown = programs, weights, shown
        self._sampled, self._features = jax.jit(programs.sampled), jax.jit(programs.features)

    def __call__(
        self, data: Dataset, memory: Memory, key: jax.Array
    ) -> tuple[Float[np.ndarray, "n F Y X Z"], list[list[list[int]]]]:
        """The films' latents, and which shots each shot of each film was shown."""
        story, captions = data.world.shots, _captions(data)
        truth = np.asarray(data.latents, np.float32)
        film = truth.reshape(len(truth), story, -1, *truth.shape[2:])  # [n, S, f, Y, X, Z]
        reveals = data.world.characters
        film[:, reveals:] = 0
        scenes = _Scenes(film, captions, np.asarray(data.embeddings))
        keys = [self._means(scenes, shot, False, key) for shot in range(reveals)] if memory == "retrieved" else []
        shown = [[list[int]() for _ in range(reveals)] for _ in film]
        size = story if memory == "all" else self._shown + 1
        for shot in range(reveals, story):
            step = jax.random.fold_in(key, shot)
            if memory == "retrieved" and shot > self._shown:
                read = _best(self._means(scenes, shot, True, step), np.stack(keys, axis=1), self._shown)
            else:
                first = 0 if memory == "all" else max(0, shot - self._shown)
                read = np.tile(np.arange(first, shot), (len(film), 1))
            scene = scenes.of(read, shot, size)
            known = np.zeros((len(film), size), bool)
            known[:, : read.shape[1]] = True
            with jax.set_mesh(self._programs.mesh):
                sampled = self._sampled(self._weights, scene, known, step)
            film[:, shot] = np.asarray(sampled).reshape(len(film), size, *film.shape[2:])[:, read.shape[1]]
            if memory == "retrieved":
                keys.append(self._means(scenes, shot, False, step))
            for of_film, of_shot in zip(shown, read.tolist()):
                of_film.append(of_shot)
        return film.reshape(truth.shape), shown

    def _means(self, scenes: "_Scenes", shot: int, query: bool, key: jax.Array) -> Float[np.ndarray, "n depth H D"]:
        """A shot's mean query, as it is before it is sampled, or its mean key."""
        none = np.zeros((len(scenes.film), 0), int)
        level = jnp.float32(1.0 if query else self._programs.task.sample.history_noise)
        with jax.set_mesh(self._programs.mesh):
            found = self._features(self._weights, scenes.of(none, shot, 1), level, jax.random.fold_in(key, query))
        return np.asarray(found)[0 if query else 1]


@dataclasses.dataclass(frozen=True)
class _Scenes:
    """Cuts scenes out of films."""

    film: Float[np.ndarray, "n S F Y X Z"]
    captions: Sequence[Sequence[Int[np.ndarray, " _"]]]
    embeddings: Float[np.ndarray, "words E"]

    def of(self, read: Int[np.ndarray, "n k"], shot: int, size: int) -> Scene:
        """The shots `read` of each film, and behind them `shot`, with room for `size` shots."""
        films, frames = self.film.shape[0], self.film.shape[2]
        wanted = np.concatenate([read, np.full((films, 1), shot)], axis=1)
        count = wanted.shape[1]
        video = np.zeros((films, size, *self.film.shape[2:]), np.float32)
        video[:, :count] = self.film[np.arange(films)[:, None], wanted]
        longest = max(len(caption) for of_film in self.captions for caption in of_film)
        words, lengths = np.zeros((films, longest * (1 + size)), int), np.zeros((films, 1 + size), np.int32)
        for i, (of_film, shots) in enumerate(zip(self.captions, wanted)):
            prompts = [of_film[0], *(of_film[1 + s] for s in shots)]
            lengths[i, : len(prompts)] = [len(prompt) for prompt in prompts]
            words[i, : lengths[i].sum()] = np.concatenate(prompts)
        shot_frames = np.where(np.arange(size) < count, frames, 0).astype(np.int32)
        return Scene(
            jnp.asarray(video.reshape(films, -1, *video.shape[3:])),
            jnp.asarray(self.embeddings[words]),
            SceneLengths(jnp.asarray(np.tile(shot_frames, (films, 1))), jnp.asarray(lengths)),
        )


def _captions(data: Dataset) -> list[list[np.ndarray]]:
    """Of each film, the global one first, as rows of the table of words."""
    return [
        np.split(words[: lengths.sum()], np.cumsum(lengths)[:-1])
        for words, lengths in zip(np.asarray(data.words), np.asarray(data.lengths))
    ]


def _best(
    queries: Float[np.ndarray, "n depth H D"], keys: Float[np.ndarray, "n S depth H D"], most: int
) -> Int[np.ndarray, "n k"]:
    """The shots that the library's outer retrieval takes."""
    return np.array(
        [
            chosen({shot: mean_score([query], of_shot) for shot, of_shot in enumerate(of_film)}, most)
            for query, of_film in zip(queries, keys)
        ]
    )


def findings(
    exam: Exam, latents: Float[np.ndarray, "n F Y X Z"], shown: Sequence[Sequence[Sequence[int]]]
) -> dict[str, Any]:
    """Recalls by gap, with how often the reveal was shown, and backgrounds by shot."""
    recalls = grade(exam, latents)
    was_shown = [question.reveal in shown[question.row][question.shot] for question in exam.questions]
    by_gap = {
        _span(span): share([recalls[i] for i in some])
        | {"shown": float(np.mean([was_shown[i] for i in some]))}
        | {"box_psnr": float(np.mean([recalls[i].box_psnr for i in some]))}
        for span in SPANS
        if (some := _inside(span, (recall.gap for recall in recalls)))
    }
    near = backgrounds(exam, latents)
    by_shot = {
        _span(span): float(near[:, some].mean())
        for span in SPANS
        if (some := _inside(span, range(1, near.shape[1] + 1)))
    }
    return {"all": share(recalls), "by_gap": by_gap, "background_by_shot": by_shot}


def _inside(span: tuple[float, float], numbers: Iterable[int]) -> list[int]:
    """Where they lie within it."""
    return [i for i, number in enumerate(numbers) if span[0] <= number <= span[1]]


def _span(span: tuple[float, float]) -> str:
    return f"{span[0]} and more" if span[1] == math.inf else f"{span[0]}-{span[1]}"


def backgrounds(exam: Exam, latents: Float[np.ndarray, "n F Y X Z"]) -> Float[np.ndarray, "n S-reveals"]:
    """Decibels of each sampled shot outside of the middle, against the nearest of the story's places.

    In a still world places look the same whenever they are shown.
    """
    world = exam.data.world
    assert isinstance(world, World)

    def of_film(row: int, seed: int) -> list[float]:
        story = world.story(seed)
        outside = ~story.shots[0].box
        places = [reconstructed(exam.codec, _empty(story, place)) for place in range(len(story.places))]
        shots = (frames_of(exam, latents[row], shot) for shot in range(world.characters, world.shots))
        return [max(psnr(frames, place, outside) for place in places) for frames in shots]

    with threads() as pool:
        return np.array(list(pool.map(of_film, range(len(latents)), exam.data.seeds)))


def _empty(story: DrawnStory, place: int) -> np.ndarray:
    """A place without anybody."""
    shot = dataclasses.replace(story.shots[0], place=place, character=None)
    return dataclasses.replace(story, shots=(shot,)).render_shot(0)


def main(args: Arguments, command: str) -> None:
    """Makes films, stores what they show, and prints it."""
    setting = SETTINGS[args.setting]
    if not (isinstance(setting.world, World) and setting.world.still):
        raise ConfigError(
            f"--setting {args.setting}: films are of still worlds, in which places look alike in all shots"
        )
    best = best_rates(finished(args.out / args.setting))
    if args.arm not in best:
        raise ConfigError(
            f"{args.out / args.setting} has no finished run of {args.arm!r}: "
            f"python -m evidence.run --setting {args.setting} --arms {args.arm!r}"
        )
    kept = kept_in(args.cache, args.out) / "weights" / args.setting
    weights = kept / f"{name_of(args.arm, best[args.arm], args.seed)}.npz"
    if not weights.exists():
        raise ConfigError(f"--seed {args.seed}: {weights} does not exist; train {args.arm!r} with that seed")
    world = dataclasses.replace(setting.world, shots=args.shots, split=FINAL if args.final else CHOICES)
    with Spread(args.processes) as spread:
        codec = dataset.fit(
            setting.codec_world or setting.world, setting.codec, setting.codec_stories, spread, args.cache
        )
        exam = make_exam(world, codec, setting.text, range(args.films), spread, args.cache)
    about = {"arm": args.arm, "seed": args.seed, "final": args.final, "setting": args.setting}
    about |= {"shots": args.shots, "films": args.films}
    for level in args.levels:
        task = dataclasses.replace(
            task_of(setting), sample=dataclasses.replace(setting.sample, history_noise=level), batch=args.together
        )
        programs = Programs(task, arm_of(args.arm), setting.world)
        make = Maker(programs, load_weights(weights, programs.abstract_weights), setting.world.shots - 1)
        for memory in args.memories:
            begin = time.perf_counter()
            latents, shown = _in_parts(make, exam.data, memory, args.together)
            entry = about | {"memory": memory, "level": level} | findings(exam, latents, shown)
            entry["seconds_per_film"] = (time.perf_counter() - begin) / args.films
            name = name_of_films(entry)
            results.store(args.out, "films", name, command, entry)
            _save(args.out / "films" / f"{picture_of(name)}.jpg", exam, latents)
            print(f"{name}: {shown_as_text(entry)}", flush=True)
    _save(args.out / "films" / f"{picture_of(truth_of(about))}.jpg", exam, np.asarray(exam.data.latents))


def name_of_films(entry: dict[str, Any]) -> str:
    """All that tells these films from others."""
    shown = f"{entry['memory']}, t_c = {entry['level']:g}, {entry['films']} films"
    return f"{shown}, {_world_of(entry)}, {entry['arm']}, seed {entry['seed']}"


def truth_of(entry: dict[str, Any]) -> str:
    """What the first of these films should be."""
    return f"truth, {_world_of(entry)}"


def _world_of(entry: dict[str, Any]) -> str:
    return f"{entry['shots']} shots of {entry['setting']}{', final stories' if entry['final'] else ''}"


def picture_of(name: str) -> str:
    """The file of an entry's first film."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def _in_parts(make: Maker, data: Dataset, memory: Memory, together: int) -> tuple[np.ndarray, list[list[list[int]]]]:
    latents, shown = [], list[list[list[int]]]()
    for first in range(0, len(data.seeds), together):
        some, read = make(
            data.part(slice(first, first + together)), memory, jax.random.fold_in(jax.random.key(0), first)
        )
        latents.append(some)
        shown += read
    return np.concatenate(latents), shown


def shown_as_text(entry: dict[str, Any]) -> str:
    """An entry in a line."""
    recalls = ", ".join(
        f"{100 * of['share']:.0f} % at gaps {gap} (reveal shown in {100 * of['shown']:.0f} %)"
        for gap, of in entry["by_gap"].items()
    )
    quality = ", ".join(f"{db:.1f} in {span}" for span, db in entry["background_by_shot"].items())
    return f"{recalls}; background {quality} dB; {entry['seconds_per_film']:.2f} s a film"


def _save(path: pathlib.Path, exam: Exam, latents: np.ndarray) -> None:
    """The middle frames of the first film's shots, in rows."""
    frames = [frames_of(exam, latents[0], shot) for shot in range(exam.data.world.shots)]
    middles = [of[len(of) // 2] for of in frames]
    save_rows(path, [middles[i : i + 16] for i in range(0, len(middles), 16)])


def run(argv: Sequence[str]) -> None:
    """The command line."""
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    main(args, shlex.join(["python", "-m", "evidence.films", *argv]))


if __name__ == "__main__":
    with clean_exit():
        run(sys.argv[1:])
