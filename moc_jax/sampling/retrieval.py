"""Which finished shots a new one is shown: outer routing, of whole shots.

As queries of a shot pick chunks by their mean key, the shot picks earlier shots by theirs: its mean query against their
mean keys, over all layers and heads. Each shot's means are taken with the shot alone in the scene, at the same
positions, so that they compare what shots are and not where they lie.
"""

from collections.abc import Collection, Mapping

import numpy as np

from moc_jax.shapes import Float, Float32


def score(queries: Float32[np.ndarray, "depth H D"], keys: Float32[np.ndarray, "depth H D"]) -> float:
    """How much a shot with these mean queries wants one with these mean keys."""
    return float((queries * keys).sum(axis=-1).mean() / np.sqrt(keys.shape[-1]))


def chosen(
    scores: Mapping[int, float], most: int, *, remember: Collection[int] = (), forget: Collection[int] = ()
) -> list[int]:
    """The shots that are shown, in their order.

    Args:
        scores: of all earlier shots; of equal ones the later is taken.
        most: how many are shown; 0: all.
        remember: shown whatever their scores; they count as well.
        forget: not shown, unless remembered.
    """
    free = [shot for shot in scores if shot not in remember and shot not in forget]
    ranked = sorted(free, key=lambda shot: (scores[shot], shot), reverse=True)
    return sorted([*remember, *(ranked[: max(0, most - len(remember))] if most else ranked)])


def mean_score(of_shots: list[Float[np.ndarray, "depth H D"]], keys: Float32[np.ndarray, "depth H D"]) -> float:
    """Of a take of several shots: the mean of theirs."""
    return float(np.mean([score(queries, keys) for queries in of_shots]))
