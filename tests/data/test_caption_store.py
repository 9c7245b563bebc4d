"""Captions are embedded once: what is encoded, what is only read, and what damage and crashes leave."""

import dataclasses
import multiprocessing
import pickle
import re
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from moc_jax.config import HashConfig
from moc_jax.data import DataError, make_pipeline, prepare, resolved
from moc_jax.data import caption_store as module
from moc_jax.data.arrays_file import ArraysFile
from moc_jax.data.caption_store import CaptionStore, fill_store, open_captions, store_folder
from moc_jax.data.captions import CaptionError
from moc_jax.text import build_text_encoder, encoder_fingerprint
from moc_jax.text.hashed import HashedWords
from tests.data.small import make_videos, small_config, with_data

CFG = HashConfig(dim=16)


class Encoder:
    """Rows like those of a large language model's encoder: as many as there are letters, in half precision."""

    batch_size = 2

    def __init__(self, dim=16, dtype=ml_dtypes.bfloat16):
        self.dim, self._dtype, self.calls, self.batches = dim, dtype, [], []

    def batch(self, captions):
        self.batches.append(list(captions))
        return [self(caption) for caption in captions]

    def __call__(self, caption):
        self.calls.append(caption)
        rows = np.random.default_rng(len(caption)).standard_normal((len(caption) + 1, self.dim))
        return rows.astype(self._dtype)


@pytest.fixture
def encoder(monkeypatch):
    """Takes the hashed words' place, and notes what it is asked."""
    encoder = Encoder()
    monkeypatch.setattr(module, "build_text_encoder", lambda cfg: encoder)
    monkeypatch.setattr(HashedWords, "__call__", lambda *_: pytest.fail("words are hashed"))
    return encoder


def _write(folder, captions, cfg=CFG):
    fill_store(folder, cfg, dict.fromkeys(captions, "here"))
    return CaptionStore(folder)


def _store(manifest, cfg):
    return open_captions(manifest, cfg.text).store


def _part(manifest, cfg, caption):
    """The file that holds it."""
    files = store_folder(manifest.folder.parent, cfg.text).iterdir()
    (found,) = (file for file in files if module._key(caption) in ArraysFile(file)["keys"].tobytes())
    return found


def _wider(cfg):
    """Another encoder."""
    return dataclasses.replace(cfg, text=HashConfig(dim=24), model=dataclasses.replace(cfg.model, text_dim=24))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_read_is_what_was_encoded(tmp_path, monkeypatch, dtype):
    """Of any length, 4096 wide, in the encoder's type, also after a journey to another process."""
    encoder = Encoder(4096, dtype)
    monkeypatch.setattr(module, "build_text_encoder", lambda cfg: encoder)
    captions = ["", "a dog", "Straße, 自転車 🚲", "x" * 30]
    store = _write(tmp_path / "store", captions)
    assert store.lengths([*captions, "a cat"]).tolist() == [*(len(caption) + 1 for caption in captions), 0]
    assert encoder.batches == [["", "a dog"], ["Straße, 自転車 🚲", "x" * 30]]  # by length, each with its like
    for reader in (store, pickle.loads(pickle.dumps(store))):
        assert reader.dim == 4096
        for caption in reversed(captions):
            assert reader.read(caption).dtype == dtype
            np.testing.assert_array_equal(reader.read(caption), encoder(caption))
    store.verify()
    assert not store.damaged
    with pytest.raises(DataError, match=r"store lacks the caption 'a cat'; prepare the data again"):
        store.read("a cat")


def test_each_caption_is_encoded_once_in_all_preparations(tmp_path, encoder):
    videos = make_videos(tmp_path, a=(13, 13), b=(13,))
    (videos / "a.yaml").write_text("caption: both\nshots: [one, one]")
    cfg = small_config(tmp_path)
    first = prepare(cfg)
    assert sorted(encoder.calls) == [
        "",
        "a video",
        "both",
        "one",
        "shot 1",
        "shot 3",
    ]  # the third might have been found
    assert len(prepare(cfg).scenes) == len(prepare(with_data(cfg, cache=str(first.folder))).scenes)
    assert len(encoder.calls) == 6
    (videos / "b.yaml").write_text("caption: something new")
    second = prepare(cfg)
    assert second.folder != first.folder
    assert encoder.calls[6:] == ["something new"]
    assert _store(second, cfg).lengths(["one"]) == 4


