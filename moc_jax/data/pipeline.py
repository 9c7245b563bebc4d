"""Encoded scenes -> batches, by Grain: read, augment, pack, stack; ahead of the step, in a thread or in processes."""

import dataclasses
import functools
from collections.abc import Callable

import grain
import jax
import numpy as np
from absl import flags

from moc_jax.config import BucketConfig, Config, ConfigError, DataConfig, TrainConfig
from moc_jax.data.buckets import Buckets, assign_buckets
from moc_jax.data.caption_store import CaptionStore, open_captions
from moc_jax.data.manifest import DataError, Manifest, SceneEntry, verify
from moc_jax.data.pack import blank_scene, pack_scene, stack_scenes
from moc_jax.data.plan import Batch, TrainPlan, ValidationPlan, augmentation
from moc_jax.data.shards import ShardReader
from moc_jax.data.sources import Split
from moc_jax.scene import Scene

_AHEAD = 2  # batches read ahead, per worker


def make_pipeline(
    cfg: Config,
    manifest: Manifest,
    *,
    split: Split,
    process_index: int = 0,
    process_count: int = 1,
    verified: bool = True,
) -> "SceneIterator":
    """This process's share of every batch, as scenes with numpy leaves.

    Process p of n holds rows [p B/n, (p + 1) B/n) of each global batch of B = `train.batch_size` scenes, so all
    processes together see what one would, in the same order, and all are in the same bucket at each step.

    Training never ends, and applies caption dropout and image conditioning. Validation shows each held-out scene once,
    as it is; rows left over in a bucket's last batch are blank: no shots, no captions.

    Args:
        verified: False leaves it to the caller to call `SceneIterator.verify` before the first batch.

    Raises:
        ConfigError: the batch does not divide by the processes, or a bucket or caption does not fit.
        DataError: no scene is left in the split, or a shard of it is damaged.
    """
    rows, rest = divmod(cfg.train.batch_size, process_count)
    if rest:
        raise ConfigError(
            f"train.batch_size = {cfg.train.batch_size} does not divide by the {process_count} processes; "
            f"the nearest that do are {max(1, rows) * process_count} and {(rows + 1) * process_count}"
        )
    captions = open_captions(manifest, cfg.text)
    buckets = assign_buckets(cfg.data.buckets, manifest, captions.tokens, split, patch=cfg.model.patch[0])
    used = sorted({scene.shard for scenes in buckets.scenes for scene in scenes})
    check = functools.partial(verify, manifest, used[process_index::process_count])  # together they read all
    sizes = tuple(map(len, buckets.scenes))
    mine = slice(process_index * rows, (process_index + 1) * rows)
    if split == "train":
        plan = TrainPlan(sizes, cfg.train.batch_size, cfg.train.seed)
        load = _Augmented(manifest, captions, buckets, mine, cfg.data, cfg.train.seed)
    else:
        plan = ValidationPlan(sizes, cfg.train.batch_size)
        load = _Load(manifest, captions, buckets, mine)
    identity = _identity(cfg.train, buckets, manifest.fingerprint)
    scenes = SceneIterator(plan, load, buckets, cfg.data.workers, identity, check)
    if verified:
        scenes.verify()
    return scenes


class SceneIterator(grain.DatasetIterator):
    """Iterates over batches. Its whole state is the number of the next one, so resuming is exact with any workers."""

    _reading: grain.DatasetIterator | None = None  # on the class: Grain closes iterators that were never built, too

    def __init__(
        self,
        plan: TrainPlan | ValidationPlan,
        load: Callable[[Batch], Scene],
        buckets: Buckets,
        workers: int,
        identity: dict[str, object],
        verify: Callable[[], None],
    ):
        """`verify` raises DataError where this process's part of the data is damaged."""
        super().__init__()
        self.buckets, self.verify = buckets, verify
        self._plan, self._batches = plan, grain.MapDataset.source(plan).map(load)
        self._workers, self._identity = workers, identity
        self._step = 0

    def __next__(self) -> Scene:
        if self._reading is None:
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
            ahead = self._batches[self._step :].to_iter_dataset(options)
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
        for number in range(begin, min(end, len(self._plan))):
            found[self._plan[number].bucket] = None
            if len(found) == there:
                break
        return [self.buckets.shapes[bucket] for bucket in found]

    def get_state(self) -> dict[str, object]:
        """The next batch's number, and what it is a number of."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: dict[str, object]) -> None:
        """Resumes from a saved state.

        Raises:
            DataError: the state was taken from other data, batch size, seed or buckets; names what differs.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise DataError(
                    f"the saved data position belongs to {key} = {state.get(key)!r}, but this run has {value!r}; "
                    "resume with the same data and settings, or give another --workdir"
                )
        if type(state.get("step")) is not int or state["step"] < 0:
            raise DataError(f"the saved data position is {state.get('step')!r}; it must be a batch's number")
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Stops reading ahead; the next batch starts it again."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None


def _identity(cfg: TrainConfig, buckets: Buckets, fingerprint: str) -> dict[str, object]:
    shapes = [list(dataclasses.astuple(shape)) for shape in buckets.shapes]
    return {"data": fingerprint, "batch_size": cfg.batch_size, "seed": cfg.seed, "buckets": shapes}


class _Load:
    """One planned batch -> this process's rows of it."""

    def __init__(self, manifest: Manifest, captions: CaptionStore, buckets: Buckets, rows: slice):
        self._captions, self._buckets, self._rows = captions, buckets, rows
        self._latent_shape = manifest.latent_shape
        self._reader = ShardReader(manifest)

    def __call__(self, batch: Batch) -> Scene:
        shape = self._buckets.shapes[batch.bucket]
        scenes = []
        for row in range(len(batch.scenes))[self._rows]:
            number = batch.scenes[row]
            if number is None:
                scenes.append(blank_scene(shape, self._latent_shape, self._captions.dim))
                continue
            entry = self._buckets.scenes[batch.bucket][number]
            shots, captions = self._read(entry, batch.bucket, batch.first_turn + row)
            texts = [self._captions.read(caption) for caption in captions]
            scenes.append(pack_scene(shots, texts, shape, name=f"scene {entry.name}"))
        return stack_scenes(scenes)

    def _read(self, entry: SceneEntry, bucket: int, turn: int) -> tuple[list[np.ndarray], tuple[str, ...]]:
        """Latents of the shots, and the captions."""
        return self._reader.read(entry)[0], entry.captions


class _Augmented(_Load):
    """The same for training: captions are dropped, and stills stand for shots, at random."""

    def __init__(
        self, manifest: Manifest, captions: CaptionStore, buckets: Buckets, rows: slice, cfg: DataConfig, seed: int
    ):
        super().__init__(manifest, captions, buckets, rows)
        self._cfg, self._seed = cfg, seed

    def _read(self, entry: SceneEntry, bucket: int, turn: int) -> tuple[list[np.ndarray], tuple[str, ...]]:
        shots, stills = self._reader.read(entry)
        captions = entry.captions
        random = augmentation(self._seed, bucket, turn)
        if random.random() < self._cfg.caption_dropout:
            captions = ("",) * len(captions)
        for index in np.flatnonzero(random.random(len(shots)) < self._cfg.image_conditioning):
            shots[index] = stills[index, random.integers(stills.shape[1])]
        return shots, captions
