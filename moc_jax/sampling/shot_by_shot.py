"""Samples a generation, shot by shot: what each is shown, and what becomes of it.

Each take is one scene of earlier shots, which are given at their noise level t_c, and of its own; whatever length the
video has, a scene holds no more than `sample.retrieve_shots` earlier ones. All scenes have one static shape, so one
program samples them all, in memory and time that don't grow.
"""

import concurrent.futures
import dataclasses
import functools
import heapq
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from moc_jax.config import BucketConfig
from moc_jax.data import write_video
from moc_jax.sampling.generate import Sample, Sampler
from moc_jax.sampling.generation import Done, Generation, Take, numbers
from moc_jax.sampling.provenance import provenance_of
from moc_jax.sampling.retrieval import chosen, mean_score
from moc_jax.sampling.storyboard import Shot, Storyboard
from moc_jax.shapes import Float32, UInt8
from moc_jax.sharding import Params

Frames = tuple[int, UInt8[np.ndarray, "F Y X 3"]]
"""A shot's number, from 0, and its frames."""


def sample_shots(
    generation: Generation,
    sampler: Sampler,
    params: Params,
    say: Callable[[str], None] = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Frames]:
    """Samples what isn't done yet, and yields each shot's frames when its files are there.

    A shot is decoded and written while the next one is sampled. What was done before is not sampled again, whatever
    became of the process; where its video is missing that is made.

    Args:
        generation: what is asked for.
        sampler: of the generation's config; its weights are `params`.
        say: is given a line for each shot.
        check: is called before anything is written; what it raises ends the work.

    Raises:
        StoryboardError, SamplingError, VideoError, GenerationError: see there; what is done stays.
        OSError: a shot can't be kept.
    """
    run = _Run(generation, sampler, params, check)
    takes = generation.takes()
    given = [take for take in takes if generation.shots[take.shots[0]].is_given]
    order = [*given, *(take for take in takes if take not in given)]  # what is given depends on nothing
    left = sum(not all(map(generation.is_done, take.shots)) for take in order)
    begun, sampled = time.monotonic(), 0
    with _Later() as later:
        for take in order:
            if not all(map(generation.is_done, take.shots)):
                read = run.sample(take)
                left, sampled = left - 1, sampled + 1
                each = (time.monotonic() - begun) / sampled
                shown = f"shown {numbers(read)}" if read else "shown no other"
                say(f"{numbers(take.shots)} of {len(generation.shots)}: {shown}; {_time(each * left)} left")
            for shot in take.shots:
                if run.lacks_video(shot):
                    yield from later.after(lambda shot=shot: run.write(shot))
        yield from later.rest()


