"""The test: held-out stories with their recalls, and what each sampled recall showed."""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from evidence.cache import Arrays, kept
from evidence.dataset import Dataset, make
from evidence.measures import consistency, drawn, dynamic_degree, nearest, psnr
from evidence.spread import ALONE, Spread
from evidence.stories import Stories
from moc_jax.codecs import Codec, pixels_from_unit, pixels_to_unit
from moc_jax.config import HashConfig
from moc_jax.shapes import Bool, Float, UInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One recall of one story."""

    row: int  # in the exam's data
    shot: int
    reveal: int  # the shot that showed the character
    character: int
    box: Bool[np.ndarray, "F Y X"]
    looks: UInt8[np.ndarray, "n P 3"]  # the box's pixels with each candidate's look; the truth is `character`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exam:
    """All recalls of some stories."""

    data: Dataset
    codec: Codec
    questions: Sequence[Question]

    def first(self, stories: int) -> "Exam":
        """The first stories' part of it."""
        questions = [question for question in self.questions if question.row < stories]
        return Exam(data=self.data.first(stories), codec=self.codec, questions=questions)

    @functools.cached_property
    def truth(self) -> list[UInt8[np.ndarray, "F Y X 3"]]:
        """Each question's shot after the codec's reconstruction."""
        latents = np.asarray(self.data.latents)
        with threads() as pool:
            return list(pool.map(lambda q: frames_of(self, latents[q.row], q.shot), self.questions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """What one sampled recall showed."""

    story: int
    gap: int  # shots since the reveal
    correct: bool  # the nearest of 16 candidates is the character
    of_story: bool  # it is one of the story's
    box_psnr: float  # against the codec's reconstruction of the truth
    background_psnr: float
    dynamic_degree: float
    consistency: float


def make_exam(
    world: Stories,
    codec: Codec,
    text: HashConfig,
    seeds: range,
    spread: Spread = ALONE,
    folder: pathlib.Path | None = None,
) -> Exam:
    """The stories of these seeds with all that grading needs; the same processes and files as `make`."""

    def arrays(_: pathlib.Path) -> Arrays:
        looks = spread(functools.partial(candidates, world, codec), seeds)
        flat = [of_recall for of_story in looks for of_recall in of_story]
        sizes = [of_recall.shape[1] for of_recall in flat]
        return {"looks": np.concatenate(flat, axis=1), "ends": np.cumsum(sizes)}

    found = kept(folder, "looks", (world.identity, codec.fingerprint, seeds), arrays)
    looks = iter(np.split(found["looks"], found["ends"][:-1], axis=1))
    questions = []
    for row, seed in enumerate(seeds):
        story = world.story(seed)
        for shot, reveal in story.recalls:
            of_shot = story.shots[shot]
            assert of_shot.character is not None
            questions.append(
                Question(
                    row=row,
                    shot=shot,
                    reveal=reveal,
                    character=of_shot.character,
                    box=of_shot.box,
                    looks=next(looks),
                )
            )
    data = make(world, codec, text, seeds, spread, folder)
    return Exam(data=data, codec=codec, questions=questions)


def candidates(world: Stories, codec: Codec, seed: int) -> list[UInt8[np.ndarray, "n P 3"]]:
    """For each recall of a story, the box's pixels with each candidate's look."""
    story = world.story(seed)
    looks = (*story.looks, *story.strangers)
    through = functools.partial(reconstructed, codec)
    return [drawn(story, shot, looks, through, max(codec.stride[1:])) for shot, _ in story.recalls]


def reconstructed(codec: Codec, frames: UInt8[np.ndarray, "F Y X 3"]) -> UInt8[np.ndarray, "F Y X 3"]:
    """Frames through the codec, which no sample surpasses."""
    return pixels_from_unit(codec.decode(codec.encode(pixels_to_unit(frames))))


def grade(exam: Exam, latents: Float[np.ndarray, "n F Y X Z"]) -> list[Recall]:
    """What each recall shows, of all stories' sampled latents."""

    def one(question: Question, truth: np.ndarray) -> Recall:
        return _graded(exam, question, frames_of(exam, latents[question.row], question.shot), truth)

    truth = exam.truth
    with threads() as pool:
        return list(pool.map(one, exam.questions, truth))


def threads() -> concurrent.futures.ThreadPoolExecutor:
    """For what decodes and compares."""
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def frames_of(exam: Exam, latents: Float[np.ndarray, "F Y X Z"], shot: int) -> UInt8[np.ndarray, "F Y X 3"]:
    """A shot's frames, of a story's latents."""
    of_shot = np.split(latents, exam.data.world.shots)[shot]
    return pixels_from_unit(exam.codec.decode(of_shot.astype(np.float32)))


def _graded(exam: Exam, question: Question, frames: np.ndarray, truth: np.ndarray) -> Recall:
    found = nearest(frames[question.box], question.looks)
    return Recall(
        story=exam.data.seeds[question.row],
        gap=question.shot - question.reveal,
        correct=found == question.character,
        of_story=found < exam.data.world.characters,
        box_psnr=psnr(frames, truth, question.box),
        background_psnr=psnr(frames, truth, ~question.box),
        dynamic_degree=dynamic_degree(frames),
        consistency=consistency(frames),
    )
