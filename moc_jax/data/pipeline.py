"""Encoded scenes -> batches, by Grain: read, augment, pack, stack; ahead of the step, in a thread or in processes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import grain
import jax
import numpy as np
from absl import flags

from moc_jax.config import BucketConfig, Config, TrainConfig
from moc_jax.data.buckets import Buckets, assign_buckets
from moc_jax.data.caption_store import CaptionStore, open_captions
from moc_jax.data.check import Check
from moc_jax.data.copies import Ahead, address_of
from moc_jax.data.manifest import OTHER_DATA, DataError, Manifest, SceneEntry, shard_here
from moc_jax.data.pack import blank_scene, condition_of, own_texts, pack_scene, stack_scenes
from moc_jax.data.plan import Batch, TrainPlan, ValidationPlan, augmentation
from moc_jax.data.shards import ShardReader
from moc_jax.data.sources import Split
from moc_jax.scene import Scene

_AHEAD = 2  # batches read ahead, per worker
_FETCHED, _FETCHING = 32, 8  # batches whose shards are fetched from a bucket ahead, and shards at once


def make_pipeline(
    cfg: Config,
    manifest: Manifest,
    *,
    split: Split,
    rows: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    verified: bool = True,
) -> "SceneIterator":
    """This process's share of every batch, as scenes with numpy leaves.

    All processes together see what one would, in the same order, and all are in the same bucket at each step.

    Training never ends, and applies caption dropout and image conditioning. Validation shows each held-out scene once,
    as it is; rows left over in a bucket's last batch are blank: no shots, no captions.

    Args:
        rows: Those of each global batch of `train.batch_size` scenes that this process reads, as `sharding.own_rows`
            tells; None: all.
        process_index: Which of `process_count` shares of the data's digests this process compares.
        verified: With `data.verify full`, False leaves it to the caller to call `SceneIterator.verify` before the first
            batch.

    Raises:
        ConfigError: a bucket or caption does not fit.
        DataError: no scene is left in the split, or a shard of it is damaged.
    """
    captions = open_captions(manifest, cfg.text)
    buckets = assign_buckets(cfg, manifest, captions.lengths, split)
    used = np.unique(np.concatenate([scenes.column("shard") for scenes in buckets.scenes])).tolist()
    lazy, new = cfg.data.verify == "lazy", cfg.train.allow_new_data
    copied = bool(address_of(manifest.folder))
    # Together the processes read all; what is fetched from a bucket is compared then.
    left = [] if manifest.compared or (lazy and copied) else used[process_index::process_count]
    sizes = tuple(map(len, buckets.scenes))
    mine = tuple(range(cfg.train.batch_size) if rows is None else rows)
    if split == "train":
        plan = TrainPlan(sizes, cfg.train.batch_size, cfg.train.seed)
        load = _Augmented(manifest, captions.store, buckets, mine, cfg)
    else:
        plan = ValidationPlan(sizes, cfg.train.batch_size)
        load = _Load(manifest, captions.store, buckets, mine, cfg)
    identity = _identity(cfg.train, buckets, manifest.fingerprint)
    check = Check(manifest, left)
    scenes = SceneIterator(plan, load, buckets, cfg.data.workers, identity, check, lazy=lazy, allow_new=new)
    if copied:
        scenes.fetch_ahead(manifest, mine)
    if verified:
        scenes.verify()
    return scenes


class SceneIterator(grain.DatasetIterator):
    """Iterates over batches. Its whole state is the number of the next one, so resuming is exact with any workers.

    A run that took other data at batch number `begun` counts on: batch n is the plan's batch n - begun.
    """

    _reading: grain.DatasetIterator | None = None  # on the class: Grain closes iterators that were never built, too

    def __init__(
        self,
        plan: TrainPlan | ValidationPlan,
        load: Callable[[Batch], Scene],
        buckets: Buckets,
        workers: int,
        identity: dict[str, object],
        check: Check,
        *,
        lazy: bool,
        allow_new: bool,
    ):
        """`check`: of this process's part of the data; `lazy`: in the background, while batches are read; `allow_new`:
        take up the position in other data as the beginning of this."""
        super().__init__()
        self.buckets, self._check, self._lazy = buckets, check, lazy
        self._plan, self._batches = plan, grain.MapDataset.source(plan).map(load)
        self._workers, self._identity = workers, identity
        self._allow_new = allow_new
        self._ahead: Ahead[int] | None = None
        self._shards: Callable[[int], list[int]] = lambda _: []
        self._step = self.begun = 0

    def fetch_ahead(self, manifest: Manifest, rows: Sequence[int]) -> None:
        """From now on the shards of these rows of the next batches are fetched while earlier ones are read."""
        self._ahead = Ahead(functools.partial(shard_here, manifest), _FETCHING)

        def shards(number: int) -> list[int]:
            batch = self._plan[number]
            scenes, column = [batch.scenes[row] for row in rows], self.buckets.scenes[batch.bucket].column("shard")
            return [int(column[scene]) for scene in scenes if scene is not None]

        self._shards = functools.lru_cache(2 * _FETCHED)(shards)

    def _fetch(self, number: int) -> None:
        if self._ahead is not None:
            window = range(number, min(number + _FETCHED, len(self._plan)))
            self._ahead.want(shard for batch in window for shard in self._shards(batch))

    def verify(self) -> None:
        """Unless it is done in the background: raises DataError where this process's part of the data is damaged."""
        if not self._lazy:
            self._check.now()

    def __next__(self) -> Scene:
        if self._lazy:
            self._check.in_background()
        self._fetch(self._step - self.begun)
        if self._reading is None:
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
            ahead = self._batches[self._step - self.begun :].to_iter_dataset(options)
            if self._workers:
                if not flags.FLAGS.is_parsed():  # Grain asks absl's flags, which our command line does not use
                    flags.FLAGS.mark_as_parsed()
                ahead = ahead.mp_prefetch(
                    grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=_AHEAD)
                )
            self._reading = iter(ahead)
        scene = next(self._reading)
        self._step += 1
        # Workers hand over shared memory, which the process would still hold, and complain about, when it ends.
        return jax.tree.map(np.array, scene) if self._workers else scene

    def buckets_between(self, begin: int, end: int) -> list[BucketConfig]:
        """The buckets that batches [begin, end) are of, in the order of their first use."""
        there, found = sum(map(bool, self.buckets.scenes)), dict[int, None]()
        for number in range(begin - self.begun, min(end - self.begun, len(self._plan))):
            found[self._plan[number].bucket] = None
            if len(found) == there:
                break
        return [self.buckets.shapes[bucket] for bucket in found]

    def get_state(self) -> dict[str, object]:
        """The next batch's number, and what it is a number of."""
        return {"step": self._step, "begun": self.begun, **self._identity}

    def set_state(self, state: dict[str, object]) -> None:
        """Resumes from a saved state.

        Raises:
            DataError: the state was taken from other data, batch size, seed or buckets; names what differs.
        """
        new = state.get("data") != self._identity["data"]
        taken = {"data", "buckets"} if new and self._allow_new else set[str]()
        for key, value in self._identity.items():
            if state.get(key) != value and key not in taken:
                fix = OTHER_DATA if key == "data" else "resume with the same settings, or give another --workdir"
                raise DataError(
                    f"the saved data position belongs to {key} = {state.get(key)!r}, but this run has {value!r}; {fix}"
                )
        step, begun = state.get("step"), state.get("begun", 0)
        if type(step) is not int or type(begun) is not int or not 0 <= begun <= step:
            raise DataError(f"the saved data position is {step!r}, from {begun!r} on; it must be a batch's number")
        self.close()
        self._step, self.begun = step, step if taken else begun

    def close(self) -> None:
        """Stops reading ahead and checking; the next batch starts both again."""
        self._check.stop()
        if self._ahead is not None:
            self._ahead.close()
        if self._reading is not None:
            self._reading.close()
            self._reading = None


