"""One arm, one seed: training with the reveals given, and the test that training prepares for.

In training, as in the test, a story's reveals are known but for a little noise (t = t_c), and all later shots share one
noise level. The loss counts the later shots alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evidence.arms import Arm
from evidence.dataset import Dataset, MarkedScene
from evidence.recolor import Recolorings, recolored
from moc_jax.config import DiffusionConfig, MeshConfig, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from moc_jax.diffusion.conditioning import Denoising, Known
from moc_jax.diffusion.process import VelocityFn, add_noise, sample_timesteps, shot_mask, velocity_target
from moc_jax.models.family import Routed
from moc_jax.models.patches import tokens_of
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
    box_weight: float = 4.0
    """How much more a latent in a character's box counts in the loss than one outside."""


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


@typed
def levels(key: Key[Array, ""], scene: Scene, reveals: int, task: Task) -> Float[Array, "B S"]:
    """The noise levels of training: t_c for the first shots, the reveals, and one draw per scene for the others."""
    joint = dataclasses.replace(task.diffusion, joint_probability=1.0)
    t = sample_timesteps(key, scene.lengths, joint)
    return jnp.where(_revealed(scene, reveals), task.sample.history_noise, t)


def _revealed(scene: Scene, reveals: int) -> Bool[Array, "B S"]:
    shots = scene.lengths.shot_frames
    return jnp.broadcast_to(jnp.arange(shots.shape[1]) < reveals, shots.shape)


def _errors(velocity_fn: VelocityFn, scene: Scene, key: Key[Array, ""], t: Array) -> Float[Array, "B F Y X"]:
    """The squared error of each latent's velocity."""
    noise = jax.random.normal(key, scene.video.shape)
    velocity = velocity_fn(add_noise(scene.video, noise, t, scene.lengths), t)
    return jnp.square(velocity - velocity_target(scene.video, noise)).mean(axis=-1)


def _per_shot(errors: Float[Array, "B F Y X"], weights: Array, scene: Scene) -> Float[Array, "B S"]:
    """Their weighted mean over each shot; 0 where no latent weighs anything."""
    mine = shot_mask(scene.lengths, errors.shape[1]).astype(errors.dtype)  # [B, S, F]
    total, weight = (jnp.einsum("bsf,bfyx->bs", mine, of) for of in (errors * weights, weights))
    return total / jnp.maximum(weight, 1e-9)


