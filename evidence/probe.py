"""What one call of a model shows of its memory: errors, picks, attention and gradients, by story and shot."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from evidence.arms import Arm
from evidence.dataset import MarkedScene
from evidence.watch import GRADIENT, MOST, READ, apart, watched
from moc_jax.attention.routing import candidate_chunks
from moc_jax.config import MoCConfig
from moc_jax.diffusion.process import VelocityFn, add_noise, shot_mask, velocity_target
from moc_jax.models import Routed, VideoModel
from moc_jax.models.patches import tokens_of
from moc_jax.scene import ChunkTable, Scene
from moc_jax.shapes import Array, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """What one call of the model showed, by story and shot; the reveals' entries mean nothing."""

    box_error: Float[
        np.ndarray | Array, "n S"
    ]  # mean squared error of the velocity in the character's box; 0 without one
    error: Float[np.ndarray | Array, "n S"]  # in the whole shot
    into_reveal: Float[
        np.ndarray | Array, "n depth H S"
    ]  # share of the box's picks that lie in the revealing shot; or NaN
    by_chance: Float[np.ndarray | Array, "n S"]  # the same if all that may be picked is as likely; or NaN
    read: Float[np.ndarray | Array, "n depth H S 3"]  # means of `watch.READ` over the box; or NaN
    gradient: Float[np.ndarray | Array, "n S 2"]  # `watch.GRADIENT` of the box's error; or NaN


def probe_of(
    model: VideoModel,
    patch: tuple[int, int, int],
    arm: Arm,
    characters: int,
    scene: MarkedScene,
    t: Float[Array, "B S"],
    key: Key[Array, ""],
) -> Probe:
    """Of a model that attends as an arm.

    Args:
        characters: as many first shots reveal one each, and are given at a small t.
        t: the shots' noise levels, in [0, 1].

    Returns:
        `read` and `gradient` are NaN in scenes of more than `watch.MOST` tokens.
    """
    few = scene.text.shape[1] + scene.characters[0].size // math.prod(patch) <= MOST
    attention = watched(arm, scene.reveals) if few else arm.attention
    found: list[Routed] = []

    def velocity(z, t):
        found.append(model.routed(z, scene.text, t, scene.lengths, arm.moc, attention=attention))
        return found[0].velocity

    errors = errors_of(velocity, scene, key, t)
    (routed,) = found
    routes, read = apart(routed.routes) if few else (routed.routes, None)
    asked = _asked(routed.table, scene, patch)
    into_reveal = _into_reveal(routes[..., : arm.moc.top_k], routed.table, scene, asked)  # without sinks
    gradient = jnp.full((*t.shape, len(GRADIENT)), jnp.nan)
    if few:
        gradient = gradient.at[:, characters:].set(_gradients(model, arm, characters, scene, t, key))
    return Probe(
        box_error=per_shot(errors, scene.characters.astype(errors.dtype), scene),
        error=per_shot(errors, jnp.ones_like(errors), scene),
        into_reveal=into_reveal,
        by_chance=_by_chance(routed.table, arm.moc, scene, asked),
        read=jnp.full((*into_reveal.shape, len(READ)), jnp.nan) if read is None else _in_boxes(read, asked),
        gradient=gradient,
    )


def _gradients(
    model: VideoModel, arm: Arm, characters: int, scene: MarkedScene, t: Float[Array, "B S"], key: Key[Array, ""]
) -> Float[Array, "B later 2"]:
    """`GRADIENT` of the error in the character's box of each shot after the reveals."""

    def box_errors(z):
        def velocity(*_):
            return model(z, scene.text, t, scene.lengths, arm.moc, attention=arm.attention)

        return per_shot(errors_of(velocity, scene, key, t), scene.characters.astype(jnp.float32), scene)

    _, vjp = jax.vjp(box_errors, add_noise(scene.video, jax.random.normal(key, scene.video.shape), t, scene.lengths))
    frames = shot_mask(scene.lengths, scene.video.shape[1]).astype(jnp.float32)  # [B, S, F]

    def of_shot(shot):
        (gradient,) = vjp(jnp.broadcast_to(jax.nn.one_hot(shot, t.shape[1]), t.shape))
        square = jnp.einsum("bsf,bfyxz->bs", frames, jnp.square(gradient))
        reveal, of_reveals = scene.reveals[:, shot, None], square[:, :characters]
        earlier = jnp.where(jnp.arange(t.shape[1]) < shot, square, 0).sum(axis=1) / square.sum(axis=1)
        right = jnp.take_along_axis(square, jnp.maximum(reveal, 0), axis=1)[:, 0] / of_reveals.sum(axis=1)
        return jnp.where(reveal >= 0, jnp.stack([earlier, right], axis=-1), jnp.nan)

    return jnp.moveaxis(jax.lax.map(of_shot, jnp.arange(characters, t.shape[1])), 0, 1)


