"""Storyboards in, videos out: one compiled program per bucket, whatever the lengths of the shots in it."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from moc_jax.codecs import Codec, pixels_from_unit
from moc_jax.config import BucketConfig, Config, ConfigError
from moc_jax.diffusion.conditioning import sample_scene, shot_noise, turns
from moc_jax.diffusion.guidance import guided_velocity
from moc_jax.diffusion.process import VelocityFn, add_noise
from moc_jax.errors import explain_memory
from moc_jax.models.mmdit import abstract_model
from moc_jax.sampling.scenes import Request, make_request
from moc_jax.sampling.storyboard import Storyboard
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int, UInt8, typed
from moc_jax.sharding import RULES, batch_shards
from moc_jax.text import TextEncoder, build_text_encoder


class SamplingError(RuntimeError):
    """Sampling gave something that is no video: says what, of which storyboard, and what to try."""


def _remedies(sampler: "Sampler") -> str:
    cfg = sampler.config
    return (
        f"What needs less: fewer storyboards at a time; fewer shots or frames per storyboard; sample.guidance 1 (now "
        f"{cfg.sample.guidance:g}; more evaluates the model twice); model.dtype bfloat16 (now {cfg.model.dtype}); "
        f"dense attention off (moc.mode is {cfg.moc.mode})"
    )


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sampled scene."""

    storyboard: Storyboard
    shots: tuple[UInt8[np.ndarray, "_ Y X 3"], ...]  # the frames of each, given and reference shots included
    latents: tuple[Float32[np.ndarray, "_ Y X Z"], ...]

    @property
    def video(self) -> UInt8[np.ndarray, "F Y X 3"]:
        """All shots but reference pictures, one after another."""
        return np.concatenate([f for f, shot in zip(self.shots, self.storyboard.shots) if not shot.is_reference])


class Sampler:
    """Samples storyboards with any weights of one model: `Sampler(config, codec)(params, storyboards)`.

    Compiles once per bucket and number of storyboards. With a mesh in context (jax.set_mesh) the batch is split over
    it where its size allows, the weights stay as they lie, and every process gets all samples.
    """

    def __init__(
        self, config: Config, codec: Codec, encoder: TextEncoder | None = None, *, progress: bool = False
    ) -> None:
        """`config` says model, attention and sampling settings; `codec` is the one the model was trained with.

        Raises:
            ConfigError: the codec's latents are not the model's.
        """
        theirs, ours = (*codec.stride, codec.channels), (*config.codec.stride, config.model.latent_channels)
        if theirs != ours:
            raise ConfigError(
                f"the codec has stride {theirs[:3]} and {theirs[3]} channels, but the model was trained for stride "
                f"{ours[:3]} and {ours[3]} channels; sample with the codec of the model's own checkpoint"
            )
        self.config, self.codec = config, codec
        self._encoder = build_text_encoder(config.text) if encoder is None else encoder
        self._graph = abstract_model(config.model)[0]
        self._progress = progress
        self._bar: tqdm | None = None
        self._sample = jax.jit(self._sample_latents)
        self._route = jax.jit(self._routing)

    @explain_memory("sampling", SamplingError, _remedies)
    def __call__(
        self, params: Any, storyboards: Sequence[Storyboard], *, bucket: BucketConfig | None = None
    ) -> list[Sample]:
        """Samples all storyboards as one batch; each comes out as it would alone.

        Args:
            params: the weights, as a checkpoint or the training state holds them.
            storyboards: at least one.
            bucket: static shape to pad to; None takes the smallest.

        Raises:
            StoryboardError: see `make_request`.
            SamplingError: NaN or infinity in the latents.
        """
        request = make_request(storyboards, self.config, self.codec, self._encoder, bucket)
        _warn(storyboards, request, self.config)
        latents = self._run(params, request)
        samples = []
        for board, video, frames in zip(storyboards, latents, request.lengths.shot_frames):
            shots = tuple(np.split(video, np.cumsum(frames))[: len(board.shots)])
            _check_finite(board, shots, params)
            decoded = tuple(pixels_from_unit(self.codec.decode(shot)) for shot in shots)
            samples.append(Sample(board, decoded, shots))
        return samples

    @explain_memory("sampling", SamplingError, _remedies)
    def routing(self, params: Any, sample: Sample, *, t: float = 0.5) -> Float[np.ndarray, "depth S S"]:
        """Which shots each shot's queries pick, per layer, when the sample is shown at noise level `t`.

        Entry (s, r): share of the picks of shot s, over its tokens and all heads, that lie in shot r; what is always
        attended (text, the self anchor) is no pick. A row without picks is zero.

        Raises:
            ConfigError: the attention is dense, so nothing is picked.
        """
        if self.config.moc.mode == "dense":
            raise ConfigError("moc.mode is dense: nothing is routed, so there is no routing to picture")
        request = make_request([sample.storyboard], self.config, self.codec, self._encoder)
        whole: Any = np.concatenate(sample.latents)[None]
        request = dataclasses.replace(request, known=dataclasses.replace(request.known, video=whole))
        return np.asarray(self._route(params, *_placed((request, np.float32(t)))))[:, 0]

    def _run(self, params: Any, request: Request) -> Float32[np.ndarray, "B F Y X Z"]:
        cfg = self.config.sample
        if self._progress and jax.process_index() == 0:
            wanted = turns(jnp.asarray(request.known.shots), jax.tree.map(jnp.asarray, request.lengths), cfg.order)
            calls = 2 * cfg.steps - 1 if cfg.solver == "heun" else cfg.steps
            self._bar = tqdm(total=(int(wanted.max()) + 1) * calls, desc="sampling", unit="step")
        try:
            latents = np.asarray(self._sample(params, _placed(request)))
            jax.effects_barrier()
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
        return latents

    def _tick(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def _velocity(self, params: Any, request: Request) -> VelocityFn:
        def model(video, text, t, lengths):
            return nnx.merge(self._graph, params)(video, text, t, lengths, self.config.moc)

        r, scale = request, self.config.sample.guidance
        velocity_fn = guided_velocity(model, r.text, r.lengths, r.negative_text, r.negative_lengths, scale)

        def velocity(z, t):
            if self._progress:
                jax.debug.callback(self._tick)
            return velocity_fn(z, t)

        return velocity

    def _sample_latents(self, params: Any, request: Request) -> Float[Array, "B F Y X Z"]:
        noise, history_noise = _noises(request)
        velocity = self._velocity(params, request)
        z_0 = sample_scene(velocity, noise, history_noise, request.known, request.lengths, self.config.sample)
        return _everywhere(z_0)

    def _routing(self, params: Any, request: Request, t: Float[Array, ""]) -> Float[Array, "depth B S S"]:
        levels = jnp.full(request.lengths.shot_frames.shape, t)
        z_t = add_noise(request.known.video, _noises(request)[0], levels, request.lengths)
        model = nnx.merge(self._graph, params)
        _, routes, table = model(z_t, request.text, levels, request.lengths, self.config.moc, with_routes=True)
        return _everywhere(routing_shares(routes, table, levels.shape[1]))


@typed
def routing_shares(
    routes: Int[Array, "depth B H V K"], table: ChunkTable, shots: int
) -> Float[Array, "depth B {shots} {shots}"]:
    """Share of the picks of each shot's tokens that lie in each shot; see `Sampler.routing`."""

    def count(routes, chunk_shot, query_shot):  # [H, V, K], [C], [V]
        picked = jnp.where(routes >= 0, chunk_shot[jnp.maximum(routes, 0)], -1)
        row = jnp.broadcast_to(query_shot[None, :, None], routes.shape)
        counted = (picked >= 0) & (row >= 0)
        return jnp.zeros((shots, shots)).at[jnp.where(counted, row, shots), picked].add(1, mode="drop")

    of_batch = jax.vmap(count, in_axes=(0, 0, 0))
    counts = jax.vmap(of_batch, in_axes=(0, None, None))(routes, table.shot, table.token_shot[:, table.text_tokens :])
    return counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)


