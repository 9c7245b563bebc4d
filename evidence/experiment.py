"""One arm, one seed: training with the reveals given, and the test that training prepares for.

In training, as in the test, a story's reveals are known but for a little noise (t = t_c), and all later shots share one
noise level. The loss counts the later shots alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from evidence.arms import Arm
from evidence.dataset import Dataset
from evidence.measures import candidates, dynamic_degree, identify, psnr
from evidence.world import World, boxes, render_shot
from moc_jax.codecs import Codec, pixels_from_unit, pixels_to_unit
from moc_jax.config import DiffusionConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from moc_jax.diffusion.process import add_noise, flow_loss, sample_timesteps
from moc_jax.diffusion.samplers import sigmas, solve
from moc_jax.scene import Scene
from moc_jax.shapes import Array, Bool, Float, Int, Key, typed
from moc_jax.sharding import Params, make_mesh
from moc_jax.training.state import TrainState, create_state, make_blueprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all arms have in common."""

    world: World
    model: ModelConfig
    optimizer: OptimizerConfig
    diffusion: DiffusionConfig = DiffusionConfig(t_mean=1.0)
    updates: int
    batch: int = 64
    history_noise: float = 0.02
    """t_c, at which the reveals are seen."""
    sampling_steps: int = 12


@typed
def levels(key: Key[Array, ""], scene: Scene, task: Task) -> Float[Array, "B S"]:
    """The noise levels of training: t_c for the reveals, one draw per scene for the other shots."""
    joint = dataclasses.replace(task.diffusion, joint_probability=1.0)
    t = sample_timesteps(key, scene.lengths, joint)
    return jnp.where(_revealed(scene, task), task.history_noise, t)


def _revealed(scene: Scene, task: Task) -> Bool[Array, "B S"]:
    shot = jnp.arange(scene.lengths.shot_frames.shape[1])[None]
    return jnp.broadcast_to(shot < task.world.characters, scene.lengths.shot_frames.shape)


class Trainer:
    """Trains one arm from one seed; `state` is where it stands."""

    def __init__(self, task: Task, arm: Arm, seed: int, data: Dataset):
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        self._task, self._arm, self._data = task, arm, data
        train = TrainConfig(seed=seed, steps=task.updates, ema_decay=0.999)
        self._blueprint = make_blueprint(task.model, task.optimizer, train, mesh)
        self.state = create_state(self._blueprint)
        self._key = jax.random.key(seed)
        self._steps = jax.jit(self._many, static_argnums=2, donate_argnums=0)
        self._sample = jax.jit(self._sampled)

    def run(self, count: int) -> Float[np.ndarray, " count"]:
        """So many updates in one program; their losses."""
        self.state, losses = self._steps(self.state, self._data, count)
        return np.asarray(losses)

    def sample(self, data: Dataset, rows: Int[Array, " B"], key: Key[Array, ""]) -> Float[np.ndarray, "B F Y X Z"]:
        """Stories with the reveals given and the later shots sampled, with the averaged weights."""
        return np.asarray(self._sample(self.state.sampling_params, data.scenes(rows), key))

    def _velocity(self, params: Params, scene: Scene, key: Key[Array, ""] | None):
        model = nnx.merge(self._blueprint.graph, params)
        return lambda z, t: model(
            z, scene.text, t, scene.lengths, self._arm.moc, key=key, attention=self._arm.attention
        )

    def _many(self, state: TrainState, data: Dataset, count: int) -> tuple[TrainState, Float[Array, " count"]]:
        def step(state: TrainState, _):
            rows_key, level_key, noise_key, drop_key = jax.random.split(jax.random.fold_in(self._key, state.step), 4)
            scene = data.scenes(jax.random.randint(rows_key, (self._task.batch,), 0, data.latents.shape[0]))
            t = levels(level_key, scene, self._task)

            def loss_of(params):
                _, per_shot = flow_loss(
                    self._velocity(params, scene, drop_key), scene, noise_key, self._task.diffusion, t=t
                )
                later = ~_revealed(scene, self._task)
                return jnp.sum(per_shot * later) / later.sum()

            loss, gradients = jax.value_and_grad(loss_of)(state.params)
            updates, moments = self._blueprint.optimizer.update(gradients, state.optimizer, state.params, shots=1.0)
            params = optax.apply_updates(state.params, updates)
            decay = jnp.minimum(0.999, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, state.ema, params)
            return TrainState(state.step + 1, params, moments, ema), loss

        return jax.lax.scan(step, state, length=count)

    def _sampled(self, params: Params, scene: Scene, key: Key[Array, ""]) -> Float[Array, "B F Y X Z"]:
        """Euler's method for the later shots; the reveals stay at t_c, always with the same noise."""
        start_key, history_key = jax.random.split(key)
        shape = scene.video.shape
        revealed = _revealed(scene, self._task)
        frames = jnp.repeat(revealed, shape[1] // revealed.shape[1], axis=1)[:, :, None, None, None]
        t_c = jnp.full(revealed.shape, self._task.history_noise)
        history = add_noise(scene.video, jax.random.normal(history_key, shape), t_c, scene.lengths)
        velocity = self._velocity(params, scene, None)

        def of_later(z, sigma):
            t = jnp.where(revealed, t_c, sigma)
            return jnp.where(frames, 0, velocity(jnp.where(frames, history, z), t))

        grid = sigmas(self._task.sampling_steps, 1.0, "wan-dpm++")
        z = solve(of_later, jax.random.normal(start_key, shape), grid, "euler")
        return jnp.where(frames, scene.video, z)


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


def recalls_of(latents: Float[np.ndarray, "F Y X Z"], world: World, seed: int, codec: Codec) -> Iterator[Recall]:
    """Every recall of one sampled story."""
    story = world.story(seed)
    shots = np.split(latents, world.shots)
    looks = candidates(story, seed)

    def reconstruct(frames: np.ndarray) -> np.ndarray:
        return pixels_from_unit(codec.decode(codec.encode(pixels_to_unit(frames))))

    for shot, reveal in story.recalls:
        frames = pixels_from_unit(codec.decode(shots[shot].astype(np.float32)))
        truth, box = reconstruct(render_shot(story, shot)), boxes(story.shots[shot])
        found = identify(frames, story, shot, looks, reconstruct)
        yield Recall(
            story=seed,
            gap=shot - reveal,
            correct=found == story.shots[shot].character,
            of_story=found < len(story.looks),
            box_psnr=psnr(frames, truth, box),
            background_psnr=psnr(frames, truth, ~box),
            dynamic_degree=dynamic_degree(frames),
        )


def evaluate(
    trainer: Trainer, data: Dataset, seeds: Sequence[int], world: World, codec: Codec, batch: int = 64
) -> list[Recall]:
    """Every recall of the held-out stories `seeds`, whose encoded form `data` is."""
    found: list[Recall] = []
    for first in range(0, len(seeds), batch):
        rows = np.arange(first, min(first + batch, len(seeds)))
        latents = trainer.sample(data, jnp.asarray(rows), jax.random.key(first))
        for row, scene in zip(rows, latents):
            found += recalls_of(scene, world, seeds[row], codec)
    return found


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, n = 1.96, max(trials, 1)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(middle - half), float(middle + half)
