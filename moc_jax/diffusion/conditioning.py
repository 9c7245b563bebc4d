"""Sampling a scene of which some is known: given shots, given first frames, or one shot after another.

Everything here is a choice of the noise level that each shot is shown at (LCT, arXiv 2503.10589, sections 3.3 and 3.4):

    known shot              t = t_c       z = (1 - t_c) z_0 + t_c noise, with the same noise at every step
    shot being denoised     t = sigma     z as the solver left it; a given first frame is (1 - sigma) z_0 + sigma noise
    shot whose turn comes   t = 1         z = noise

In the order `joint` all unknown shots have the same turn. In the order `shots` each has its own, and is known once it
is denoised; under `past` visibility that is exact, as no shot ever looked at a later one, and under `scene` visibility
it is a scene whose later shots are still pure noise.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from moc_jax.config import SampleConfig
from moc_jax.diffusion.process import VelocityFn, add_noise, shot_mask
from moc_jax.diffusion.samplers import Solver, grid_of, read_levels, solver_of
from moc_jax.scene import SceneLengths, frame_shot
from moc_jax.shapes import Array, Bool, Float, Int, Key, typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Known:
    """What of a batch of scenes is given."""

    video: Float[Array, "B F Y X Z"]  # clean latents where they are given; ignored elsewhere
    shots: Bool[Array, "B S"]  # whole shots that are given
    first_frames: Bool[Array, "B S"]  # shots to be sampled whose first latent frame is given


@typed
def shot_noise(keys: Key[Array, "B S"], lengths: SceneLengths, shape: tuple[int, ...]) -> Float[Array, "B F Y X Z"]:
    """Noise for frames of `shape` [F, Y, X, Z] that depends on nothing but the key of each frame's own shot.

    Frame n of a shot is drawn from fold_in(key, n), so neither the other shots, nor padding, nor the rest of the batch
    change it.
    """
    first = jnp.cumsum(lengths.shot_frames, axis=1) - lengths.shot_frames

    def scene(keys, shot, first):
        number = jnp.arange(shape[0]) - first[shot]
        return jax.vmap(lambda key, n: jax.random.normal(jax.random.fold_in(key, n), shape[1:]))(keys[shot], number)

    return jax.vmap(scene)(keys, jnp.maximum(frame_shot(lengths.shot_frames, shape[0]), 0), first)


@typed
def turns(known: Bool[Array, "B S"], lengths: SceneLengths, order: Literal["joint", "shots"]) -> Int[Array, "B S"]:
    """When each shot is denoised: 0 for the first turn; -1 for what is known, and for padding.

    One that continues another has that one's noise level, so it has its turn.
    """
    wanted = ~known & (lengths.shot_frames > 0)
    begins = wanted
    if lengths.continues is not None:
        begins = wanted & ~(lengths.continues & jnp.pad(wanted, ((0, 0), (1, 0)))[:, :-1])
    turn = jnp.zeros_like(lengths.shot_frames) if order == "joint" else jnp.cumsum(begins, axis=1) - 1
    return jnp.where(wanted, turn, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """Denoises all shots that are not known; see the file's docstring for what the model is shown of the others.

    As a loop, for a caller that wants to look up between two calls of the model:

        for each turn `now`:
            carried = solver.start(noise)
            for each row `at` of constants: carried = call(velocity_fn, now, z_0, carried, at)
            z_0 = end(now, z_0, carried)            from z_0 = begin() on
    """

    noise: Float[Array, "B F Y X Z"]
    """Where the sampled shots start."""
    history_noise: Float[Array, "B F Y X Z"]
    """What known shots are noised with. Not `noise`: a sampled shot is a function of that."""
    known: Known
    """What is given."""
    lengths: SceneLengths
    """The scenes' shots; sizes are data, so all scenes of one bucket share a compiled program."""
    cfg: SampleConfig
    """Solver, grid, order and t_c (`history_noise`)."""

    @property
    def solver(self) -> Solver:
        """What runs within a turn."""
        return turn_solver(self.cfg)

    @property
    def constants(self) -> tuple[np.ndarray, ...]:
        """See `turn_constants`."""
        return turn_constants(self.cfg)

    @property
    def turn(self) -> Int[Array, "B S"]:
        """When each shot is denoised."""
        return turns(self.known.shots, self.lengths, self.cfg.order)

    def begin(self) -> Float[Array, "B F Y X Z"]:
        """Clean latents as far as they are given, zeros elsewhere."""
        given = _frames(self._mine, self.known.shots) | _frames(self._first, self.turn >= 0)
        return jnp.where(given, self.known.video, 0)

    def call(
        self, velocity_fn: VelocityFn, now: ArrayLike, z_0: Array, carried: tuple[Array, ...], at: tuple[ArrayLike, ...]
    ) -> tuple[Array, ...]:
        """One call of the model, with its guidance, in turn `now`."""
        done, active = self.turn < now, self.turn == now
        free, eps = self._free(now), jnp.where(_frames(self._mine, done), self.history_noise, self.noise)

        read, own = at[0], at[1:]

        def levels(of_active):
            return jnp.where(done, self.cfg.history_noise, jnp.where(active, of_active, 1.0))

        def velocity(z, sigma):
            z = jnp.where(free, z, add_noise(z_0, eps, levels(sigma), self.lengths))  # at t = 1 the noise itself
            return jnp.where(free, velocity_fn(z, levels(read)), 0)

        return self.solver.call(velocity, carried, own)

    def end(self, now: ArrayLike, z_0: Array, carried: tuple[Array, ...]) -> Float[Array, "B F Y X Z"]:
        """Clean latents once turn `now` is over."""
        return jnp.where(self._free(now), carried[0], z_0)

    def _free(self, now: ArrayLike) -> Bool[Array, "B F 1 1 1"]:
        return _frames(self._mine & ~self._first, self.turn == now)

    @property
    def _mine(self) -> Bool[Array, "B S F"]:
        return shot_mask(self.lengths, self.noise.shape[1])

    @property
    def _first(self) -> Bool[Array, "B S F"]:
        return _firsts(self._mine) & self.known.first_frames[:, :, None]


def frames_of_shots(shots: Bool[Array, "B S"], lengths: SceneLengths, frames: int) -> Bool[Array, "B F 1 1 1"]:
    """The frames of these shots, ready to select latents."""
    return _frames(shot_mask(lengths, frames), shots)


def turn_solver(cfg: SampleConfig) -> Solver:
    """The solver of each turn, over the grid that `cfg` asks for."""
    return solver_of(grid_of(cfg), cfg.solver)


def turn_constants(cfg: SampleConfig) -> tuple[np.ndarray, ...]:
    """float32, for each call in a turn: the noise level that the model reads, and the solver's own constants."""
    solver = turn_solver(cfg)
    return np.asarray(read_levels(solver.levels, cfg), np.float32), *solver.constants


def _firsts(mine: Bool[Array, "B S F"]) -> Bool[Array, "B S F"]:
    return mine & (jnp.cumsum(mine, axis=2) == 1)


def _frames(mine: Bool[Array, "B S F"], shots: Bool[Array, "B S"]) -> Bool[Array, "B F 1 1 1"]:
    """The frames of the chosen shots, ready to select latents."""
    return (mine & shots[:, :, None]).any(axis=1)[:, :, None, None, None]