class _Run:
    def __init__(self, generation: Generation, sampler: Sampler, params: Params, check: Callable[[], None]):
        self._generation, self._sampler, self._params, self._check = generation, sampler, params, check
        self._cfg = sampler.config.sample
        self._keys: dict[int, Float32[np.ndarray, "depth H D"]] = {}

    def sample(self, take: Take) -> list[int]:
        """Samples a take and keeps its shots; returns which it was shown."""
        shots = self._generation.shots
        if shots[take.shots[0]].is_given:
            read, board = list[int](), self._board(take, [])
            (latents,) = self._sampler.latents(self._params, [board])
        else:
            read = self._chosen(take)
            board, bucket = self._board(take, read), self._bucket
            (latents,) = self._sampler.latents(self._params, [board], bucket=bucket, turn=self._turn)
        shares = self._shares(board, latents, len(read))
        for number, own, of_shot in zip(take.shots, latents[len(read) :], shares, strict=True):
            keys = self._features(number, own, t=self._cfg.history_noise)[1]
            done = Done(latents=own, features=keys, read=np.asarray(read, np.int32), shares=of_shot)
            self._check()
            if jax.process_index() == 0:
                self._generation.file(number, "mp4").unlink(missing_ok=True)  # of a shot that was lost
                self._generation.keep(number, done)
            self._keys[number] = keys
        return read

    def lacks_video(self, shot: int) -> bool:
        """References are not shown."""
        return not self._generation.shots[shot].is_reference and not self._generation.file(shot, "mp4").exists()

    def write(self, shot: int) -> Frames:
        """Decodes a done shot and writes its video."""
        frames = self._sampler.decoded(self._latents(shot))
        generation, config = self._generation, self._sampler.config
        take = next(take for take in generation.takes() if shot in take.shots)
        board = self._board(take, self._done(shot).read.tolist())
        made = provenance_of(board, config.sample, config.moc, weights=generation.weights, step=generation.step)
        self._check()
        if jax.process_index() == 0:
            write_video(generation.file(shot, "mp4"), frames, config.data.fps, made)
        return shot, frames

    def _chosen(self, take: Take) -> list[int]:
        shots = self._generation.shots
        remember = {number - 1 for shot in take.shots for number in shots[shot].remember}
        forget = {number - 1 for shot in take.shots for number in shots[shot].forget}
        past, most = range(take.shots.start), self._cfg.retrieve_shots
        if shots[take.shots[0]].continues:
            remember.add(take.shots.start - 1)
        scores = dict.fromkeys(past, 0.0)
        if 0 < most < len(past):
            queries = [self._features(shot, None, t=self._query_level)[0] for shot in take.shots]
            scores = {shot: mean_score(queries, self._keys_of(shot)) for shot in past}
        return chosen(scores, most, remember=remember, forget=forget)

    @property
    def _query_level(self) -> float:
        """Pure noise; with two experts the noisiest that the other shots' expert reads, so that its keys compare."""
        boundary = getattr(self._sampler.config.model, "boundary", 0.0)
        return boundary * 0.999 if boundary else 1.0

    def _board(self, take: Take, read: list[int]) -> Storyboard:
        """The scene: what is shown, given by its latents, and then the take's own shots."""
        scene, before = list[Shot](), None
        for number in [*read, *take.shots]:
            shot = self._alone(number, self._latents(number) if number in read else None)
            goes_on = self._generation.shots[number].continues and before == number - 1
            scene.append(dataclasses.replace(shot, continues=goes_on))
            before = number
        return dataclasses.replace(take.board, shots=tuple(scene))

    def _alone(self, number: int, latents: Float32[np.ndarray, "F Y X Z"] | None) -> Shot:
        """A shot as a scene of its own has it, given by its latents where it has them."""
        shot, seed = self._generation.shots[number], self._seed(number)
        shot = dataclasses.replace(shot, seed=seed, continues=False, remember=(), forget=(), file="")
        return shot if latents is None else Shot(caption=shot.caption, seed=seed, latents=latents)

    def _seed(self, number: int) -> int:
        """Of a shot, wherever it is shown; another one each time that it is asked for."""
        shot, again = self._generation.shots[number], self._generation.take(number)
        if shot.seed is not None and again == 1:
            return shot.seed
        board = self._generation.board_of(number)
        base = self._cfg.seed if board.seed is None else board.seed
        entropy = [base if shot.seed is None else shot.seed, number, again]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _shares(self, board: Storyboard, latents: tuple[np.ndarray, ...], read: int) -> list[np.ndarray]:
        """Of each own shot's picks, those in each shot that it was shown."""
        own, moc = len(board.shots) - read, self._sampler.config.moc
        if not read or moc.mode == "dense" or not moc.top_k:
            return [np.zeros((0, 0), np.float32)] * own
        sample = Sample(board, (), latents)
        shares = self._sampler.routing(self._params, sample, bucket=self._bucket)
        return [shares[:, read + s, :read].astype(np.float32) for s in range(own)]

    def _features(
        self, number: int, latents: Float32[np.ndarray, "F Y X Z"] | None, t: float
    ) -> Float32[np.ndarray, "2 depth H D"]:
        shot = self._alone(number, latents)
        board = dataclasses.replace(self._generation.board_of(number), shots=(shot,))
        bucket = None if self._generation.shots[number].is_given else self._bucket_of_one
        return self._sampler.features(self._params, board, t=t, bucket=bucket)[:, :, 0]

    # ---------------------------------------------------------------------------------------- static shapes

    @functools.cached_property
    def _bucket(self) -> BucketConfig:
        """What holds every scene of the generation, as far as it is asked for."""
        takes = [take.shots for take in self._generation.takes()]
        frames = [self._frames(shot) for shot in range(takes[-1].stop)]
        shown, own = min(self._cfg.retrieve_shots or len(frames), len(frames) - 1), max(map(len, takes))
        most = sum(heapq.nlargest(shown, frames)) + max(sum(frames[s] for s in take) for take in takes)
        return self._with_text(shots=min(shown + own, len(frames)), frames=min(most, sum(frames)))

    @functools.cached_property
    def _turn(self) -> BucketConfig:
        """What holds every take of the generation."""
        takes = [take.shots for take in self._generation.takes()]
        frames = max(sum(map(self._frames, take)) for take in takes)
        return self._with_text(shots=max(map(len, takes)), frames=frames)

    @functools.cached_property
    def _bucket_of_one(self) -> BucketConfig:
        return self._with_text(shots=1, frames=max(map(self._frames, range(len(self._generation.shots)))))

    def _with_text(self, *, shots: int, frames: int) -> BucketConfig:
        boards, size = self._generation.boards, self._sampler.text_tokens
        prompts = {self._cfg.negative_prompt if b.negative_prompt is None else b.negative_prompt for b in boards}
        own = heapq.nlargest(shots, (size(shot.caption) for shot in self._generation.shots))
        texts = max(size(board.caption) for board in boards) + sum(own)
        return BucketConfig(shots=shots, frames=frames, text_tokens=max(texts, (1 + shots) * max(map(size, prompts))))

    def _frames(self, number: int) -> int:
        """Latent frames of a shot; what is given is done before it is asked for."""
        canvas, shot = self._sampler.canvas, self._generation.shots[number]
        if shot.is_given:
            return len(self._latents(number))
        return canvas.codec.latent_frames(canvas.frames(shot) or 1)

    # ---------------------------------------------------------------------------------------- what is done

    def _done(self, shot: int) -> Done:
        done = self._generation.done(shot)
        assert done is not None
        return done

    def _latents(self, shot: int) -> Float32[np.ndarray, "F Y X Z"]:
        return self._done(shot).latents

    def _keys_of(self, shot: int) -> Float32[np.ndarray, "depth H D"]:
        if shot not in self._keys:
            self._keys[shot] = self._done(shot).features
        return self._keys[shot]


class _Later:
    """Work that is done beside the sampling of the next shot, in order; a context manager.

    With several processes it is done at once: all of them must run the same programs in the same order.
    """

    def __enter__(self) -> "_Later":
        self._pool = concurrent.futures.ThreadPoolExecutor(1) if jax.process_count() == 1 else None
        self._waiting = list[concurrent.futures.Future[Frames]]()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def after(self, work: Callable[[], Frames]) -> Iterator[Frames]:
        """Begins it, once what was begun before is done, which is yielded."""
        if self._pool is None:
            yield work()
            return
        yield from self.rest()
        self._waiting.append(self._pool.submit(work))

    def rest(self) -> Iterator[Frames]:
        """What is still being done."""
        while self._waiting:
            yield self._waiting.pop(0).result()


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
