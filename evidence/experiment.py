"""One arm, one seed: training with the reveals given, and the test that training prepares for.

In training, as in the test, a story's reveals are known but for a little noise (t = t_c), and all later shots share one
noise level. The loss counts the later shots alone. For films, which are made shot by shot, any number of first shots is
known, at a level that is drawn, too.
"""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from evidence.arms import Arm
from evidence.dataset import Dataset, MarkedScene
from evidence.probe import Probe, errors_of, per_shot, probe_of
from evidence.recolor import Recolorings, recolored
from evidence.stories import Stories
from moc_jax import models
from moc_jax.config import (
    DiffusionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from moc_jax.diffusion.conditioning import Denoising, Known
from moc_jax.diffusion.process import VelocityFn, add_noise, sample_timesteps
from moc_jax.phases import garbage_left
from moc_jax.scene import Scene
from moc_jax.shapes import Array, Bool, Float, Float32, Int, Key, typed
from moc_jax.sharding import Params, make_mesh, replicated
from moc_jax.training.state import TrainState, create_state, make_blueprint
from moc_jax.training.step import compiler_options, train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all arms have in common."""

    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig(t_mean=1.0)
    sample: SampleConfig = SampleConfig(solver="euler", schedule="wan-dpm++", steps=12, shift=1.0, history_noise=0.02)
    """How the later shots are sampled; `history_noise` is t_c in training too."""
    batch: int = 64
    warmup: int = 100
    """Updates over which the learning rate rises."""
    box_weight: float = 4.0
    """How much more a latent in a character's box counts in the loss than one outside."""
    in_turn: bool = False
    """Whether scenes are trained on with any number of first shots known, at `diffusion.history_noise`."""


@typed
def levels(
    key: Key[Array, ""], scene: Scene, reveals: int, task: Task
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """The noise levels of training, and which shots are known: one draw per scene for those that are not."""
    joint = dataclasses.replace(task.diffusion, joint_probability=1.0)
    t, known = sample_timesteps(key, scene.lengths, joint), _revealed(scene, reveals)
    history: Float[Array, "B 1"] | float = task.sample.history_noise
    if task.in_turn:
        count_key, level_key = jax.random.split(jax.random.fold_in(key, 1))
        low, high = task.diffusion.history_noise
        one = t.shape[0], 1
        known = jnp.arange(t.shape[1])[None] < jax.random.randint(count_key, one, reveals, t.shape[1])
        history = jax.random.uniform(level_key, one, minval=low, maxval=high)
    return jnp.where(known, history, t), known


def _revealed(scene: Scene, reveals: int) -> Bool[Array, "B S"]:
    shots = scene.lengths.shot_frames
    return jnp.broadcast_to(jnp.arange(shots.shape[1]) < reveals, shots.shape)


class Programs:
    """What is compiled for one arm of a task, once for all seeds, learning rates and weights."""

    def __init__(self, task: Task, arm: Arm, world: Stories):
        self.task, self.arm, self._world = task, arm, world
        self.mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        self._train = TrainConfig(ema_decay=0.99)  # lags by 100 updates, not by 1000
        self._optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=task.warmup)  # times a run's own rate
        self._blueprint = make_blueprint(task.model, self._optimizer, self._train, self.mesh)
        self._update = jax.jit(
            self._updated,
            donate_argnums=0,
            out_shardings=(self._blueprint.shardings, replicated(self.mesh)),
            compiler_options=compiler_options(self.mesh),
        )
        self._chosen, self._fresh = jax.jit(Dataset.scenes), jax.jit(self._initial)
        self._sample, self._probe = jax.jit(self._sampled), jax.jit(self._probed)
        self._ahead: dict[Callable[..., Any], tuple[Any, concurrent.futures.Future[jax.stages.Compiled]]] = {}

    def compile(
        self, data: Dataset, colors: Recolorings | None, *, fresh: bool = True, updates_alone: bool = False
    ) -> None:
        """Begins to compile all that training on such data, or data of such shapes, and testing take, beside what goes
        on; without `fresh`, what starts from given weights; with `updates_alone`, neither beginning nor tests."""
        key, one = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.float32)
        rows, count = jax.ShapeDtypeStruct((self.task.batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        scene, weights = jax.eval_shape(Dataset.scenes, data, rows), self.abstract_weights
        wanted = {
            self._fresh: (key,),
            self._update: (self._blueprint.abstract, data, colors, key, one, count),
            self._sample: (weights, scene, key),
            self._probe: (one, weights, scene, key),
        }
        traced = threading.Lock()  # what is needed first is not to wait for the others

        def build(function: jax.stages.Wrapped, args: tuple[Any, ...]) -> jax.stages.Compiled:
            with traced, jax.set_mesh(self.mesh), garbage_left():
                lowered = function.lower(*args)
            return lowered.compile()

        pool = concurrent.futures.ThreadPoolExecutor(len(wanted))
        for function, args in wanted.items():
            if function is self._update or not (updates_alone or (function is self._fresh and not fresh)):
                self._ahead[function] = _kinds(args), pool.submit(build, function, args)
        pool.shutdown(wait=False)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        """By the program that was compiled ahead, if it is for such arguments."""
        kinds, program = self._ahead.get(function, (None, None))
        with jax.set_mesh(self.mesh):
            return (program.result() if program and kinds == _kinds(args) else function)(*args)

    def state(self, seed: int, weights: Params | None = None) -> TrainState:
        """The state before the first update, with these weights or a seed's."""
        weights = self._call(self._fresh, jax.random.key(seed)) if weights is None else weights
        with jax.set_mesh(self.mesh):
            return create_state(self._blueprint, weights)

    @property
    def abstract_weights(self) -> Params:
        """A ShapeDtypeStruct in place of every weight."""
        return self._blueprint.abstract.params

    def update(
        self, state: TrainState, data: Dataset, colors: Recolorings | None, key: Key[Array, ""], rate: float, count: int
    ) -> tuple[TrainState, Float[Array, ""]]:
        """So many updates in one call, and their mean loss; takes the state's memory. With `colors`, stories are
        trained on in any of them."""
        return self._call(self._update, state, data, colors, key, jnp.float32(rate), jnp.int32(count))

    def sample(self, weights: Params, data: Dataset, key: Key[Array, ""]) -> Float[np.ndarray, "n F Y X Z"]:
        """All stories with the reveals given and the later shots sampled."""
        return np.concatenate(list(self._batches(self._sample, data, key, weights)))

    def probe(self, weights: Params, data: Dataset, level: float, key: Key[Array, ""]) -> Probe:
        """One call of the model with all later shots at one noise level."""
        found = list(self._batches(self._probe, data, key, jnp.float32(level), weights))
        return jax.tree.map(lambda *of: np.concatenate(of), *found)

    def _batches(self, of_scenes: Callable[..., Any], data: Dataset, key: Key[Array, ""], *first: Any) -> Iterator[Any]:
        """What a compiled function gives for one batch after another; the last one is filled up, then cut."""
        for begin in range(0, len(data.seeds), self.task.batch):
            rows = np.arange(begin, begin + self.task.batch).clip(max=len(data.seeds) - 1)
            with jax.set_mesh(self.mesh):
                scene = self._chosen(data, jnp.asarray(rows))
            found = self._call(of_scenes, *first, scene, jax.random.fold_in(key, begin))
            yield jax.tree.map(lambda x, real=len(data.seeds) - begin: np.asarray(x)[:real], found)

    def _initial(self, key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.state(models.build(self.task.model, rngs=nnx.Rngs(key)), nnx.Param))

    def _updated(
        self,
        state: TrainState,
        data: Dataset,
        colors: Recolorings | None,
        key: Key[Array, ""],
        rate: Float[Array, ""],
        count: Int[Array, ""],
    ) -> tuple[TrainState, Float[Array, ""]]:
        blueprint = dataclasses.replace(self._blueprint, optimizer=_scaled(self._blueprint.optimizer, rate))
        settings = self._train, self._optimizer, self.task.diffusion, blueprint
        step = train_step(*settings, self.arm.attention, self._loss)

        def one(_, carried):
            state, total = carried
            state, metrics = step(state, self._drawn(data, colors, key, state.step), self.arm.moc, key)
            return state, total + metrics.loss

        state, total = jax.lax.fori_loop(0, count, one, (state, jnp.zeros(())))
        return state, total / count

    def _drawn(
        self, data: Dataset, colors: Recolorings | None, key: Key[Array, ""], step: Int[Array, ""]
    ) -> MarkedScene:
        rows_key = jax.random.fold_in(key, 2**32 - 1)  # a number that no step has
        row_key, color_key = jax.random.split(jax.random.fold_in(rows_key, step))
        scene = data.scenes(jax.random.randint(row_key, (self.task.batch,), 0, len(data.seeds)))
        if colors is None:
            return scene
        which = jax.random.randint(color_key, (self.task.batch,), 0, len(colors.matrix))
        return recolored(scene, colors, which)

    def _loss(
        self, velocity_fn: VelocityFn, scene: Scene, key: Key[Array, ""], cfg: DiffusionConfig
    ) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
        assert isinstance(scene, MarkedScene)
        level_key, noise_key = jax.random.split(key)
        t, known = levels(level_key, scene, self._world.characters, self.task)
        errors = errors_of(velocity_fn, scene, noise_key, t)
        weights = jnp.where(scene.characters, self.task.box_weight, 1.0)
        of_shots = per_shot(errors, weights, scene)
        return jnp.where(known, 0, of_shots).sum() / (~known).sum(), of_shots

    def _sampled(self, params: Params, scene: Scene, key: Key[Array, ""]) -> Float[Array, "B F Y X Z"]:
        return self.sampled(params, scene, _revealed(scene, self._world.characters), key)

    def sampled(
        self, params: Params, scene: Scene, known: Bool[Array, "B S"], key: Key[Array, ""]
    ) -> Float[Array, "B F Y X Z"]:
        """The scenes with all shots but the known ones sampled, to be compiled."""
        noise, history_noise = jax.random.normal(key, (2, *scene.video.shape))
        denoising = Denoising(
            noise=noise,
            history_noise=history_noise,
            known=Known(scene.video, known, jnp.zeros_like(known)),
            lengths=scene.lengths,
            cfg=self.task.sample,
        )
        z_0, solver = denoising.begin(), denoising.solver
        model = nnx.merge(self._blueprint.graph, params)

        def velocity(z, t):
            return model(z, scene.text, t, scene.lengths, self.arm.moc, attention=self.arm.attention)

        def call(carried, at):
            return denoising.call(velocity, 0, z_0, carried, at), None

        carried, _ = jax.lax.scan(call, solver.start(noise), tuple(map(jnp.asarray, denoising.constants)))
        return denoising.end(0, z_0, carried)

    def features(
        self, params: Params, scene: Scene, level: Float[Array, ""], key: Key[Array, ""]
    ) -> Float32[Array, "2 B depth H D"]:
        """The mean query and the mean key of scenes of one shot at a noise level, to be compiled."""
        model = nnx.merge(self._blueprint.graph, params)
        t = jnp.broadcast_to(level, scene.lengths.shot_frames.shape)
        z = add_noise(scene.video, jax.random.normal(key, scene.video.shape), t, scene.lengths)
        shown = scene.text, t, scene.lengths, self.arm.moc
        return jnp.moveaxis(model.features(z, *shown, attention=self.arm.attention)[:, :, :, 0], (2, 1), (0, 1))

    def _probed(self, level: Float[Array, ""], params: Params, scene: MarkedScene, key: Key[Array, ""]) -> Probe:
        model, known = nnx.merge(self._blueprint.graph, params), _revealed(scene, self._world.characters)
        t = jnp.where(known, self.task.sample.history_noise, level)
        return probe_of(model, self.task.model.patch, self.arm, self._world.characters, scene, t, key)


def _scaled(
    optimizer: optax.GradientTransformationExtraArgs, rate: Float[Array, ""]
) -> optax.GradientTransformationExtraArgs:
    """One of learning rate 1 as one of this rate, which so is data."""

    def update(updates, state, params=None, **extra):
        updates, state = optimizer.update(updates, state, params, **extra)
        return jax.tree.map(lambda x: rate * x, updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _kinds(args: tuple[Any, ...]) -> tuple[Any, list[tuple[tuple[int, ...], Any]]]:
    """Of arguments, all that decides which program takes them."""
    leaves, structure = jax.tree.flatten(args)
    return structure, [(x.shape, x.dtype) for x in leaves]


class Trainer:
    """Trains one arm from one seed, or from `weights`, on `data`, in any of `colors`; `state` is where it stands."""

    def __init__(
        self,
        programs: Programs,
        data: Dataset,
        seed: int,
        rate: float,
        weights: Params | None = None,
        colors: Recolorings | None = None,
    ):
        self._programs, self.data, self._colors = programs, data, colors
        self._key, self._rate = jax.random.key(seed), rate
        self.state = programs.state(seed, weights)

    @property
    def weights(self) -> Params:
        """The averaged ones, which are tested."""
        return self.state.sampling_params

    def run(self, count: int, programs: Programs | None = None) -> float:
        """So many updates, by these programs or its own; their mean loss."""
        self.state, loss = (programs or self._programs).update(
            self.state, self.data, self._colors, self._key, self._rate, count
        )
        return float(loss)


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, n = 1.96, max(trials, 1)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(np.clip(middle - half, 0, share)), float(np.clip(middle + half, share, 1))
