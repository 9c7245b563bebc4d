"""From noise to video: sampling grids, and solvers of dz/dt = v(z, t) from t = 1 to t = 0.

With alpha = 1 - sigma, lambda = log(alpha / sigma), m_i = z_i - sigma_i v(z_i, sigma_i) the predicted video, and

    r = (lambda_i - lambda_{i-1}) / h,  h = lambda_{i+1} - lambda_i,
    a = sigma_{i+1} / sigma_i,  b = alpha_{i+1} (1 - e^{-h}) = alpha_{i+1} - a alpha_i,

the solvers of this file are

    Euler:   z_{i+1} = z_i + (sigma_{i+1} - sigma_i) v_i                                                 (1)
    Heun:    z_{i+1} = z_i + (sigma_{i+1} - sigma_i) (v_i + v'_{i+1}) / 2,  v' at Euler's z_{i+1}        (2)
    DPM++:   z_{i+1} = a z_i + b (m_i + (m_i - m_{i-1}) / (2 r))                                         (3)
    UniPC:   z_{i+1} = a z_i + b (m_i + rho_1 (m_i - m_{i-1}) / r + rho_2 (m_{i+1} - m_i))               (4)

(3) is DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) and also the predictor of UniPC of order 2 with B(h) = e^h - 1
(arXiv 2302.04867, section 3), whose corrector (4) takes the step again once m_{i+1} is known, before the next one
starts and without evaluating the model again.

Each solver is a loop whose body calls the model once, so that the model is traced and compiled once. `solve` runs it
as one `lax.scan`; a caller that wants to look up between two calls runs the body itself.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from moc_jax.config import SampleConfig
from moc_jax.diffusion import process
from moc_jax.shapes import Array, Float, typed

ScheduleName = Literal["diffusers-unipc", "diffusers-euler", "wan-unipc", "wan-dpm++"]
LevelVelocity = Callable[[Array, Array], Array]
"""(z, sigma) -> velocity of z's shape, for the one noise level that a solver steps along."""

DEFAULT_SCHEDULE: dict[str, ScheduleName] = {
    "euler": "diffusers-euler",
    "heun": "diffusers-euler",
    "unipc": "diffusers-unipc",
    "dpm++": "wan-dpm++",
}


def sigmas(steps: int, shift: float, name: ScheduleName) -> np.ndarray:
    """The noise levels that a sampler visits: `steps` of them, falling, and a last 0.

    Four grids in public use look alike and are not; each is even before the flow shift of equation (1) in process.py.

    | name | even grid before the shift | as in |
    |---|---|---|
    | diffusers-unipc | 1 to 1/1000 in steps + 1 points, the last left out; a first 1 is lowered by 1e-6 | UniPC |
    | diffusers-euler | 1 to the *shifted* 1/1000 in `steps` points: the low end is shifted twice | FlowMatchEuler |
    | wan-unipc | 0.999 to 0 in steps + 1 points, the last left out | Wan 2.1, solver `unipc` |
    | wan-dpm++ | 1 to 0 in steps + 1 points, the last left out | Wan 2.1, solver `dpm++` |

    Args:
        steps: evaluated levels, at least 1.
        shift: the flow shift s.
        name: which grid.

    Returns:
        float64 of steps + 1 levels.
    """
    if name == "diffusers-unipc":
        grid = np.linspace(1, 1 / 1000, steps + 1)[:-1]
    elif name == "diffusers-euler":
        grid = np.linspace(1, process.shift(1 / 1000, shift), steps)
    elif name == "wan-unipc":
        grid = np.linspace(0.999, 0, steps + 1)[:-1]
    else:
        grid = np.linspace(1, 0, steps + 1)[:-1]
    grid = process.shift(grid, shift)
    if name == "diffusers-unipc" and abs(grid[0] - 1) < 1e-6:
        grid[0] -= 1e-6
    return np.append(grid, 0.0)


def schedule_of(cfg: SampleConfig) -> ScheduleName:
    """The grid's name; `schedule = auto` takes the one its solver is published with."""
    return DEFAULT_SCHEDULE[cfg.solver] if cfg.schedule == "auto" else cfg.schedule


def grid_of(cfg: SampleConfig) -> np.ndarray:
    """The grid that `cfg` asks for."""
    return sigmas(cfg.steps, cfg.shift, schedule_of(cfg))


def read_levels(levels: np.ndarray, cfg: SampleConfig) -> np.ndarray:
    """What the model reads in place of these noise levels: see `SampleConfig.whole_timesteps`."""
    whole = cfg.whole_timesteps and schedule_of(cfg) != "diffusers-euler"
    return (1000 * levels).astype(np.int64) / 1000 if whole else levels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """A loop over calls of the model: `carried = call(velocity, carried, constants[i])` from `start(noise)` on."""

    start: Callable[[Array], tuple[Array, ...]]
    """Noise -> what one call hands to the next; its first part is z."""
    call: Callable[[LevelVelocity, tuple[Array, ...], tuple[ArrayLike, ...]], tuple[Array, ...]]
    """(velocity, what is carried, the call's own constants) -> what is carried."""
    levels: np.ndarray
    """float64 [calls]: the noise level that each call is made at."""
    weights: tuple[np.ndarray, ...]
    """[calls, ...]: what else of the grid a call needs."""

    @property
    def constants(self) -> tuple[np.ndarray, ...]:
        """float32 [calls, ...]: the noise level of each call, and its weights."""
        return tuple(np.asarray(values, np.float32) for values in (self.levels, *self.weights))

    @property
    def calls(self) -> int:
        """How often the model is called."""
        return len(self.levels)


