"""What devices send each other in a step, counted from the config: weights, gradients, and what attention exchanges
between the devices of a scene (`attention.accounting.exchange`)."""

import math
from collections.abc import Iterator, Mapping

from moc_jax.attention.accounting import Exchange as AttentionExchange
from moc_jax.attention.deal import Deal
from moc_jax.config import ModelConfig, Remat
from moc_jax.planning.links import Exchange, Kind, exchange
from moc_jax.planning.topology import Topology
from moc_jax.sharding import AXES

BF16, _F32 = 2, 4


def exchanges(
    model: ModelConfig,
    policy: Remat,
    moving: int,
    trained: int,
    deal: Deal,
    moved: AttentionExchange,
    scenes: int,
    sizes: Mapping[str, int],
    where: Topology,
    *,
    training: bool = True,
) -> list[Exchange]:
    """Those of a step in which each group of devices that shares a scene, as `deal` says, has `scenes`, for which
    attention moves `moved`.

    Gathered are `moving` parameters; `trained` ones, of the model or of adapters, have gradients.
    """
    inner = {axis: math.prod(sizes[other] for other in AXES[AXES.index(axis) + 1 :]) for axis in AXES}

    def over(what: str, kind: Kind, axis: str, received: float) -> Exchange:
        return exchange(what, kind, axis, received, sizes[axis], inner[axis], where)

    def others(axis: str) -> float:
        return (sizes[axis] - 1) / sizes[axis]

    found = []
    for what, kind, received in _of_attention(moved, policy, training):
        found.append(over(what, kind, "context", model.depth * received))
    if sizes["tensor"] > 1:
        tokens = (deal.text_rows + deal.video_rows) / deal.devices
        share = tokens * scenes * model.dim * BF16 * others("tensor")
        times = model.depth * (4 if not training else 12)  # before and after attention and the MLP, each way
        found.append(over("tokens between halves of a layer", "all-gather", "tensor", times * share))
    for axis, parts in (("fsdp", 1), ("context", sizes["fsdp"])):  # weights and gradients are in parts over both
        if sizes[axis] > 1 and moving:
            held, summed = (of / sizes["tensor"] / parts * others(axis) for of in (moving, min(trained, moving)))
            found.append(over("weights of each layer", "all-gather", axis, (2 if training else 1) * BF16 * held))
            if training:
                found.append(over("gradients", "reduce-scatter", axis, _F32 * summed))
    if training and sizes["data"] > 1:
        held = trained / (sizes["tensor"] * sizes["fsdp"] * sizes["context"])
        found.append(over("gradients", "all-reduce", "data", 2 * _F32 * held * others("data")))
    return found


def _of_attention(moved: AttentionExchange, policy: Remat, training: bool) -> Iterator[tuple[str, Kind, float]]:
    """Those of a layer, with what is recomputed."""
    # Of q, k, v and the output: forward; again for the backward pass, but for what is kept as it was exchanged; and the
    # gradients. The output is kept where it was made, and what reads it is elsewhere.
    again = {"none": 0.0, "qkv+attention+mlp": 0.25}.get(policy, 1.0)
    passes = 2 + again if training else 1
    if moved.heads:
        yield "heads of q, k, v and outputs", "all-to-all", passes * moved.heads
    if moved.kind == "dispatch":
        rounds, (around, _), (back, _) = moved.rounds[0], moved.of_round, moved.of_round_backward
        # Where outputs are kept, nothing is looked for again, but all goes again to where gradients are made.
        looked, went = (1, 1) if not training else (2, 2) if policy == "full" else (1, 2)
        served = moved.between - moved.keys - rounds * around
        returned = moved.between_backward - rounds * back
        yield "queries to their picks and home", "all-to-all", looked * served + went * moved.keys + training * returned
        if rounds:
            yield "keys and values of shots", "collective-permute", rounds * (looked * around + training * back)
    elif moved.keys:
        yield "keys and values", "all-gather", (1 + (training and policy != "none")) * moved.keys
        if training:
            yield "gradients of keys and values", "all-to-all", moved.keys_backward