class Trainer:
    """Trains one arm from one seed on `data`; `state` is where it stands."""

    def __init__(self, task: Task, arm: Arm, seed: int, data: Dataset, colors: Recolorings | None = None):
        """With `colors`, stories are trained on in any of them."""
        self._task, self._arm, self.data = task, arm, data
        self._mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        train = TrainConfig(seed=seed, steps=task.updates, ema_decay=0.99)  # lags by 100 updates, not by 1000
        blueprint = make_blueprint(task.model, task.optimizer, train, self._mesh)
        self._graph, self.state = blueprint.graph, create_state(blueprint)
        rows_key = jax.random.fold_in(jax.random.key(seed), task.updates)  # a number that no step has

        def drawn(data: Dataset, step: Int[Array, ""]) -> MarkedScene:
            key, color_key = jax.random.split(jax.random.fold_in(rows_key, step))
            scene = data.scenes(jax.random.randint(key, (task.batch,), 0, len(data.seeds)))
            if colors is None:
                return scene
            return recolored(scene, colors, jax.random.randint(color_key, (task.batch,), 0, len(colors.matrix)))

        self._drawn, self._chosen = jax.jit(drawn), jax.jit(Dataset.scenes)
        self._sample, self._probe = jax.jit(self._sampled, static_argnums=0), jax.jit(self._probed)
        self._step = make_train_step(
            train, task.optimizer, task.diffusion, blueprint, self._mesh, arm.attention, self._loss
        )

    def run(self, count: int) -> Float[np.ndarray, " count"]:
        """So many updates; their losses."""
        losses = []
        with jax.set_mesh(self._mesh):
            for _ in range(count):
                scene = self._drawn(self.data, self.state.step)
                self.state, metrics = self._step(self.state, scene, self._arm.moc)
                losses.append(metrics.loss)
        return np.asarray(jax.device_get(losses))

    def sample(self, data: Dataset, key: Key[Array, ""], arm: Arm | None = None) -> Float[np.ndarray, "n F Y X Z"]:
        """All stories with the reveals given and the later shots sampled, with the averaged weights; with `arm` as if
        they were that one's."""
        of_arm = functools.partial(self._sample, self._arm if arm is None else arm)
        return np.concatenate(list(self._batches(of_arm, self.state.sampling_params, data, key)))

    def probe(self, data: Dataset, level: float, key: Key[Array, ""]) -> Probe:
        """One call of the model with all later shots at one noise level, with the averaged weights."""
        at_level = functools.partial(self._probe, jnp.float32(level))
        found = list(self._batches(at_level, self.state.sampling_params, data, key))
        return jax.tree.map(lambda *of: np.concatenate(of), *found)

    def warm_up(self, params: Params) -> None:
        """Compiles `sample` and `probe`; for a thread beside `run`, with weights of its own, as `run` takes the
        state's."""
        sample, probe = (functools.partial(*of) for of in ((self._sample, self._arm), (self._probe, jnp.float32(0.5))))
        for of_scenes in (sample, probe):
            next(self._batches(of_scenes, params, self.data, jax.random.key(0)))

    def _batches[T](
        self, of_scenes: Callable[[Params, MarkedScene, Array], T], params: Params, data: Dataset, key: Key[Array, ""]
    ) -> Iterator[T]:
        """What a compiled function gives for one batch after another; the last one is filled up, then cut."""
        for first in range(0, len(data.seeds), self._task.batch):
            rows = np.arange(first, first + self._task.batch).clip(max=len(data.seeds) - 1)
            with jax.set_mesh(self._mesh):
                scene = self._chosen(data, jnp.asarray(rows))
                found = of_scenes(params, scene, jax.random.fold_in(key, first))
            yield jax.tree.map(lambda x, real=len(data.seeds) - first: np.asarray(x)[:real], found)

    def _loss(
        self, velocity_fn: VelocityFn, scene: Scene, key: Key[Array, ""], cfg: DiffusionConfig
    ) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
        assert isinstance(scene, MarkedScene)
        level_key, noise_key = jax.random.split(key)
        reveals = self.data.world.characters
        errors = _errors(velocity_fn, scene, noise_key, levels(level_key, scene, reveals, self._task))
        weights = jnp.where(scene.characters, self._task.box_weight, 1.0)
        per_shot = _per_shot(errors, weights, scene)
        return per_shot[:, reveals:].mean(), per_shot

    def _sampled(self, arm: Arm, params: Params, scene: MarkedScene, key: Key[Array, ""]) -> Float[Array, "B F Y X Z"]:
        revealed = _revealed(scene, self.data.world.characters)
        noise, history_noise = jax.random.normal(key, (2, *scene.video.shape))
        denoising = Denoising(
            noise=noise,
            history_noise=history_noise,
            known=Known(scene.video, revealed, jnp.zeros_like(revealed)),
            lengths=scene.lengths,
            cfg=self._task.sample,
        )
        z_0, solver = denoising.begin(), denoising.solver
        model = nnx.merge(self._graph, params)

        def velocity(z, t):
            return model(z, scene.text, t, scene.lengths, arm.moc, attention=arm.attention)

        def call(carried, at):
            return denoising.call(velocity, 0, z_0, carried, at), None

        carried, _ = jax.lax.scan(call, solver.start(noise), tuple(map(jnp.asarray, solver.constants)))
        return denoising.end(0, z_0, carried)

    def _probed(self, level: Float[Array, ""], params: Params, scene: MarkedScene, key: Key[Array, ""]) -> Probe:
        model = nnx.merge(self._graph, params)
        found: list[Routed] = []

        def velocity(z, t):
            found.append(model.routed(z, scene.text, t, scene.lengths, self._arm.moc, attention=self._arm.attention))
            return found[0].velocity

        t = jnp.where(_revealed(scene, self.data.world.characters), self._task.sample.history_noise, level)
        errors = _errors(velocity, scene, key, t)
        return Probe(
            box_error=_per_shot(errors, scene.characters.astype(errors.dtype), scene),
            error=_per_shot(errors, jnp.ones_like(errors), scene),
            into_reveal=_into_reveal(found[0], scene, self._task.model.patch),
        )


def _into_reveal(routed: Routed, scene: MarkedScene, patch: tuple[int, int, int]) -> Float[Array, "B depth H S"]:
    """Of the picks of the tokens in each character's box, the share that lies in the shot that showed it."""
    table, text = routed.table, routed.table.text_tokens
    box = tokens_of(scene.characters[..., None].astype(jnp.float32), patch).any(axis=-1)  # [B, V]
    shot = table.token_shot[:, text:]
    wanted = jnp.take_along_axis(scene.reveals, jnp.maximum(shot, 0), axis=1)  # [B, V]
    picks = routed.routes  # [depth, B, H, V, K]
    read = jax.vmap(lambda shots, picks: shots[jnp.maximum(picks, 0)], in_axes=(0, 1), out_axes=1)(table.shot, picks)
    asks = (box & (wanted >= 0))[None, :, None, :, None] & (picks >= 0)
    right = asks & (read == wanted[None, :, None, :, None])
    of_shot = jax.nn.one_hot(shot, scene.reveals.shape[1])
    right, asks = (jnp.einsum("lbhvk,bvs->blhs", of.astype(jnp.float32), of_shot) for of in (right, asks))
    return right / asks  # NaN where nothing was picked


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, n = 1.96, max(trials, 1)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(middle - half), float(middle + half)
