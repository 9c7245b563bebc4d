"""One arm, one seed: training with the reveals given, and the test that training prepares for.

In training, as in the test, a story's reveals are known but for a little noise (t = t_c), and all later shots share one
noise level. The loss counts the later shots alone.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evidence.arms import Arm
from evidence.dataset import Dataset
from evidence.measures import candidates, dynamic_degree, identify, psnr
from evidence.world import World, boxes, render_shot
from moc_jax.codecs import Codec, pixels_from_unit, pixels_to_unit
from moc_jax.config import DiffusionConfig, MeshConfig, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from moc_jax.diffusion.conditioning import Denoising, Known
from moc_jax.diffusion.process import VelocityFn, flow_loss, sample_timesteps
from moc_jax.scene import Scene
from moc_jax.shapes import Array, Bool, Float, Int, Key, typed
from moc_jax.sharding import Params, make_mesh
from moc_jax.training.state import create_state, make_blueprint
from moc_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all arms have in common."""

    model: ModelConfig
    optimizer: OptimizerConfig
    diffusion: DiffusionConfig = DiffusionConfig(t_mean=1.0)
    sample: SampleConfig = SampleConfig(solver="euler", schedule="wan-dpm++", steps=12, shift=1.0, history_noise=0.02)
    """How the later shots are sampled; `history_noise` is t_c in training too."""
    updates: int
    batch: int = 64


@typed
def levels(key: Key[Array, ""], scene: Scene, reveals: int, task: Task) -> Float[Array, "B S"]:
    """The noise levels of training: t_c for the first shots, the reveals, and one draw per scene for the others."""
    joint = dataclasses.replace(task.diffusion, joint_probability=1.0)
    t = sample_timesteps(key, scene.lengths, joint)
    return jnp.where(_revealed(scene, reveals), task.sample.history_noise, t)


def _revealed(scene: Scene, reveals: int) -> Bool[Array, "B S"]:
    shots = scene.lengths.shot_frames
    return jnp.broadcast_to(jnp.arange(shots.shape[1]) < reveals, shots.shape)


class Trainer:
    """Trains one arm from one seed on `data`; `state` is where it stands."""

    def __init__(self, task: Task, arm: Arm, seed: int, data: Dataset):
        self._task, self._arm, self.data = task, arm, data
        self._mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        train = TrainConfig(seed=seed, steps=task.updates)
        blueprint = make_blueprint(task.model, task.optimizer, train, self._mesh)
        self._graph, self.state = blueprint.graph, create_state(blueprint)
        rows_key = jax.random.fold_in(jax.random.key(seed), task.updates)  # a number that no step has

        def scenes(data: Dataset, step: Int[Array, ""]) -> Scene:
            key = jax.random.fold_in(rows_key, step)
            return data.scenes(jax.random.randint(key, (task.batch,), 0, len(data.seeds)))

        self._scenes, self._sample = jax.jit(scenes), jax.jit(self._sampled)
        self._step = make_train_step(
            train, task.optimizer, task.diffusion, blueprint, self._mesh, arm.attention, self._loss
        )

    def run(self, count: int) -> Float[np.ndarray, " count"]:
        """So many updates; their losses."""
        losses = []
        with jax.set_mesh(self._mesh):
            for _ in range(count):
                scene = self._scenes(self.data, self.state.step)
                self.state, metrics = self._step(self.state, scene, self._arm.moc)
                losses.append(metrics.loss)
        return np.asarray(jax.device_get(losses))

    def sample(self, data: Dataset, rows: Int[Array, " B"], key: Key[Array, ""]) -> Float[np.ndarray, "B F Y X Z"]:
        """Stories with the reveals given and the later shots sampled, with the averaged weights."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self._sample(self.state.sampling_params, data, rows, key))

    def _loss(
        self, velocity_fn: VelocityFn, scene: Scene, key: Key[Array, ""], cfg: DiffusionConfig
    ) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
        level_key, noise_key = jax.random.split(key)
        reveals = self.data.world.characters
        t = levels(level_key, scene, reveals, self._task)
        _, per_shot = flow_loss(velocity_fn, scene, noise_key, cfg, t=t)
        return per_shot[:, reveals:].mean(), per_shot

    def _sampled(self, params: Params, data: Dataset, rows: Int[Array, " B"], key: Key[Array, ""]):
        scene, model = data.scenes(rows), nnx.merge(self._graph, params)
        revealed = _revealed(scene, data.world.characters)
        noise, history_noise = jax.random.normal(key, (2, *scene.video.shape))
        denoising = Denoising(
            noise=noise,
            history_noise=history_noise,
            known=Known(scene.video, revealed, jnp.zeros_like(revealed)),
            lengths=scene.lengths,
            cfg=self._task.sample,
        )
        z_0, solver = denoising.begin(), denoising.solver

        def velocity(z, t):
            return model(z, scene.text, t, scene.lengths, self._arm.moc, attention=self._arm.attention)

        def call(carried, at):
            return denoising.call(velocity, 0, z_0, carried, at), None

        carried, _ = jax.lax.scan(call, solver.start(noise), tuple(map(jnp.asarray, solver.constants)))
        return denoising.end(0, z_0, carried)


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


def evaluate(trainer: Trainer, data: Dataset, codec: Codec, batch: int = 64) -> list[Recall]:
    """Every recall of held-out stories.

    Raises:
        ValueError: they are of the split that was trained on.
    """
    if data.world.split == trainer.data.world.split:
        raise ValueError(f"stories of split {data.world.split} were trained on; give World(split=...) another one")
    found: list[Recall] = []
    for first in range(0, len(data.seeds), batch):
        rows = np.arange(first, min(first + batch, len(data.seeds)))
        latents = trainer.sample(data, jnp.asarray(rows), jax.random.key(first))
        for row, scene in zip(rows, latents):
            found += recalls_of(scene, data.world, data.seeds[row], codec)
    return found


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, n = 1.96, max(trials, 1)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(middle - half), float(middle + half)
