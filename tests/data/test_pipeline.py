"""Batches: right content, right share for each process, exact resumption, augmentation, buckets."""

import collections
import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moc_jax.commands.preparing import prepared as prepared_together
from moc_jax.config import BucketConfig, ConfigError
from moc_jax.data import DataError, codec_of, make_pipeline, prepare, resolved
from moc_jax.data import cache as cache_module
from moc_jax.data import manifest as manifest_module
from moc_jax.data.buckets import assign_buckets
from moc_jax.data.caption_store import open_captions
from moc_jax.data.pack import pack_scene
from moc_jax.data.shards import ShardReader
from moc_jax.text import build_text_encoder
from tests.data.small import make_videos, small_config, with_data

SCENES = {"a": (5, 9), "b": (13,), "c": (9, 9, 5), "d": (17,), "e": (5, 5)}  # latent frames: 5, 4, 8, 5, 4
ONE = BucketConfig(shots=3, frames=12, text_tokens=20)
TWO_BUCKETS = (BucketConfig(shots=2, frames=5, text_tokens=40), BucketConfig(shots=3, frames=8, text_tokens=40))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple:
    folder: Path = tmp_path_factory.mktemp("data")
    videos = make_videos(folder, **SCENES)
    for name, lengths in SCENES.items():
        cuts = (np.cumsum(lengths)[:-1] / 12 - 1e-3).round(4).tolist()  # some shots are too short to be detected
        shots = [f"{name} {k}" for k in range(len(lengths))]
        (videos / f"{name}.yaml").write_text(json.dumps({"caption": f"all of {name}", "shots": shots, "cuts": cuts}))
    cfg = small_config(folder, caption_dropout=0.0, image_conditioning=0.0, keyframes=2)
    manifest = prepare(cfg)
    assert [scene.frames for scene in manifest.scenes] == [5, 4, 8, 5, 4]
    return cfg, manifest


def _take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def _assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def _expected(cfg, manifest, name, bucket):
    """The scene of file `name` as it should be packed, from the shards directly."""
    (entry,) = [s for s in manifest.scenes if s.source == f"{name}.mp4"]
    shots, _ = ShardReader(manifest).read(entry)
    encoder = build_text_encoder(cfg.text)
    captions = [f"all of {name}", *(f"{name} {k}" for k in range(len(shots)))]
    return pack_scene(shots, [encoder(c) for c in captions], bucket)


def _assign(cfg, manifest):
    return assign_buckets(cfg, manifest, open_captions(manifest, cfg.text).lengths, "train")


def _rows(batch):
    return [jax.tree.map(lambda leaf, row=row: leaf[row], batch) for row in range(len(batch.video))]


def test_the_buckets_of_batches_that_are_to_come(prepared):
    """In the order of their first use, as steps are compiled."""
    cfg, manifest = prepared
    data = make_pipeline(with_data(cfg, buckets=TWO_BUCKETS), manifest, split="train")
    used = [
        BucketConfig(shots=s.lengths.shot_frames.shape[1], frames=s.video.shape[1], text_tokens=s.text.shape[1])
        for s in _take(data, 8)
    ]
    assert len(set(used)) == 2
    for begin, end in itertools.combinations(range(9), 2):
        assert data.buckets_between(begin, end) == list(dict.fromkeys(used[begin:end]))


def test_one_pass_shows_every_scene_as_it_was_encoded(prepared):
    cfg, manifest = prepared
    cfg = with_data(cfg, max_buckets=1)
    iterator = make_pipeline(
        dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=5)), manifest, split="train"
    )
    (bucket,) = iterator.buckets.shapes
    assert dataclasses.astuple(bucket) == (3, 8, 4 + 3 + 3 + 3)  # "all of c" and "c 0" have a begin token each
    (batch,) = _take(iterator, 1)
    expected = {name: _expected(cfg, manifest, name, bucket) for name in SCENES}
    for row in _rows(batch):
        (match,) = [name for name in expected if _same(row, expected[name])]
        del expected[match]
    assert not expected


def test_order_depends_on_the_seed_alone(prepared):
    cfg, manifest = prepared
    first = _take(make_pipeline(cfg, manifest, split="train"), 6)
    _assert_same(_take(make_pipeline(cfg, manifest, split="train"), 6), first)
    other = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=1))
    assert not _same(_take(make_pipeline(other, manifest, split="train"), 6), first)