def solver_of(levels: np.ndarray, name: str) -> Solver:
    """The solver `euler`, `heun`, `unipc` or `dpm++` over falling noise levels, as made by `sigmas`."""
    if name == "euler":
        return _euler(levels)
    if name == "heun":
        return _heun(levels)
    return _multistep(levels, corrector=name == "unipc")


@typed
def solve(velocity: LevelVelocity, z: Float[Array, "*any"], levels: np.ndarray, solver: str) -> Float[Array, "*any"]:
    """Integrates dz/dt = velocity(z, t) from noise z at levels[0] down to levels[-1].

    Args:
        velocity: (z, sigma) -> velocity.
        z: noise.
        levels: falling noise levels; a last 0 returns the last predicted video (exactly, for the multistep solvers).
        solver: `euler`, `heun`, `unipc` or `dpm++`.
    """
    loop = solver_of(levels, solver)
    constants = tuple(map(jnp.asarray, loop.constants))
    carried, _ = jax.lax.scan(lambda carried, at: (loop.call(velocity, carried, at), None), loop.start(z), constants)
    return carried[0]


def _euler(levels: np.ndarray) -> Solver:
    """Equation (1): order 1, one evaluation per step."""

    def call(velocity, carried, at):
        (z,), (sigma, width) = carried, at
        return (z + width * velocity(z, sigma),)

    return Solver(start=lambda z: (z,), call=call, levels=levels[:-1], weights=(np.diff(levels),))


def _heun(levels: np.ndarray) -> Solver:
    """Equation (2): order 2, two evaluations per step; the last step, which would end at sigma = 0, is Euler's.

    The calls are sigma_0, then each later level twice, as a step's end and as a start.
    """
    width = np.diff(levels)
    calls = 2 * len(width) - 1
    visited = np.repeat(levels[:-1], 2)[1:]  # sigma_0, sigma_1, sigma_1, sigma_2, sigma_2, ...
    starts = np.arange(calls) % 2 == 0

    def call(velocity, carried, at):
        z, start, start_velocity = carried
        sigma, width, starts = at
        v = velocity(z, sigma)
        start = jnp.where(starts > 0, z, start)
        start_velocity = jnp.where(starts > 0, v, start_velocity)  # at a start this is v itself: (2) becomes (1)
        return start + width * (start_velocity + v) / 2, start, start_velocity

    return Solver(
        start=lambda z: (z, z, jnp.zeros_like(z)),
        call=call,
        levels=visited,
        weights=(np.repeat(width, 2)[:calls], starts),
    )


def _multistep(levels: np.ndarray, *, corrector: bool) -> Solver:
    """Equation (3), and (4) with `corrector`: order 2, one evaluation per step.

    The first and the last step are of order 1: there is no earlier m, and lambda is infinite at sigma = 0.
    """
    predict, correct = multistep_weights(levels, corrector=corrector)

    def call(velocity, carried, at):
        z, x_1, m_1, m_2 = carried  # predicted z_i; corrected z_{i-1}; m_{i-1}, m_{i-2}
        sigma, p, c = at
        m = z - sigma * velocity(z, sigma)
        x = c[0] * z + c[1] * x_1 + c[2] * m + c[3] * m_1 + c[4] * m_2
        return p[0] * x + p[1] * m + p[2] * m_1, x, m, m_1

    def start(z):
        return z, jnp.zeros_like(z), jnp.zeros_like(z), jnp.zeros_like(z)

    return Solver(start=start, call=call, levels=levels[:-1], weights=(predict, correct))


def multistep_weights(levels: np.ndarray, *, corrector: bool) -> tuple[np.ndarray, np.ndarray]:
    """The weights of equations (3) and (4), which depend on the grid alone, in float64.

    Returns:
        predict [steps, 3]: z_{i+1} from (z_i, m_i, m_{i-1}).
        correct [steps, 5]: the corrected z_i from (the predicted z_i, the corrected z_{i-1}, m_i, m_{i-1}, m_{i-2}).
    """
    steps = len(levels) - 1
    with np.errstate(divide="ignore"):
        lam = np.log(1 - levels) - np.log(levels)  # infinite at levels 1 and 0
    predict, correct = np.zeros((steps, 3)), np.zeros((steps, 5))
    correct[:, 0] = 1
    for i in range(steps):
        a = levels[i + 1] / levels[i]
        b = (1 - levels[i + 1]) - a * (1 - levels[i])
        order = min(2, i + 1, steps - i)
        h = lam[i + 1] - lam[i]
        r = (lam[i] - lam[i - 1]) / h if order == 2 else np.inf
        predict[i] = a, b * (1 + 0.5 / r), -b * 0.5 / r
        if corrector and i + 1 < steps:
            rho_1, rho_2 = _corrector_rhos(h, r) if order == 2 else (0.0, 0.5)
            correct[i + 1] = 0, a, b * rho_2, b * (1 + rho_1 / r - rho_2), -b * rho_1 / r
    return predict, correct


def _corrector_rhos(h: float, r: float) -> tuple[float, float]:
    """Solves equation (4)'s order conditions [[1, 1], [-r, 1]] (rho_1, rho_2) = (b_1, b_2) (UniPC, section 3)."""
    hh, big_b = -h, np.expm1(-h)
    phi_2 = big_b / hh - 1
    b_1, b_2 = phi_2 / big_b, 2 * (phi_2 / hh - 0.5) / big_b
    rho_1 = (b_1 - b_2) / (1 + r)
    return rho_1, b_1 - rho_1
