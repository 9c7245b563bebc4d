"""How many rounds dispatch takes (dispatch.py) for equal shots and random picks, before there are any."""

import itertools
import math

import numpy as np

from moc_jax.attention.homes import Homes, holder_of
from moc_jax.config import MoCConfig

_DEVIATIONS = 4  # that the fullest of many holders has more than its mean


def usual_ring_rounds(cfg: MoCConfig, homes: Homes, shots: int) -> int:
    """`ring_rounds` of equal shots."""
    deal = homes.deal
    if cfg.mode == "dense":
        return deal.groups // 2
    if cfg.self_anchor == "none":
        return 0
    edges = np.linspace(0, deal.frames * deal.frame, max(1, min(shots, deal.frames)) + 1).astype(int)
    if cfg.self_anchor != "shot":
        reach = homes.longest * (2 * cfg.window + 1 if cfg.self_anchor == "window" else 1)
        edges = np.unique(np.concatenate([np.arange(a, b, reach) for a, b in itertools.pairwise(edges)] + [edges]))
    apart = (edges[1:] - 1) // homes.rows - edges[:-1] // homes.rows
    return min(int(apart.max()), deal.groups // 2)


def usual_pick_rounds(cfg: MoCConfig, homes: Homes, shots: int) -> int:
    """In which picks are served, where a query picks from the chunks of earlier shots, or of all but its own."""
    if not homes.picks or not homes.usual:
        return 0
    deal, shots = homes.deal, max(1, min(shots, homes.deal.frames))
    of_shot = math.ceil(deal.frames * deal.frame / shots / homes.longest)
    chunk = np.arange(of_shot * shots)
    holder, shot = holder_of(chunk, deal.groups), chunk // of_shot
    queries, expected = deal.frames * deal.part / shots, np.zeros(deal.groups)
    for own in range(shots):
        there = shot < own if cfg.causal_routing else shot != own
        held = np.bincount(holder[there], minlength=deal.groups)
        missed = np.ones(deal.groups)
        for drawn in range(min(homes.usual, held.sum())):
            missed *= np.maximum(held.sum() - held - drawn, 0) / (held.sum() - drawn)
        expected += queries * (1 - missed)
    most = expected.max() + _DEVIATIONS * math.sqrt(expected.max())
    return math.ceil(most / homes.batch)
