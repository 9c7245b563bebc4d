"""What each call of the model attends to while a video is sampled, and how many pairs that skips."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.attention.accounting import account
from moc_jax.config import MoCConfig, ModelConfig, SampleConfig
from moc_jax.diffusion.conditioning import turn_solver
from moc_jax.models import scene_shape
from moc_jax.sampling.scenes import Request
from moc_jax.scene import SceneLengths, chunk_table


def moc_of_calls(moc: MoCConfig, cfg: SampleConfig) -> tuple[MoCConfig, ...]:
    """One for each of the solver's calls; a solver that calls twice at a noise level attends alike both times."""
    levels = np.asarray(turn_solver(cfg).constants[0])
    steps = np.unique(levels)[::-1]
    return tuple(moc.at_step(int(np.sum(steps > level)), len(steps), float(level)) for level in levels)


def spared(moc: MoCConfig, model: ModelConfig, plan: tuple[MoCConfig, ...], request: Request) -> str:
    """A line on what is attended to and what is not, each query picking the longest chunks; empty if nothing changes
    with steps or layers."""
    depth, kinds = model.depth, collections.Counter(plan)
    if len(kinds) == 1 and not moc.dense_layers:
        return ""
    lengths = SceneLengths(*(jnp.asarray(x) for x in (request.lengths.shot_frames, request.lengths.text_lengths)))
    shape, lengths = scene_shape(model, request.known.video.shape, request.text.shape, lengths)
    table = jax.jit(chunk_table, static_argnums=(1, 2))(lengths, shape, moc.chunk)
    share = 0.0
    for each, count in kinds.items():
        counted = account(table, each, model.head_dim)
        layers = depth - len(set(moc.dense_layers)) if each.mode == "moc" else 0
        share += count / len(plan) * (layers / depth) * counted.sparsity
    parts = [f"{'dense' if each.mode == 'dense' else f'top {each.top_k}'} in {n}" for each, n in kinds.items()]
    layers = f", with {len(set(moc.dense_layers))} of {depth} layers dense" if moc.dense_layers else ""
    return f"attention: {', '.join(parts)} of {len(plan)} calls{layers}; {share:.1%} of all pairs are skipped"
