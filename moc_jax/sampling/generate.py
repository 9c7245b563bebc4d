"""Storyboards in, videos out: one compiled program per bucket, whatever the lengths of the shots in it.

The program is one call of the model, and the host goes from call to call: between two of them sampling can be stopped.
"""

import dataclasses
import functools
import warnings
from collections.abc import Hashable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from moc_jax import models
from moc_jax.attention.api import routed_attention
from moc_jax.codecs import Codec, pixels_from_unit
from moc_jax.compilation import built, kept_program
from moc_jax.config import BucketConfig, Config, ConfigError
from moc_jax.diffusion.conditioning import Denoising, shot_noise, turn_solver
from moc_jax.diffusion.guidance import guided_velocity
from moc_jax.diffusion.process import VelocityFn, add_noise
from moc_jax.errors import Failure, explain_memory
from moc_jax.phases import Phases
from moc_jax.progress import Progress
from moc_jax.sampling.scenes import Canvas, Request, make_request
from moc_jax.sampling.storyboard import Storyboard
from moc_jax.scene import VIDEO, ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int, Int32, UInt8, typed
from moc_jax.sharding import RULES, Params, batch_shards, replicated
from moc_jax.signals import Signals, Stop
from moc_jax.text import TextEncoder, build_text_encoder


class SamplingError(Failure):
    """Sampling gave something that is not a video: says what, of which storyboard, and what to try."""