def _noises(request: Request) -> tuple[Array, Array]:
    """Start noise and history noise: two streams of each shot's key."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)), in_axes=(0, None))

    def stream(number):
        keys = fold(jax.random.wrap_key_data(request.keys), number)
        return shot_noise(keys, request.lengths, request.known.video.shape[1:])

    start, history = jax.lax.map(stream, jnp.arange(2))  # a loop, so that the generator is compiled once
    return start, history


def _warn(storyboards: Sequence[Storyboard], request: Request, config: Config) -> None:
    """Warns of what will work, but not as hoped."""
    trained = config.data.buckets
    for board, frames in zip(storyboards, request.lengths.shot_frames):
        for what, count, most in (
            ("latent frames", int(frames.sum()), max((b.frames for b in trained), default=0)),
            ("shots", len(board.shots), max((b.shots for b in trained), default=0)),
        ):
            if trained and count > most:
                warnings.warn(
                    f"{board.name} has {count} {what}, more than the {most} of the longest training scene; expect it "
                    "to drift or to repeat itself",
                    stacklevel=3,
                )
        if board.negative_prompt and config.sample.guidance == 1:
            warnings.warn(f"{board.name}: negative_prompt has no effect at guidance 1; raise it", stacklevel=3)


def _check_finite(board: Storyboard, shots: Sequence[np.ndarray], params: Any) -> None:
    bad = [s for s, latents in enumerate(shots) if not np.isfinite(latents).all()]
    if not bad:
        return
    broken = not all(bool(jnp.isfinite(w).all()) for w in jax.tree.leaves(params))
    cause = (
        "the weights themselves do; sample from an earlier checkpoint"
        if broken
        else "the weights do not; try model.dtype float32, less guidance or more steps"
    )
    raise SamplingError(
        f"{board.name}: the sample holds NaN or infinity in {', '.join(f'shots[{s}]' for s in bad)}: {cause}"
    )


def _placed(tree: Any) -> Any:
    """Puts numpy leaves on the mesh in context, the batch split over it where its size allows."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree

    def put(leaf):
        leaf = np.asarray(leaf)
        splits = leaf.ndim > 0 and leaf.shape[0] % batch_shards(mesh) == 0
        sharding = jax.NamedSharding(mesh, RULES.spec("batch") if splits else jax.P())
        return jax.make_array_from_callback(leaf.shape, sharding, functools.partial(np.ndarray.__getitem__, leaf))

    return jax.tree.map(put, tree)


def _everywhere(x: Array) -> Array:
    """Every device holds the whole result, so that each process can read it."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, jax.P())