@pytest.mark.parametrize("rows", [((0, 1), (2, 3)), ((0, 2), (1, 3))])
@pytest.mark.parametrize("buckets", [(), TWO_BUCKETS])
def test_processes_together_see_what_one_would(prepared, buckets, rows):
    """Each reads its rows of the global batch, in whatever order these lie, and all are in one bucket at every step."""
    cfg, manifest = prepared
    cfg = with_data(cfg, buckets=buckets, caption_dropout=0.3, image_conditioning=0.3)
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=4))
    whole = _take(make_pipeline(cfg, manifest, split="train"), 8)
    parts = [_take(make_pipeline(cfg, manifest, split="train", rows=mine), 8) for mine in rows]
    for step, batch in enumerate(whole):
        for mine, part in zip(rows, parts):
            _assert_same(part[step], jax.tree.map(lambda leaf, mine=mine: leaf[list(mine)], batch))
    assert len({batch.video.shape for batch in whole}) == (len(buckets) or 3)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_resuming_is_exact(prepared, taken):
    cfg, manifest = prepared
    cfg = with_data(cfg, buckets=TWO_BUCKETS, caption_dropout=0.3, image_conditioning=0.3)
    iterator = make_pipeline(cfg, manifest, split="train")
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it
    rest = _take(iterator, 6)
    fresh = make_pipeline(cfg, manifest, split="train")
    next(fresh)  # a used iterator is set back, too
    fresh.set_state(state)
    assert fresh.get_state() == state
    _assert_same(_take(fresh, 6), rest)


def test_resuming_with_workers_and_other_processes(prepared):
    """What reads ahead, and how many share the work, is no part of the position."""
    cfg, manifest = prepared
    cfg = with_data(cfg, buckets=TWO_BUCKETS, caption_dropout=0.3, image_conditioning=0.3)
    iterator = make_pipeline(cfg, manifest, split="train")
    next(iterator)
    state = iterator.get_state()
    rest = _take(iterator, 5)
    helped = make_pipeline(with_data(cfg, workers=2), manifest, split="train")
    helped.set_state(state)
    begun = [next(helped) for _ in range(2)]
    moved = helped.get_state()
    helped.close()
    _assert_same(begun, rest[:2])
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(begun))
    second = make_pipeline(cfg, manifest, split="train", rows=[1])
    second.set_state(moved)
    for batch, whole in zip(_take(second, 3), rest[2:]):
        _assert_same(batch, jax.tree.map(lambda leaf: leaf[1:], whole))


@pytest.mark.parametrize("change", ["data", "batch_size", "seed", "buckets"])
def test_position_in_other_data_is_refused(prepared, change):
    cfg, manifest = prepared
    state = make_pipeline(cfg, manifest, split="train").get_state()
    if change == "data":
        manifest = dataclasses.replace(manifest, fingerprint="other")
    elif change == "buckets":
        cfg = with_data(cfg, buckets=TWO_BUCKETS)
    else:
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **{change: 4}))
    with pytest.raises(DataError, match=rf"belongs to {change} = .*; resume with the same .*another --workdir"):
        make_pipeline(cfg, manifest, split="train").set_state(state)


def test_other_data_is_taken_where_that_is_allowed(prepared):
    """Batches are counted on, and its first epoch begins; resuming in the midst of that is exact."""
    cfg, manifest = prepared
    old = make_pipeline(cfg, manifest, split="train")
    _take(old, 3)
    other = dataclasses.replace(manifest, fingerprint="other")
    new = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, allow_new_data=True))
    data = make_pipeline(with_data(new, buckets=TWO_BUCKETS), other, split="train")
    plain = make_pipeline(with_data(cfg, buckets=TWO_BUCKETS), other, split="train")
    assert data.buckets_between(0, 4) == plain.buckets_between(0, 4)
    data.set_state(old.get_state())
    assert (data.begun, data.get_state()["step"]) == (3, 3)
    assert data.buckets_between(3, 7) == plain.buckets_between(0, 4)
    whole = _take(plain, 5)
    _assert_same(_take(data, 2), whole[:2])
    for again in (new, cfg):  # the flag matters no more
        rest = make_pipeline(with_data(again, buckets=TWO_BUCKETS), other, split="train")
        rest.set_state(data.get_state())
        _assert_same(_take(rest, 3), whole[2:])
    seed = dataclasses.replace(new, train=dataclasses.replace(new.train, seed=9))
    with pytest.raises(DataError, match="belongs to seed = 0, but this run has 9"):
        make_pipeline(seed, other, split="train").set_state(old.get_state())