def test_another_encoder_has_a_store_of_its_own(tmp_path, encoder):
    make_videos(tmp_path, a=(13,))
    cfg = small_config(tmp_path)
    manifest = prepare(cfg)
    calls = len(encoder.calls)
    other = _wider(cfg)
    with pytest.raises(DataError, match=r"captions-hash-\w+ is missing: the captions are not encoded by .*; prepare"):
        make_pipeline(other, manifest, split="train")
    encoder.dim = 24
    assert prepare(other) == manifest  # the shards are the same
    assert len(encoder.calls) == calls + 3  # of one video: "", its caption, its shot's
    assert _store(manifest, other).dim == 24
    assert _store(manifest, cfg).dim == 16
    limited = dataclasses.replace(cfg, text=HashConfig(dim=16, max_tokens=9))  # a limit changes no embedding
    assert encoder_fingerprint(limited.text) == encoder_fingerprint(cfg.text) != encoder_fingerprint(other.text)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_what_the_store_does_and_nothing_is_encoded(tmp_path, encoder, workers):
    """An epoch, with dropped captions, in this process and in a worker's; the counts of tokens too."""
    videos = make_videos(tmp_path, a=(13, 13), b=(13,))
    (videos / "a.yaml").write_text("caption: both")
    cfg = small_config(tmp_path, caption_dropout=0.4, workers=workers, image_conditioning=0.0)
    manifest = prepare(cfg)
    calls = list(encoder.calls)
    assert resolved(cfg, manifest).data.buckets[-1].text_tokens == len("both") + len("shot 1shot 2") + 3
    iterator = make_pipeline(cfg, manifest, split="train")
    scenes = [jax.tree.map(lambda x, row=row: x[row], next(iterator)) for _ in range(6) for row in range(2)]
    iterator.close()
    assert encoder.calls == calls
    captions = {1: ("a video", "shot 1"), 2: ("both", "shot 1", "shot 2")}
    dropped = 0
    for scene in scenes:
        shown = captions[int((scene.lengths.shot_frames > 0).sum())]
        lengths = scene.lengths.text_lengths[: len(shown)].tolist()
        dropped += lengths == [1] * len(shown)
        texts = [encoder("" if lengths == [1] * len(shown) else caption) for caption in shown]
        assert lengths == [len(text) for text in texts]
        assert scene.text.dtype == np.float32
        np.testing.assert_array_equal(scene.text[: sum(lengths)], np.concatenate(texts).astype(np.float32))
    assert 0 < dropped < len(scenes)