def errors_of(velocity_fn: VelocityFn, scene: Scene, key: Key[Array, ""], t: Array) -> Float[Array, "B F Y X"]:
    """The squared error of each latent's velocity."""
    noise = jax.random.normal(key, scene.video.shape)
    velocity = velocity_fn(add_noise(scene.video, noise, t, scene.lengths), t)
    return jnp.square(velocity - velocity_target(scene.video, noise)).mean(axis=-1)


def per_shot(errors: Float[Array, "B F Y X"], weights: Array, scene: Scene) -> Float[Array, "B S"]:
    """Their weighted mean over each shot; 0 where no latent weighs anything."""
    mine = shot_mask(scene.lengths, errors.shape[1]).astype(errors.dtype)  # [B, S, F]
    total, weight = (jnp.einsum("bsf,bfyx->bs", mine, of) for of in (errors * weights, weights))
    return total / jnp.maximum(weight, 1e-9)


def _asked(table: ChunkTable, scene: MarkedScene, patch: tuple[int, int, int]) -> Float[Array, "B V S"]:
    """1 for each token in the box of a recalled character, at its shot."""
    shot = table.token_shot[:, table.text_tokens :]
    box = tokens_of(scene.characters[..., None].astype(jnp.float32), patch).any(axis=-1)
    recalled = jnp.take_along_axis(scene.reveals, jnp.maximum(shot, 0), axis=1) >= 0
    return jax.nn.one_hot(shot, scene.reveals.shape[1]) * (box & recalled)[..., None]


def _in_boxes(read: Float[Array, "depth B H V n"], asked: Float[Array, "B V S"]) -> Float[Array, "B depth H S n"]:
    """Means over each shot's tokens that are asked about; NaN where there are none."""
    return jnp.einsum("lbhvn,bvs->blhsn", read, asked) / asked.sum(axis=1)[:, None, None, :, None]


def _into_reveal(
    picks: Int[Array, "depth B H V K"], table: ChunkTable, scene: MarkedScene, asked: Float[Array, "B V S"]
) -> Float[Array, "B depth H S"]:
    """Of the picks of the tokens that are asked about, the share that lies in the shot that showed the character."""
    wanted = jnp.take_along_axis(scene.reveals, jnp.maximum(table.token_shot[:, table.text_tokens :], 0), axis=1)
    read = jax.vmap(lambda shots, picks: shots[jnp.maximum(picks, 0)], in_axes=(0, 1), out_axes=1)(table.shot, picks)
    made = picks >= 0
    right = made & (read == wanted[None, :, None, :, None])
    right, made = (jnp.einsum("lbhvk,bvs->blhs", of.astype(jnp.float32), asked) for of in (right, made))
    return right / made  # NaN where nothing was picked


def _by_chance(
    table: ChunkTable, moc: MoCConfig, scene: MarkedScene, asked: Float[Array, "B V S"]
) -> Float[Array, "B S"]:
    """Of the tokens that are asked about, the share of what they may pick that lies in the shot that showed the
    character."""
    wanted = jnp.take_along_axis(scene.reveals, jnp.maximum(table.shot, 0), axis=1)
    candidates = candidate_chunks(table, moc)
    right = (candidates & (table.shot[:, None, :] == wanted[:, :, None])).sum(axis=2) / candidates.sum(axis=2)
    of_token = jnp.take_along_axis(right, jnp.maximum(table.chunk_of[:, table.text_tokens :], 0), axis=1)
    return jnp.einsum("bv,bvs->bs", jnp.nan_to_num(of_token), asked) / asked.sum(axis=1)