@pytest.mark.parametrize("step", [None, "3", 2.0, True, -1])
def test_a_position_that_is_no_batch_number_is_refused(prepared, step):
    cfg, manifest = prepared
    data = make_pipeline(cfg, manifest, split="train")
    with pytest.raises(DataError, match=r"the saved data position is .*; it must be a batch's number"):
        data.set_state({**data.get_state(), "step": step})


def test_fewer_scenes_than_a_batch_repeat(prepared):
    cfg, manifest = prepared
    cfg = dataclasses.replace(with_data(cfg, max_buckets=1), train=dataclasses.replace(cfg.train, batch_size=12))
    (batch,) = _take(make_pipeline(cfg, manifest, split="train"), 1)
    frames = sorted(batch.lengths.shot_frames.sum(1).tolist())
    assert len(frames) == 12
    assert {frame: frames.count(frame) >= 2 for frame in (4, 5, 8)} == {4: True, 5: True, 8: True}


class TestAugmentation:
    def _scenes(self, prepared, count=80, **changes):
        cfg, manifest = prepared
        cfg = with_data(cfg, **changes)
        iterator = make_pipeline(cfg, manifest, split="train")
        return [row for batch in _take(iterator, count) for row in _rows(batch)]

    def test_dropout_empties_all_captions_of_a_scene(self, prepared):
        scenes = self._scenes(prepared, caption_dropout=0.5)
        begin = build_text_encoder(prepared[0].text)("")[0]
        dropped = 0
        for scene in scenes:
            lengths, shots = scene.lengths.text_lengths, int((scene.lengths.shot_frames > 0).sum())
            empty = lengths[: shots + 1].max() == 1
            dropped += empty
            assert (lengths[: shots + 1] > 0).all()
            if empty:
                np.testing.assert_array_equal(scene.text[: shots + 1], np.broadcast_to(begin, (shots + 1, 16)))
                assert not scene.text[shots + 1 :].any()
        assert 0.35 < dropped / len(scenes) < 0.65

    def test_always_and_never(self, prepared):
        assert all(scene.lengths.text_lengths.max() == 1 for scene in self._scenes(prepared, 10, caption_dropout=1.0))
        assert all(scene.lengths.shot_frames.max() == 1 for scene in self._scenes(prepared, 10, image_conditioning=1.0))
        plain = self._scenes(prepared, 10)
        assert all(scene.lengths.text_lengths[0] == 4 for scene in plain)
        assert all(scene.lengths.shot_frames.max() > 1 for scene in plain)

    def test_image_conditioning_replaces_single_shots_by_their_keyframes(self, prepared):
        _, manifest = prepared
        (entry,) = [s for s in manifest.scenes if s.source == "a.mp4"]
        shots, stills = ShardReader(manifest).read(entry)
        options = [[shot, *still] for shot, still in zip(shots, stills)]
        seen = set()
        for scene in self._scenes(prepared, 120, image_conditioning=0.5):
            if scene.text[1:4].tobytes() != _expected(*prepared, "a", TWO_BUCKETS[0]).text[1:4].tobytes():
                continue
            ends = np.cumsum(scene.lengths.shot_frames)
            parts = np.split(scene.video[: ends[1]], ends[:1])
            seen.add(
                tuple(next(k for k, o in enumerate(of) if np.array_equal(o, part)) for of, part in zip(options, parts))
            )
        assert seen == {(i, j) for i in range(3) for j in range(3)}  # the shot, or either of two keyframes


