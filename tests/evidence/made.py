"""Results as runs leave them, made up."""

import numpy as np

from evidence.experiment import interval
from evidence.findings import best_head
from evidence.measures import drawn, nearest
from evidence.stories import CANDIDATES, Stories


def result(arm, rate, seed, correct, trials=200, **changed):
    """Of a run with so many right answers, at gaps of 10 and of 1 as many as `far` and `near`; and what is changed."""
    low, high = interval(correct, trials)
    test = {"correct": correct, "trials": trials, "share": correct / trials, "low": low, "high": high, "of_story": 0.5}
    far, near = changed.pop("far", correct), changed.pop("near", correct)
    low, high = interval(far, trials)
    of_far = {"correct": far, "trials": trials, "share": far / trials, "low": low, "high": high, "of_story": 0.5}
    of_all = test | {"box_psnr": 20.0, "background_psnr": 25.0, "dynamic_degree": 0.01, "consistency": 0.9}
    level = {"level": 0.95, "error": 1.0, "box_error": 0.5, "box_error_by_gap": {"1": 0.5}}
    early = {"updates": 250, "correct": trials // 10, "share": 0.1, "seconds": 1.0}
    tests = [test | early, test | {"updates": 500, "seconds": 1.0}]
    tests[-1]["read"] = best_head({"earlier": [[0.5, 0.6]], "reveal": [[0.1, 0.4]], "entropy": [[3.0, 2.0]]})
    if arm.startswith("moc"):
        level |= {"into_reveal": [[0.25, 0.75], [0.1, 0.1]], "into_reveal_by_chance": 0.125}
        tests[-1]["into_reveal"] = level["into_reveal"]
    return {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "setting": "full",
        "final": False,
        "command": "python -m evidence.run",
        "versions": {"jax": "0.12.0"},
        "device": "H200",
        "date": "2026-01-01",
        "stories": 12000,
        "held_out": 200,
        "finished": True,
        "skipped": 0.75,
        "updates": 500,
        "milliseconds": 20.0,
        "truth_dynamic_degree": 0.02,
        "attention_flops": 100.0 if arm == "dense" else 20.0,
        "dense_flops": 110.0,
        "curve": tests,
        "test": {"all": of_all, "by_gap": {"10": of_all | of_far, "2": of_all, "1": of_all | {"correct": near}}},
        "levels": [level],
    } | changed


def check_identified(world: Stories, seeds: int) -> None:
    """Of noisy frames, the nearest candidate is the one that they show, the truth or any other."""
    for seed in range(seeds):
        story = world.story(seed)
        looks = (*story.looks, *story.strangers)
        assert len(looks) == CANDIDATES
        noise = np.random.default_rng(seed)
        for recall, _ in story.recalls:
            for truth in (story.shots[recall].character, 9):
                frames = story.render_shot(recall, looks[truth]).astype(np.float32)
                noisy = np.clip(frames + noise.normal(0, 40, frames.shape), 0, 255).astype(np.uint8)
                pixels = drawn(story, recall, looks, lambda frames: frames)
                assert nearest(noisy[story.shots[recall].box], pixels) == truth
