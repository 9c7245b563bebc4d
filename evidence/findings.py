"""What a test found, as results have it."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from evidence.exam import Exam, Recall, frames_of
from evidence.experiment import Programs, interval
from evidence.measures import dynamic_degree
from evidence.watch import GRADIENT, READ
from moc_jax.files import whole_file
from moc_jax.sharding import Params


def share(recalls: Sequence[Recall]) -> dict[str, Any]:
    """How many were correct, with Wilson's interval."""
    correct = sum(recall.correct for recall in recalls)
    low, high = interval(correct, len(recalls))
    of_story = sum(recall.of_story for recall in recalls)
    return {
        "correct": correct,
        "trials": len(recalls),
        "share": correct / len(recalls),
        "low": low,
        "high": high,
        "of_story": of_story / len(recalls),
    }


def summary(recalls: Sequence[Recall]) -> dict[str, Any]:
    """All recalls, and those of each gap."""

    def of(some: Sequence[Recall]) -> dict[str, Any]:
        means = {
            name: float(np.mean([getattr(recall, name) for recall in some]))
            for name in ("box_psnr", "background_psnr", "dynamic_degree", "consistency")
        }
        return share(some) | means

    gaps = sorted({recall.gap for recall in recalls})
    return {"all": of(recalls), "by_gap": {gap: of([r for r in recalls if r.gap == gap]) for gap in gaps}}


def truth_dynamic_degree(exam: Exam) -> float:
    """Of the same shots, after the codec's reconstruction."""
    return float(np.mean([dynamic_degree(frames) for frames in exam.truth]))


def probed(programs: Programs, weights: Params, exam: Exam, level: float) -> dict[str, Any]:
    """Errors of the velocity and shares of picks at one noise level, of the shots that recall something."""
    probe = programs.probe(weights, exam.data, level, jax.random.key(2))
    rows, shots, reveals = (
        np.array([getattr(question, name) for question in exam.questions]) for name in ("row", "shot", "reveal")
    )
    gaps, picked = shots - reveals, probe.into_reveal[rows, :, :, shots]  # [questions, depth, H]
    box = probe.box_error[rows, shots]
    found: dict[str, Any] = {
        "level": level,
        "error": float(probe.error[rows, shots].mean()),
        "box_error": float(box.mean()),
        "box_error_by_gap": {int(gap): float(box[gaps == gap].mean()) for gap in np.unique(gaps)},
    }
    read = probe.read[rows, :, :, shots]  # [questions, depth, H, 3]
    if not np.isnan(read).all():
        means = np.nanmean(read, axis=0).round(4)
        found["read"] = {name: means[..., i].tolist() for i, name in enumerate(READ)}
    gradient = probe.gradient[rows, shots]  # [questions, 2]
    known = ~np.isnan(gradient).all(axis=0)  # 0 / 0 for fresh weights, and what the own shot alone reads
    if known.any():
        found["gradient"] = {
            name: float(f"{np.nanmean(gradient[:, i]):.4g}") for i, name in enumerate(GRADIENT) if known[i]
        }
    if np.isnan(picked).all():
        return found
    return found | {
        "into_reveal": np.nanmean(picked, axis=0).round(4).tolist(),
        "into_reveal_by_gap": {int(gap): float(np.nanmean(picked[gaps == gap])) for gap in np.unique(gaps)},
        "into_reveal_by_chance": float(probe.by_chance[rows, shots].mean()),
    }


def best_head(read: dict[str, Any]) -> dict[str, float]:
    """Of what heads read (`watch.READ`), that of the one that reads most in the right shot, and which it is."""
    layer, head = np.unravel_index(np.argmax(read["reveal"]), np.shape(read["reveal"]))
    return {name: values[layer][head] for name, values in read.items()} | {"layer": int(layer), "head": int(head)}


def save_sheet(path: pathlib.Path, exam: Exam, latents: np.ndarray, rows: Sequence[int]) -> None:
    """A row per story: the middle frame of each recall, by gap."""
    lines = []
    for row in rows:
        asked = sorted((q for q in exam.questions if q.row == row), key=lambda q: q.shot - q.reveal)
        frames = [frames_of(exam, latents[row], question.shot) for question in asked]
        lines.append([of[len(of) // 2] for of in frames])
    save_rows(path, lines)


def save_rows(path: pathlib.Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Frames side by side."""
    with whole_file(path) as partial:
        picture = np.concatenate([np.concatenate(row, axis=1) for row in rows])
        Image.fromarray(picture).save(os.fspath(partial), "jpeg", quality=92)