class TestBuckets:
    def test_smallest_that_fits(self, prepared):
        cfg, manifest = prepared
        buckets = _assign(with_data(cfg, buckets=TWO_BUCKETS[::-1]), manifest)
        assert [[scene.source[0] for scene in scenes] for scenes in buckets.scenes] == [["a", "b", "d", "e"], ["c"]]
        assert "train: 4 scenes in the bucket of 2 shots, 5 latent frames, 40 text tokens" in buckets.summary()
        assert not buckets.dropped

    def test_padding_is_told_with_the_shapes_that_would_reach_the_goal(self, prepared):
        """Six tokens a frame; captions add 10, 7, 13, 7 and 10."""
        cfg, manifest = prepared
        told = _assign(with_data(cfg, buckets=TWO_BUCKETS), manifest).summary()
        assert "2 shots, 5 latent frames, 40 text tokens; 49% of the tokens are padding" in told  # 142 of 280
        assert "3 shots, 8 latent frames, 40 text tokens; 31% of the tokens are padding" in told  # 61 of 88
        assert "train: 44.8% of all tokens are padding; 2 shapes would leave 8.1%" in told  # 203 of 221
        assert "--data.buckets 2:5:10 3:8:13" in told
        chosen = _assign(cfg, manifest)
        assert "train: 2.9% of all tokens are padding; to keep these shapes" in chosen.summary()  # 203 of 209
        assert chosen.padding == pytest.approx(1 - 203 / 209)

    @pytest.mark.parametrize(("anchor", "text"), [("all", 10), ("own+global", 25)])
    def test_captions_that_continuations_do_not_repeat_are_no_tokens(self, tmp_path, anchor, text):
        """A shot of four parts; scene and shot have captions of five tokens."""
        (make_videos(tmp_path, a=(41,)) / "a.yaml").write_text("caption: all of the scene\nshots: [all of the shot]")
        cfg = small_config(tmp_path, max_shot_frames=13)
        cfg = dataclasses.replace(cfg, moc=dataclasses.replace(cfg.moc, text_anchor=anchor))
        buckets = _assign(cfg, manifest := prepare(cfg))
        (scene,) = manifest.scenes
        assert (len(scene.shots), buckets.shapes[0].text_tokens) == (4, 25)  # stills may break the take
        assert buckets.text_lengths(manifest.scenes) == [[5, 5, *[5 if anchor == "own+global" else 0] * 3]]
        tokens = 6 * scene.frames
        assert buckets.padding == pytest.approx(1 - (tokens + text) / (tokens + 25))

    def test_padding_that_no_shapes_avoid(self, prepared):
        cfg, manifest = prepared
        lengths = np.ones(len(manifest.scenes.texts), int)
        lengths[manifest.scenes.column("caption")[0]] = 500  # of as many frames as another scene
        told = assign_buckets(cfg, manifest, lengths, "train").summary()
        assert "3 shapes would still leave 4" in told
        assert "captions of more equal length" in told

    @pytest.mark.parametrize("buckets", [(), TWO_BUCKETS[::-1]])
    def test_a_resolved_config_is_the_same_run(self, prepared, buckets):
        cfg, manifest = prepared
        cfg = with_data(cfg, buckets=buckets)
        filled = resolved(cfg, manifest)
        chosen = (
            dict(shots=2, frames=4, text_tokens=10),
            dict(shots=2, frames=5, text_tokens=10),
            dict(shots=3, frames=8, text_tokens=13),
        )
        assert filled.data.buckets == (TWO_BUCKETS if buckets else tuple(BucketConfig(**c) for c in chosen))
        assert with_data(filled, buckets=buckets) == cfg  # nothing else has changed
        assert resolved(filled, manifest) == filled
        assert prepare(filled) == manifest
        first = make_pipeline(cfg, manifest, split="train")
        again = make_pipeline(filled, manifest, split="train")
        assert again.buckets == first.buckets
        next(first)
        again.set_state(first.get_state())
        _assert_same(_take(again, 3), _take(first, 3))

    def test_what_fits_nowhere_is_counted_with_its_reason(self, prepared):
        cfg, manifest = prepared
        buckets = _assign(with_data(cfg, buckets=TWO_BUCKETS[:1]), manifest)
        assert buckets.dropped == {"c.mp4#0": "3 shots for a bucket of 2, 8 frames for a bucket of 5"}
        assert "dropped c.mp4#0: 3 shots" in buckets.summary()
        (bucket,) = buckets.shapes
        for batch in _take(make_pipeline(with_data(cfg, buckets=TWO_BUCKETS[:1]), manifest, split="train"), 6):
            assert batch.video.shape[1] == bucket.frames

    def test_nothing_fits(self, prepared):
        cfg, manifest = prepared
        tiny = (BucketConfig(shots=1, frames=2, text_tokens=9),)
        with pytest.raises(DataError, match=r"(?s)no train scene is left; widen data.buckets\n  a.mp4#0: 2 shots"):
            make_pipeline(with_data(cfg, buckets=tiny), manifest, split="train")

    def test_a_bucket_without_scenes_is_reported_and_never_drawn(self, prepared):
        cfg, manifest = prepared
        cfg = with_data(cfg, buckets=(*TWO_BUCKETS, BucketConfig(shots=9, frames=90, text_tokens=90)))
        iterator = make_pipeline(cfg, manifest, split="train")
        assert "train: 0 scenes in the bucket of 9 shots" in iterator.buckets.summary()
        assert {batch.video.shape[1] for batch in _take(iterator, 10)} == {5, 8}

    def test_frames_must_fill_patches(self, prepared):
        cfg, manifest = prepared
        model = dataclasses.replace(cfg.model, patch=(2, 1, 1))
        with pytest.raises(ConfigError, match=r"frames 5 does not divide by model.patch\[0\] = 2"):
            _assign(dataclasses.replace(with_data(cfg, buckets=TWO_BUCKETS), model=model), manifest)

    def test_captions_must_fit_the_encoder_as_it_is_now(self, prepared):
        cfg, manifest = prepared
        cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, max_tokens=3))
        with pytest.raises(ConfigError, match=r"scene a.mp4#0: the caption 'all of a' has 4 tokens"):
            make_pipeline(cfg, manifest, split="train")


