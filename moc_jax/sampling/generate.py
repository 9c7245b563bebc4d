"""Storyboards in, videos out: one compiled program per bucket, whatever the lengths of the shots in it.

The program is one call of the model, and the host goes from call to call: between two of them sampling can be stopped.
"""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moc_jax import models
from moc_jax.attention.api import routed_attention
from moc_jax.attention.kept import Kept
from moc_jax.codecs import Codec, pixels_from_unit
from moc_jax.compilation import built, kept_program
from moc_jax.config import BucketConfig, Config, ConfigError, MoCConfig
from moc_jax.diffusion.conditioning import Denoising, frames_of_shots, shot_noise, turn_constants, turn_solver
from moc_jax.diffusion.guidance import Scales, both, doubled, guided_velocity
from moc_jax.diffusion.process import VelocityFn, add_noise
from moc_jax.errors import Failure, explain_memory
from moc_jax.phases import Phases
from moc_jax.progress import Progress
from moc_jax.sampling.in_turn import Past, Turn
from moc_jax.sampling.picks import Picks, routing_shares
from moc_jax.sampling.placing import everywhere, on_mesh, over_scenes, split
from moc_jax.sampling.plan import moc_of_calls, spared
from moc_jax.sampling.refusal import CaptionFilter, check_captions
from moc_jax.sampling.room import planned, why_not
from moc_jax.sampling.scenes import Request, canvas_of, make_request, warn
from moc_jax.sampling.storyboard import Storyboard
from moc_jax.scene import VIDEO, ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int, UInt8
from moc_jax.sharding import Params, replicated
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