def _identity(cfg: TrainConfig, buckets: Buckets, fingerprint: str) -> dict[str, object]:
    shapes = [list(dataclasses.astuple(shape)) for shape in buckets.shapes]
    return {"data": fingerprint, "batch_size": cfg.batch_size, "seed": cfg.seed, "buckets": shapes}


@dataclasses.dataclass
class _Shown:
    """What a scene is shown as."""

    shots: list[np.ndarray]
    """Latents of each."""
    captions: tuple[str, ...]
    continues: list[bool]
    """Which shots continue the one before."""
    given: list[bool]
    """Which shots' first frames are given."""


class _Load:
    """One planned batch -> this process's rows of it."""

    def __init__(self, manifest: Manifest, captions: CaptionStore, buckets: Buckets, rows: Sequence[int], cfg: Config):
        self._captions, self._buckets, self._rows, self._moc = captions, buckets, rows, cfg.moc
        self._latent_shape, self._data, self._stride = manifest.latent_shape, cfg.data, cfg.codec.stride[0]
        self._clean, self._condition = cfg.clean_first_frames, cfg.condition_channels
        self._reader = ShardReader(manifest)

    def __call__(self, batch: Batch) -> Scene:
        shape = self._buckets.shapes[batch.bucket]
        scenes = []
        for row in self._rows:
            number = batch.scenes[row]
            if number is None:
                given = {"clean": self._clean, "condition": self._condition}
                scenes.append(blank_scene(shape, self._latent_shape, self._captions.dim, **given))
                continue
            entry = self._buckets.scenes[batch.bucket][number]
            shown = self._read(entry, batch.bucket, batch.first_turn + row)
            embedded = [self._captions.read(caption) for caption in shown.captions]
            texts = own_texts(embedded, shown.captions, shown.continues, self._moc)
            scene = pack_scene(
                shown.shots,
                texts,
                shape,
                continues=shown.continues,
                clean_first=shown.given if self._clean else None,
                condition=self._condition_of(entry, shown) if self._condition else None,
                name=f"scene {entry.name}",
            )
            scenes.append(scene)
        return stack_scenes(scenes)

    def _condition_of(self, entry: SceneEntry, shown: _Shown) -> list[np.ndarray]:
        starts = self._reader.starts(entry)
        # A still that stands for a shot is of other frames, and nothing of it is given.
        return [
            condition_of(start if given else shot, int(given), self._stride)
            for shot, start, given in zip(shown.shots, starts, shown.given, strict=True)
        ]

    def _read(self, entry: SceneEntry, bucket: int, turn: int) -> _Shown:
        """As it is; models that read first frames get them, others learn them, too."""
        given = [bool(self._condition and self._data.first_frames)] * len(entry.shots)
        return _Shown(self._reader.read(entry)[0], entry.captions, [shot.continues for shot in entry.shots], given)


class _Augmented(_Load):
    """The same for training: captions are dropped, stills stand for shots, and first frames are given, at random."""

    def __init__(
        self,
        manifest: Manifest,
        captions: CaptionStore,
        buckets: Buckets,
        rows: Sequence[int],
        cfg: Config,
    ):
        super().__init__(manifest, captions, buckets, rows, cfg)
        self._seed = cfg.train.seed

    def _read(self, entry: SceneEntry, bucket: int, turn: int) -> _Shown:
        shots, stills = self._reader.read(entry)
        captions, continues = entry.captions, [shot.continues for shot in entry.shots]
        random = augmentation(self._seed, bucket, turn)
        if random.random() < self._data.caption_dropout:
            captions = ("",) * len(captions)
        replaced = random.random(len(shots)) < self._data.image_conditioning
        for index in np.flatnonzero(replaced):
            shots[index] = stills[index, random.integers(stills.shape[1])]
            continues[index : index + 2] = [False] * len(continues[index : index + 2])  # a still breaks the take
        given = (random.random(len(shots)) < self._data.first_frames) & ~replaced
        lengths = np.array([len(shot) for shot in shots])
        return _Shown(shots, captions, continues, (given & (lengths > 1)).tolist())