def _remedies(sampler: "Sampler") -> str:
    cfg = sampler.config
    return (
        f"What would need less memory: fewer storyboards at a time; fewer shots or frames per storyboard; "
        f"sample.guidance 1 (now {cfg.sample.guidance:g}; more evaluates the model twice); "
        f"model.dtype bfloat16 (now {cfg.model.dtype}); dense attention off (moc.mode is {cfg.moc.mode})"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picks:
    """What each token of a sampled scene reads."""

    levels: tuple[float, ...]
    """Noise levels that the sample was shown at."""
    routes: Int[np.ndarray, "T depth H V K"]
    """Chunks; -1 where a slot is empty."""
    shot: Int32[np.ndarray, " C"]
    start: Int32[np.ndarray, " C"]
    """First token of each chunk in the video."""
    length: Int32[np.ndarray, " C"]
    """Tokens; 0 for captions and padding."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of tokens."""


class Sampler:
    """Samples storyboards with any weights of one model: `Sampler(config, codec)(params, storyboards)`.

    Compiles once per bucket and number of storyboards. With a mesh in context (jax.set_mesh) the batch is split over
    it where its size allows, the weights stay as they lie, and every process gets all samples.
    """

    def __init__(
        self,
        config: Config,
        codec: Codec,
        encoder: TextEncoder | None = None,
        stop: Stop | None = None,
        *,
        progress: bool = False,
        phases: Phases | None = None,
    ) -> None:
        """`config` says model, attention and sampling settings; `codec` is the one the model was trained with.

        Args:
            stop: checked between two calls of the model; what it raises ends the sampling.
            progress: shows how many calls of the model are done.
            phases: what was done before; after the first call it is shown how long that took.

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
        self._canvas = Canvas(config.data, codec, config.model.patch)
        self._encoder = build_text_encoder(config.text) if encoder is None else encoder
        self._graph = models.abstract(config.model)[0]
        self._attention = routed_attention(config.attention)
        self._progress, self._phases = progress, phases
        self._stop = Signals() if stop is None else stop  # such signals never ask
        self._programs: dict[Hashable, jax.stages.Compiled] = {}
        self._jitted = {
            "begin": jax.jit(self._begin),
            "call": jax.jit(self._call, donate_argnums=5),
            "end": jax.jit(self._end),
        }
        self._route, self._shares = jax.jit(self._routed), jax.jit(self._routing)

    @explain_memory("the weights", SamplingError, _remedies)
    def placed(self, params: Params) -> Params:
        """The weights, whole on each device of the mesh in context."""
        return jax.device_put(params, replicated(jax.sharding.get_mesh()))

    @explain_memory("sampling", SamplingError, _remedies)
    def __call__(
        self, params: Params, storyboards: Sequence[Storyboard], *, bucket: BucketConfig | None = None
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
        request = make_request(storyboards, self._canvas, self.config.sample, self._encoder, bucket)
        _warn(storyboards, request, self.config.data.buckets, self.config.sample.guidance)
        latents = self._run(params, request)
        samples = []
        for board, video, frames in zip(storyboards, latents, request.lengths.shot_frames):
            shots = tuple(np.split(video, np.cumsum(frames))[: len(board.shots)])
            _check_finite(board, shots, params)
            decoded = tuple(pixels_from_unit(self.codec.decode(shot)) for shot in shots)
            samples.append(Sample(board, decoded, shots))
        return samples

    @explain_memory("sampling", SamplingError, _remedies)
    def routing(self, params: Params, sample: Sample, *, t: float = 0.5) -> Float[np.ndarray, "depth S S"]:
        """Which shots each shot's queries pick, per layer, when the sample is shown at noise level `t`.

        Entry (s, r): share of the picks of shot s, over its tokens and all heads, that lie in shot r; what is always
        attended (text, the self anchor) is not a pick. A row without picks is zero.

        Raises:
            ConfigError: the attention is dense, so nothing is picked.
        """
        return np.asarray(self._shares(params, *_placed((self._of(sample), np.float32(t)))))[:, 0]

    @explain_memory("sampling", SamplingError, _remedies)
    def picks(self, params: Params, sample: Sample, levels: Sequence[float]) -> Picks:
        """Which chunks each token picks when the sample is shown at these noise levels.

        Raises:
            ConfigError: the attention is dense, so nothing is picked.
        """
        request = self._of(sample)
        seen = [jax.device_get(self._route(params, *_placed((request, np.float32(t))))) for t in levels]
        table = seen[0][1]
        frames, patch = int(request.lengths.shot_frames.sum()), self.config.model.patch
        rows, columns = self._canvas.latent_size
        is_video = table.kind[0] == VIDEO
        return Picks(
            levels=tuple(levels),
            routes=np.stack([routes[:, 0] for routes, _ in seen]),
            shot=np.where(is_video, table.shot[0], -1),
            start=np.where(is_video, table.start[0] - table.text_tokens, 0),
            length=np.where(is_video, table.length[0], 0),
            grid=(frames // patch[0], rows // patch[1], columns // patch[2]),
        )

    def _of(self, sample: Sample) -> Request:
        """The sample as a request all of whose video is known."""
        if self.config.moc.mode == "dense":
            raise ConfigError("moc.mode is dense: nothing is routed, so there is no routing to picture")
        request = make_request([sample.storyboard], self._canvas, self.config.sample, self._encoder)
        video = cast(Array, np.concatenate(sample.latents)[None])
        return dataclasses.replace(request, known=dataclasses.replace(request.known, video=video))

    def _run(self, params: Params, request: Request) -> Float32[np.ndarray, "B F Y X Z"]:
        placed = _placed(request)
        noises, z_0, carried, turn = self._program("begin", placed)
        solver, rounds = turn_solver(self.config.sample), int(np.max(turn)) + 1
        shown, done = self._progress and jax.process_index() == 0, 0
        with Progress("sampling", total=rounds * solver.calls, unit="step", enabled=shown) as progress:
            for now in map(np.int32, range(rounds)):
                for at in zip(*solver.constants):
                    self._stop.check()
                    carried = self._program("call", params, placed, noises, now, z_0, carried, at)
                    jax.block_until_ready(carried)
                    progress.reach(done := done + 1)
                    if self._phases is not None:
                        progress.say(f"the first step was done after {self._phases.total('step')}")
                        self._phases = None
                z_0, carried = self._program("end", placed, noises, now, z_0, carried)
        return np.asarray(z_0)

    def _program(self, name: str, *args: Any) -> Any:
        """Calls one of the three functions, compiled for such arguments."""
        leaves, tree = jax.tree.flatten(args)
        key = name, tree, tuple((np.shape(x), x.dtype, getattr(x, "sharding", None)) for x in leaves)
        if key not in self._programs:
            cfg, mesh = self.config, jax.sharding.get_mesh()
            self._done("weights and captions")
            made_of = f"sample_{name}", cfg.model, cfg.moc, cfg.sample, self._attention, *key[1:]
            devices = jax.devices()[:1] if mesh.empty else list(mesh.devices.flat)
            build = functools.partial(built, mesh, self._jitted[name], *args)
            self._programs[key] = self._stop.unless_asked(functools.partial(kept_program, made_of, devices, build))
            self._done("compiling")
        return self._programs[key](*args)

    def _done(self, what: str) -> None:
        if self._phases is not None:
            self._phases.done(what)

    def _velocity(self, params: Params, request: Request) -> VelocityFn:
        def model(video, text, t, lengths):
            return nnx.merge(self._graph, params)(video, text, t, lengths, self.config.moc, attention=self._attention)

        r, scale = request, self.config.sample.guidance
        return guided_velocity(model, r.text, r.lengths, r.negative_text, r.negative_lengths, scale)

    def _denoising(self, request: Request, noises: tuple[Array, Array]) -> Denoising:
        noise, history_noise = noises
        known, lengths = request.known, request.lengths
        return Denoising(noise=noise, history_noise=history_noise, known=known, lengths=lengths, cfg=self.config.sample)

    def _begin(self, request: Request) -> tuple[tuple[Array, Array], Array, tuple[Array, ...], Array]:
        """Both noises, what is given, where the solver starts, and each shot's turn."""
        noises = _split(_noises(request))
        denoising = self._denoising(request, noises)
        carried = _split(denoising.solver.start(noises[0]))
        return noises, _everywhere(denoising.begin()), carried, _everywhere(denoising.turn)

    def _call(self, params: Params, request: Request, noises, now, z_0, carried, at) -> tuple[Array, ...]:
        denoising = self._denoising(request, noises)
        return _split(denoising.call(self._velocity(params, request), now, z_0, carried, at))

    def _end(self, request: Request, noises, now, z_0, carried) -> tuple[Array, tuple[Array, ...]]:
        """Clean latents, and where the solver starts in the next turn."""
        denoising = self._denoising(request, noises)
        return _everywhere(denoising.end(now, z_0, carried)), _split(denoising.solver.start(noises[0]))

    def _routing(self, params: Params, request: Request, t: Float[Array, ""]) -> Float[Array, "depth B S S"]:
        return _everywhere(routing_shares(*self._routed(params, request, t), request.lengths.shot_frames.shape[1]))

    def _routed(
        self, params: Params, request: Request, t: Float[Array, ""]
    ) -> tuple[Int[Array, "depth B H V K"], ChunkTable]:
        """The picks of the video shown at noise level `t`."""
        levels = jnp.full(request.lengths.shot_frames.shape, t)
        z_t = add_noise(request.known.video, _noises(request)[0], levels, request.lengths)
        model = nnx.merge(self._graph, params)
        seen = model.routed(z_t, request.text, levels, request.lengths, self.config.moc, attention=self._attention)
        return _everywhere(seen.routes), jax.tree.map(_everywhere, seen.table)


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


def _warn(
    storyboards: Sequence[Storyboard], request: Request, trained: Sequence[BucketConfig], guidance: float
) -> None:
    """Warns of what will work, but not as hoped."""
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
        if board.negative_prompt and guidance == 1:
            warnings.warn(f"{board.name}: negative_prompt has no effect at guidance 1; raise it", stacklevel=3)


def _check_finite(board: Storyboard, shots: Sequence[np.ndarray], params: Params) -> None:
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


def _placed[T](tree: T) -> T:
    """Puts numpy leaves on the mesh in context, the batch split over it where its size allows."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree

    def put(leaf):
        leaf = np.asarray(leaf)
        sharding = jax.NamedSharding(mesh, _spec(leaf.shape, mesh))
        return jax.make_array_from_callback(leaf.shape, sharding, functools.partial(np.ndarray.__getitem__, leaf))

    return jax.tree.map(put, tree)


def _split[T](tree: T) -> T:
    """Keeps the batch split over the mesh in context, where its size allows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _spec(x.shape, mesh)), tree)


def _spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> jax.P:
    return RULES.spec("batch") if shape and shape[0] % batch_shards(mesh) == 0 else jax.P()


def _everywhere(x: Array) -> Array:
    """Every device holds the whole result, so that each process can read it."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, jax.P())