class Sampler:
    """Samples storyboards with any weights of one model: `Sampler(config, codec)(params, storyboards)`.

    Compiles once per bucket and number of storyboards. With a mesh in context (jax.set_mesh) all of its devices sample:
    as many scenes side by side as divide the batch and the mesh, and each scene over the devices that are left to it
    (`sharding.scene_mesh`). The weights stay as they lie, and every process gets all samples.
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
        caption_filter: CaptionFilter | None = None,
    ) -> None:
        """`config` says model, attention and sampling settings; `codec` is the one the model was trained with.

        Args:
            stop: checked between two calls of the model; what it raises ends the sampling.
            progress: shows how many calls of the model are done.
            phases: what was done before; after the first call it is shown how long that took.
            caption_filter: is shown every caption, and may say why it refuses one.

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
        self.canvas = canvas_of(config.data, codec, config.model, config.moc)
        # Captions and negative prompts come again and again, in a generation above all.
        self.encoder = build_text_encoder(config.text) if encoder is None else encoder
        self._encoder = functools.lru_cache(256)(self.encoder)
        self._graph = models.abstract(config.model)[0]
        self._attention = routed_attention(config.attention)
        self._progress, self._phases, self._refused = progress, phases, caption_filter
        self._stop = Signals() if stop is None else stop  # such signals never ask
        self._programs: dict[Hashable, jax.stages.Compiled] = {}
        self._plan = moc_of_calls(config.moc, config.sample)
        if config.sample.cache in ("on", "float8") and (wrong := why_not(config.sample, self._plan, config.model)):
            raise ConfigError(f"sample.cache is {config.sample.cache}: {wrong}; or choose auto or off")
        kinds = {moc: f"call {i + 1}" if i else "call" for i, moc in enumerate(dict.fromkeys(self._plan))}
        self._calls, self._moc = [kinds[moc] for moc in self._plan], {name: moc for moc, name in kinds.items()}
        self._jitted = {
            "begin": jax.jit(self._begin),
            **{name: jax.jit(functools.partial(self._call, moc), donate_argnums=5) for name, moc in self._moc.items()},
            "end": jax.jit(self._end),
            "remember": jax.jit(self._remember, donate_argnums=5),
        }
        self._route, self._shares, self._means = map(jax.jit, (self._routed, self._routing, self._featured))

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
            StoryboardError, SamplingError: see `latents`.
        """
        sampled = self.latents(params, storyboards, bucket=bucket)
        return [Sample(board, tuple(map(self.decoded, shots)), shots) for board, shots in zip(storyboards, sampled)]

    def text_tokens(self, caption: str) -> int:
        """Of a caption, as the model reads it; raises ValueError for one that is too long."""
        return len(self._encoder(caption))

    def decoded(self, latents: Float32[np.ndarray, "_ Y X Z"]) -> UInt8[np.ndarray, "F Y X 3"]:
        """The frames of a shot."""
        return pixels_from_unit(self.codec.decode(latents))

    @explain_memory("sampling", SamplingError, _remedies)
    def latents(
        self,
        params: Params,
        storyboards: Sequence[Storyboard],
        *,
        bucket: BucketConfig | None = None,
        turn: BucketConfig | None = None,
    ) -> list[tuple[Float32[np.ndarray, "_ Y X Z"], ...]]:
        """The latents of each storyboard's shots; arguments as above.

        `turn` is to the shots that are computed at a time, where finished ones are kept, what `bucket` is to scenes.

        Raises:
            StoryboardError: see `make_request`; or the filter refuses a caption.
            SamplingError: NaN or infinity in the latents.
        """
        if self._refused is not None:
            check_captions(storyboards, self._refused)
        request = make_request(storyboards, self.canvas, self.config.sample, self._encoder, bucket)
        warn(storyboards, request, self.config.data.buckets, self.config.sample.guidance)
        with over_scenes(len(storyboards)):
            latents = self._run(params, request, turn)
        found = []
        for board, video, frames in zip(storyboards, latents, request.lengths.shot_frames):
            shots = tuple(np.split(video, np.cumsum(frames))[: len(board.shots)])
            _check_finite(board, shots, params)
            found.append(shots)
        return found

    @explain_memory("sampling", SamplingError, _remedies)
    def features(
        self, params: Params, storyboard: Storyboard, *, t: float, bucket: BucketConfig | None = None
    ) -> Float32[np.ndarray, "2 depth S H D"]:
        """The mean query and the mean key of each shot's tokens, per layer, when the scene is shown at noise level `t`.

        What is not given is shown as the noise that sampling starts from.
        """
        request = make_request([storyboard], self.canvas, self.config.sample, self._encoder, bucket)
        with over_scenes(1):
            means = np.asarray(self._means(params, *on_mesh((request, np.float32(t)))))
        return np.moveaxis(means[:, 0, :, : len(storyboard.shots)], 1, 0)

    @explain_memory("sampling", SamplingError, _remedies)
    def routing(
        self, params: Params, sample: Sample, *, t: float = 0.5, bucket: BucketConfig | None = None
    ) -> Float[np.ndarray, "depth S S"]:
        """Which shots each shot's queries pick, per layer, when the sample is shown at noise level `t`.

        Entry (s, r): share of the picks of shot s, over its tokens and all heads, that lie in shot r; what is always
        attended (text, the self anchor) is not a pick. A row without picks is zero.

        Raises:
            ConfigError: the attention is dense, so nothing is picked.
        """
        with over_scenes(1):
            shares = np.asarray(self._shares(params, *on_mesh((self._of(sample, bucket), np.float32(t)))))[:, 0]
        return shares[:, : len(sample.latents), : len(sample.latents)]

    @explain_memory("sampling", SamplingError, _remedies)
    def picks(self, params: Params, sample: Sample, levels: Sequence[float]) -> Picks:
        """Which chunks each token picks when the sample is shown at these noise levels.

        Raises:
            ConfigError: the attention is dense, so nothing is picked.
        """
        request = self._of(sample)
        with over_scenes(1):
            seen = [jax.device_get(self._route(params, *on_mesh((request, np.float32(t))))) for t in levels]
        table = seen[0][1]
        frames, patch = int(request.lengths.shot_frames.sum()), self.config.model.patch
        rows, columns = self.canvas.latent_size
        is_video = table.kind[0] == VIDEO
        return Picks(
            levels=tuple(levels),
            routes=np.stack([routes[:, 0] for routes, _ in seen]),
            shot=np.where(is_video, table.shot[0], -1),
            start=np.where(is_video, table.start[0] - table.text_tokens, 0),
            length=np.where(is_video, table.length[0], 0),
            grid=(frames // patch[0], rows // patch[1], columns // patch[2]),
        )

    def _of(self, sample: Sample, bucket: BucketConfig | None = None) -> Request:
        """The sample as a request all of whose video is known."""
        if self.config.moc.mode == "dense":
            raise ConfigError("moc.mode is dense: nothing is routed, so there is no routing to picture")
        request = make_request([sample.storyboard], self.canvas, self.config.sample, self._encoder, bucket)
        video, frames = np.concatenate(sample.latents)[None], request.known.video.shape[1]
        video = cast(Array, np.pad(video, [(0, 0), (0, frames - video.shape[1]), *[(0, 0)] * 3]))
        return dataclasses.replace(request, known=dataclasses.replace(request.known, video=video))

    def _run(
        self, params: Params, request: Request, least: BucketConfig | None = None
    ) -> Float32[np.ndarray, "B F Y X Z"]:
        placed = on_mesh(request)
        noises, z_0, carried, turn = self._program("begin", placed)
        solver, shown, done = turn_solver(self.config.sample), self._progress and jax.process_index() == 0, 0
        if shown and (line := spared(self.config.moc, self.config.model, self._plan, request)):
            print(line, flush=True)
        cfg = self.config
        options = {"twice": not self._scales.off, "least": least}
        plan = planned(cfg.sample, self._plan, cfg.model, self._attention, np.asarray(turn), request, **options)
        rounds, kept = plan.rounds, plan.size.empty() if plan.size else None
        if shown and plan.line:
            print(plan.line, flush=True)
        calls, constants = solver.calls * sum(each.samples for each in rounds), turn_constants(cfg.sample)
        with Progress("sampling", total=calls, unit="step", enabled=shown) as progress:
            for each in rounds:
                past = None if kept is None else (each.turn, kept)
                for call, at in zip(self._calls, zip(*constants), strict=True) if each.samples else ():
                    self._stop.check()
                    carried = self._program(call, params, placed, noises, each.now, z_0, carried, at, past)
                    jax.block_until_ready(carried)
                    progress.reach(done := done + 1)
                    if self._phases is not None:
                        progress.say(f"the first step was done after {self._phases.total('step')}")
                        self._phases = None
                z_0, carried = self._program("end", placed, noises, each.now, z_0, carried)
                if kept is not None and each is not rounds[-1]:
                    self._stop.check()
                    kept = self._program("remember", params, placed, noises, z_0, each.turn, kept)
        return np.asarray(z_0)

    def _program(self, name: str, *args: Any) -> Any:
        """Calls one of the functions, compiled for such arguments."""
        leaves, tree = jax.tree.flatten(args)
        key = name, tree, tuple((np.shape(x), x.dtype, getattr(x, "sharding", None)) for x in leaves)
        if key not in self._programs:
            cfg, mesh = self.config, jax.sharding.get_mesh()
            self._done("weights and captions")
            moc = self._moc.get(name, cfg.moc)
            made_of = f"sample_{name.split()[0]}", cfg.model, moc, cfg.sample, self._attention, *key[1:]
            devices = jax.devices()[:1] if mesh.empty else list(mesh.devices.flat)
            build = functools.partial(built, mesh, self._jitted[name], *args)
            self._programs[key] = self._stop.unless_asked(functools.partial(kept_program, made_of, devices, build))
            self._done("compiling")
        return self._programs[key](*args)

    def _done(self, what: str) -> None:
        if self._phases is not None:
            self._phases.done(what)

    def _velocity(self, moc: MoCConfig, params: Params, r: Request, active: Array, past) -> VelocityFn:
        def model(video, text, t, lengths):
            network = nnx.merge(self._graph, params)
            if past is None:
                condition = None if r.condition is None else doubled(r.condition, len(video))
                more = {"attention": self._attention, "condition": condition, "active": doubled(active, len(video))}
                return network(video, text, t, lengths, moc, **more)
            return Past(*past).velocity(network, video, text, t, lengths, moc, self._attention)

        return guided_velocity(model, r.text, r.lengths, r.negative_text, r.negative_lengths, self._scales, active)

    @property
    def _scales(self) -> Scales:
        sample, boundary = self.config.sample, getattr(self.config.model, "boundary", 0.0)
        return Scales(scale=sample.guidance, low=sample.guidance_low, boundary=boundary)

    def _denoising(self, request: Request, noises: tuple[Array, Array]) -> Denoising:
        noise, history_noise = noises
        known, lengths = request.known, request.lengths
        return Denoising(noise=noise, history_noise=history_noise, known=known, lengths=lengths, cfg=self.config.sample)

    def _begin(self, request: Request) -> tuple[tuple[Array, Array], Array, tuple[Array, ...], Array]:
        """Both noises, what is given, where the solver starts, and each shot's turn."""
        noises = split(_noises(request))
        denoising = self._denoising(request, noises)
        carried = split(denoising.solver.start(noises[0]))
        return noises, everywhere(denoising.begin()), carried, everywhere(denoising.turn)

    def _call(
        self, moc: MoCConfig, params: Params, request: Request, noises, now, z_0, carried, at, past
    ) -> tuple[Array, ...]:
        denoising = self._denoising(request, noises)
        velocity = self._velocity(moc, params, request, denoising.turn == now, past)
        return split(denoising.call(velocity, now, z_0, carried, at))

    def _end(self, request: Request, noises, now, z_0, carried) -> tuple[Array, tuple[Array, ...]]:
        """Clean latents, and where the solver starts in the next turn."""
        denoising = self._denoising(request, noises)
        return everywhere(denoising.end(now, z_0, carried)), split(denoising.solver.start(noises[0]))

    def _remember(self, params: Params, request: Request, noises, z_0, turn: Turn, kept: Kept) -> Kept:
        """What is kept after a turn, whose shots are finished."""
        r, network = request, nnx.merge(self._graph, params)
        t = jnp.full(r.lengths.shot_frames.shape, self.config.sample.history_noise)
        given = add_noise(z_0, noises[1], t, r.lengths), r.text, t, r.lengths
        if not self._scales.off:
            given = both(given, (given[0], r.negative_text, t, r.negative_lengths))
        return Past(turn, kept).remember(network, *given, self._plan[0], self._attention)

    def _routing(self, params: Params, request: Request, t: Float[Array, ""]) -> Float[Array, "depth B S S"]:
        return everywhere(routing_shares(*self._routed(params, request, t), request.lengths.shot_frames.shape[1]))

    def _routed(
        self, params: Params, request: Request, t: Float[Array, ""]
    ) -> tuple[Int[Array, "depth B H V K"], ChunkTable]:
        """The picks of the video shown at noise level `t`."""
        levels = jnp.full(request.lengths.shot_frames.shape, t)
        z_t = add_noise(request.known.video, _noises(request)[0], levels, request.lengths)
        model = nnx.merge(self._graph, params)
        given = {"attention": self._attention, "condition": request.condition}
        seen = model.routed(z_t, request.text, levels, request.lengths, self.config.moc, **given)
        return everywhere(seen.routes), jax.tree.map(everywhere, seen.table)

    def _featured(self, params: Params, request: Request, t: Float[Array, ""]) -> Float32[Array, "depth B 2 S H D"]:
        levels = jnp.full(request.lengths.shot_frames.shape, t)
        noise, history = _noises(request)
        given = frames_of_shots(request.known.shots, request.lengths, noise.shape[1])
        z_t = jnp.where(given, add_noise(request.known.video, history, levels, request.lengths), noise)
        model = nnx.merge(self._graph, params)
        shown = {"attention": self._attention, "condition": request.condition}
        means = model.features(z_t, request.text, levels, request.lengths, self.config.moc, **shown)
        return everywhere(means)


def _noises(request: Request) -> tuple[Array, Array]:
    """Start noise and history noise: two streams of each shot's key."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)), in_axes=(0, None))

    def stream(number):
        keys = fold(jax.random.wrap_key_data(request.keys), number)
        return shot_noise(keys, request.lengths, request.known.video.shape[1:])

    start, history = jax.lax.map(stream, jnp.arange(2))  # a loop, so that the generator is compiled once
    return start, history


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