class TestValidation:
    def test_every_scene_once_without_augmentation(self, prepared, tmp_path):
        cfg, _ = prepared
        videos = make_videos(tmp_path, train=(13,))
        held = with_data(cfg, source=(str(videos),), validation_source=cfg.data.source, cache=str(tmp_path / "cache"))
        held = with_data(held, caption_dropout=1.0, image_conditioning=1.0, buckets=TWO_BUCKETS)
        held = dataclasses.replace(held, train=dataclasses.replace(held.train, batch_size=3))
        manifest = prepare(held)
        iterator = make_pipeline(held, manifest, split="validation")
        rows = [row for batch in iterator for row in _rows(batch)]
        assert len(rows) == 9  # four scenes and a single one, in batches of three
        shown = [row for row in rows if row.lengths.shot_frames.any()]
        for row, (name, bucket) in zip(shown, zip("abdec", (0, 0, 0, 0, 1))):
            _assert_same(row, _expected(held, manifest, name, TWO_BUCKETS[bucket]))
        iterator.set_state(iterator.get_state() | {"step": 0})
        assert len(list(iterator)) == 3

    def test_nothing_held_out(self, prepared):
        cfg, manifest = prepared
        with pytest.raises(DataError, match=r"no validation scene is left; set data.validation_source"):
            make_pipeline(cfg, manifest, split="validation")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_damaged_while_training_is_named(tmp_path, workers):
    make_videos(tmp_path, a=(13,), b=(13,))
    cfg = small_config(tmp_path, workers=workers)
    manifest = prepare(cfg)
    iterator = make_pipeline(cfg, manifest, split="train")
    shard = manifest.shard_path(0)
    content = bytearray(shard.read_bytes())
    for at in (content.index(b"video.npy"), content.rindex(b"video.npy") - 2000):
        content[at : at + 64] = bytes(64)
    shard.write_bytes(content)
    with pytest.raises(Exception, match=rf"{shard.name} is damaged at record"):
        next(iterator)
    iterator.close()


@pytest.mark.parametrize("damaged", [0, 1])
def test_checksums_are_compared_before_the_first_batch(tmp_path, damaged):
    """Even of bytes that reading would take as they are; each process answers for its part of the shards."""
    make_videos(tmp_path, a=(5,), b=(9,))
    cfg = small_config(tmp_path, verify="full")
    manifest = prepare(cfg)
    shard = manifest.shard_path(damaged)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.name} is damaged: its SHA-256 .*moc-prepare .* encodes"):
        make_pipeline(cfg, manifest, split="train")
    make_pipeline(cfg, manifest, split="train", process_index=1 - damaged, process_count=2)
    with pytest.raises(DataError, match=rf"{shard.name} is damaged"):
        make_pipeline(cfg, manifest, split="train", process_index=damaged, process_count=2)
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name} cannot be read"):
        make_pipeline(cfg, manifest, split="train")