class TestDamage:
    @pytest.fixture
    def cfg(self, tmp_path):
        videos = make_videos(tmp_path, a=(13,))
        (videos / "a.yaml").write_text("caption: the whole\nshots: [the shot]")
        return small_config(tmp_path)

    @pytest.mark.parametrize("kind", ["the index", "cut off", "empty", "garbage", "more"])
    def test_a_damaged_store_is_made_again_and_reported(self, cfg, encoder, kind):
        file = _part(prepare(cfg), cfg, "the whole")
        whole = file.read_bytes()
        at = whole.index(b'"keys"')
        index = whole[:at] + b"?" + whole[at + 1 :]
        file.write_bytes(
            {"the index": index, "cut off": whole[:-9], "empty": b"", "garbage": b"x" * 999, "more": b"0" + whole}[kind]
        )
        encoder.calls.clear()
        mended = prepare(cfg)
        note = r"note: \w+.captions of captions-hash-\w+ was damaged \(it.*\); it is made again"
        assert re.search(note, mended.summary())
        assert sorted(encoder.calls) == ["the shot", "the whole"]  # of the rest none is used
        np.testing.assert_array_equal(_store(mended, cfg).read("the shot"), encoder("the shot"))
        assert "was damaged" not in prepare(cfg).summary()

    def test_a_damaged_embedding_is_found_when_it_is_read_and_mended_by_a_full_check(self, cfg, encoder):
        manifest = prepare(cfg)
        file = _part(manifest, cfg, "the whole")
        whole = file.read_bytes()
        at = whole.index(_store(manifest, cfg).read("the whole").tobytes()) + 9
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        store = _store(prepare(cfg), cfg)
        np.testing.assert_array_equal(store.read("the shot"), encoder("the shot"))
        message = rf"{file.name} is damaged: the embedding of 'the whole' .* --data.verify full, which encodes it again"
        with pytest.raises(DataError, match=message):
            store.read("the whole")
        mended = prepare(with_data(cfg, verify="full"))
        assert "was damaged (1 of 3 embeddings have another checksum); it is made again" in mended.summary()
        np.testing.assert_array_equal(_store(mended, cfg).read("the whole"), encoder("the whole"))

    def test_damage_after_the_preparation_is_named(self, cfg):
        manifest = prepare(cfg)
        file = _part(manifest, cfg, "the whole")
        file.write_bytes(b"x" * 999)
        message = rf"captions-hash-\w+ lacks .*; {file.name} is damaged \(its end is damaged\); prepare the data again"
        with pytest.raises(DataError, match=message):
            make_pipeline(cfg, manifest, split="train")

    def test_what_was_encoded_before_a_crash_stays(self, tmp_path, encoder, monkeypatch):
        captions = ["", "a", "bb", "ccc", "dddd"]
        monkeypatch.setattr(module, "_PART_BYTES", 1)

        def dying(self, captions):
            if "bb" in captions:
                raise KeyboardInterrupt
            return [self(caption) for caption in captions]

        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "batch", dying)
            with pytest.raises(KeyboardInterrupt):
                _write(tmp_path / "store", captions)
        assert encoder.calls == ["", "a"]
        assert [file.suffix for file in (tmp_path / "store").iterdir()] == [".captions"] * 2
        store = _write(tmp_path / "store", captions)
        assert encoder.calls == captions
        assert store.lengths(captions).tolist() == [1, 2, 3, 4, 5]

    def test_embeddings_that_are_not_finite_name_the_caption(self, cfg, encoder, monkeypatch):
        monkeypatch.setattr(Encoder, "__call__", lambda self, caption: np.full((2, 16), np.inf, np.float32))
        with pytest.raises(CaptionError, match=r"a.yaml: the embedding of 'shot 2' holds NaN or infinite values"):
            prepare(cfg)

    def test_an_encoder_that_changes_its_mind_is_refused(self, tmp_path, encoder):
        _write(tmp_path / "store", ["one"])
        encoder.dim = 8
        with pytest.raises(DataError, match=r"embeddings of different kinds, .*\(8, 'bfloat16'\).*; delete it"):
            _write(tmp_path / "store", ["two"])

    def test_of_a_batch_the_caption_that_is_meant_is_named(self, tmp_path):
        captions = {"short": "a.txt", "this is long": "b.yaml"}
        with pytest.raises(CaptionError, match=r"^b.yaml: the caption 'this is long' has 4 tokens"):
            fill_store(tmp_path / "store", HashConfig(dim=16, max_tokens=3), captions)


def test_a_limit_that_came_later_is_kept(tmp_path, encoder):
    """What is there was encoded when longer captions were allowed."""
    _write(tmp_path / "store", ["a long caption"])
    limited = HashConfig(dim=16, max_tokens=9)
    message = r"here: the caption 'a long caption' has 15 tokens, but text.max_tokens is 9; shorten it or raise"
    with pytest.raises(CaptionError, match=message):
        _write(tmp_path / "store", ["a long caption"], limited)


def test_two_processes_at_once(tmp_path):
    """Both want the captions of an encoder that came after the shards."""
    make_videos(tmp_path, a=(13,))
    cfg = small_config(tmp_path)
    prepare(cfg)
    other = _wider(cfg)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(prepare, [other, other])
    assert first == second
    store = _store(first, other)
    np.testing.assert_array_equal(store.read("a video"), build_text_encoder(other.text)("a video"))


def test_memory_does_not_grow_with_the_store(tmp_path, monkeypatch):
    """Writing and checking hold a part at a time; reading maps the files."""
    encoder = Encoder(4096)
    monkeypatch.setattr(module, "build_text_encoder", lambda cfg: encoder)
    monkeypatch.setattr(module, "_PART_BYTES", 1 << 20)

    def peak(count):
        captions = [f"{k:03}" + "x" * 37 for k in range(count)]
        tracemalloc.start()
        store = _write(tmp_path / f"{count}", captions)
        store.verify()
        assert sum(float(store.read(caption)[0, 0]) for caption in captions)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, sum(file.stat().st_size for file in store.folder.iterdir())

    few, _ = peak(4)
    many, size = peak(60)
    assert size > 15e6
    assert many < 1.2 * few, f"{many / 1e6:.1f} MB against {few / 1e6:.1f} MB for {size / 1e6:.1f} MB"
