"""The test: held-out stories with their recalls, and what each sampled recall showed."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from evidence.cache import Arrays, kept
from evidence.dataset import PER_STORY, Dataset, make, spread
from evidence.measures import drawn, dynamic_degree, nearest, psnr
from evidence.world import World, boxes
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
        arrays = {name: getattr(self.data, name)[:stories] for name in PER_STORY}
        data = dataclasses.replace(self.data, **arrays, seeds=self.data.seeds[:stories])
        return Exam(data=data, codec=self.codec, questions=[q for q in self.questions if q.row < stories])


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


def make_exam(
    world: World, codec: Codec, text: HashConfig, seeds: range, processes: int, folder: pathlib.Path | None = None
) -> Exam:
    """The stories of these seeds with all that grading needs; the same processes and files as `make`."""

    def arrays() -> Arrays:
        looks = spread(functools.partial(_looks, world, codec), seeds, processes)
        flat = [of_recall for of_story in looks for of_recall in of_story]
        sizes = [of_recall.shape[1] for of_recall in flat]
        return {"looks": np.concatenate(flat, axis=1), "ends": np.cumsum(sizes)}

    found = kept(folder, "looks", (world, codec.fingerprint, seeds), arrays)
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
                    box=boxes(of_shot),
                    looks=next(looks),
                )
            )
    data = make(world, codec, text, seeds, processes, folder)
    return Exam(data=data, codec=codec, questions=questions)


def _looks(world: World, codec: Codec, seed: int) -> list[np.ndarray]:
    story = world.story(seed)
    looks = (*story.looks, *story.strangers)

    def reconstruct(frames: np.ndarray) -> np.ndarray:
        return pixels_from_unit(codec.decode(codec.encode(pixels_to_unit(frames))))

    return [drawn(story, shot, looks, reconstruct) for shot, _ in story.recalls]


def grade(exam: Exam, latents: Float[np.ndarray, "n F Y X Z"]) -> list[Recall]:
    """What each recall shows, of all stories' sampled latents."""
    return [_graded(exam, question, latents[question.row]) for question in exam.questions]


def frames_of(exam: Exam, latents: Float[np.ndarray, "F Y X Z"], shot: int) -> UInt8[np.ndarray, "F Y X 3"]:
    """A shot's frames, of a story's latents."""
    of_shot = np.split(latents, exam.data.world.shots)[shot]
    return pixels_from_unit(exam.codec.decode(of_shot.astype(np.float32)))


def _graded(exam: Exam, question: Question, latents: np.ndarray) -> Recall:
    frames = frames_of(exam, latents, question.shot)
    truth = frames_of(exam, np.asarray(exam.data.latents[question.row]), question.shot)
    found = nearest(frames[question.box], question.looks)
    return Recall(
        story=exam.data.seeds[question.row],
        gap=question.shot - question.reveal,
        correct=found == question.character,
        of_story=found < exam.data.world.characters,
        box_psnr=psnr(frames, truth, question.box),
        background_psnr=psnr(frames, truth, ~question.box),
        dynamic_degree=dynamic_degree(frames),
    )