def test_checksums_are_compared_once(tmp_path, monkeypatch):
    """Preparing read them all, and mended what was damaged."""
    make_videos(tmp_path, a=(5,), b=(9,))
    cfg = small_config(tmp_path, verify="full")
    shards, read, sha256 = prepare(cfg).shards, [], manifest_module.sha256
    for module in (manifest_module, cache_module):
        monkeypatch.setattr(module, "sha256", lambda path: read.append(path.name) or sha256(path))
    make_pipeline(cfg, prepared_together(cfg, None), split="train").close()
    assert sorted(name for name in read if name.endswith(".array_record")) == sorted(
        shard.file.rpartition("/")[2] for shard in shards
    )


def test_checksums_are_compared_in_the_background(tmp_path):
    """Lazily, batches come first; a byte that reading takes as it is stops the run soon after."""
    make_videos(tmp_path, a=(13,), b=(9,))
    cfg = small_config(tmp_path)
    manifest = prepare(cfg)
    data = make_pipeline(cfg, manifest, split="train")
    _take(data, 2)
    shard = manifest.shard_path(0)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    data = make_pipeline(cfg, manifest, split="train")
    next(data)
    with pytest.raises(DataError, match=rf"{shard.name} is damaged: its SHA-256"):
        collections.deque(itertools.islice(data, 1000), maxlen=0)
    data.close()
    with pytest.raises(DataError, match=rf"{shard.name} is damaged"):
        next(data)


def test_nan_in_a_shard_names_it(tmp_path, monkeypatch):
    make_videos(tmp_path, a=(13,))
    monkeypatch.setattr("moc_jax.data.shards._half", lambda array: np.full(array.shape, np.nan, np.float16))
    cfg = small_config(tmp_path)
    manifest = prepare(cfg)
    with pytest.raises(DataError, match=r"\w{32}.array_record is damaged at record 0 \(scene a.mp4#0\).*NaN"):
        next(make_pipeline(cfg, manifest, split="train"))


def test_each_video_has_a_shard(tmp_path):
    """In which its scenes lie one after another."""
    make_videos(tmp_path, a=(5, 9, 9), b=(9,))
    (tmp_path / "videos" / "a.yaml").write_text("cuts: [0.41, 1.16]")
    cfg = small_config(tmp_path, shots_per_scene=2)
    manifest = prepare(cfg)
    assert [(scene.shard, scene.record) for scene in manifest.scenes] == [(0, 0), (0, 2), (1, 0)]
    assert [shard.records for shard in manifest.shards] == [3, 1]
    assert [[len(shot) for shot in ShardReader(manifest).read(s)[0]] for s in manifest.scenes] == [[2, 3], [3], [3]]
    assert codec_of(manifest).channels == 4


def test_parts_of_a_long_shot_continue_one_another(tmp_path):
    """They share a caption, once; a part that a still stands for breaks the take on both sides, and has its own."""
    videos = make_videos(tmp_path, a=(41,), b=(9,))
    (videos / "a.yaml").write_text("shots: [a long one]\ncuts: []")
    cfg = small_config(tmp_path, max_shot_frames=17, caption_dropout=0.0, image_conditioning=0.0, buckets=(ONE,))
    manifest = prepare(cfg)
    seen = {}
    for batch in _take(make_pipeline(cfg, manifest, split="train"), 4):
        for row in _rows(batch):
            seen[int(row.lengths.shot_frames.sum())] = row.lengths
    assert seen[3].continues.tolist() == [False] * 3
    assert seen[12].shot_frames.tolist() == [4, 4, 4]
    assert seen[12].continues.tolist() == [False, True, True]
    assert seen[12].text_lengths.tolist() == [3, 4, 0, 0]
    stills = make_pipeline(with_data(cfg, image_conditioning=0.5), manifest, split="train")
    found = set()
    for row in (row for batch in _take(stills, 40) for row in _rows(batch)):
        frames, text = row.lengths.shot_frames.tolist(), row.lengths.text_lengths.tolist()
        if frames[1]:
            whole = [n == 4 for n in frames]
            expected = [False, whole[0] and whole[1], whole[1] and whole[2]]
            assert row.lengths.continues.tolist() == expected
            assert text == [3, 4, *(0 if runs else 4 for runs in expected[1:])]
            found.add(tuple(whole))
    assert len(found) == 8
