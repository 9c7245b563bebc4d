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
from moc_jax.data.caption_store import CaptionStore, CaptionStoreError, CaptionWriter, open_captions, store_file
from moc_jax.data.captions import CaptionError
from moc_jax.text import build_text_encoder, encoder_fingerprint
from moc_jax.text.hashed import HashedWords
from tests.data.small import make_videos, small_config, with_data

CFG = HashConfig(dim=16)


class Encoder:
    """Rows like those of a large language model's encoder: as many as there are letters, in half precision."""

    def __init__(self, dim=16, dtype=ml_dtypes.bfloat16):
        self.dim, self._dtype, self.calls = dim, dtype, []

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


def _write(file, captions, cfg=CFG, others=()):
    with CaptionWriter(file, cfg, others) as writer:
        writer.add(dict.fromkeys(captions, "here"))
    return CaptionStore(file)


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
    assert store.tokens == {caption: len(caption) + 1 for caption in captions}
    for reader in (store, pickle.loads(pickle.dumps(store))):
        assert reader.dim == 4096
        for caption in reversed(captions):
            assert reader.read(caption).dtype == dtype
            np.testing.assert_array_equal(reader.read(caption), encoder(caption))
    assert store.damaged() is None
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
    assert open_captions(second, cfg.text).tokens["one"] == 4


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
    assert open_captions(manifest, other.text).dim == 24
    assert open_captions(manifest, cfg.text).dim == 16
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
    assert resolved(cfg, manifest).data.buckets[0].text_tokens == len("both") + len("shot 1shot 2") + 3
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

    @pytest.mark.parametrize("kind", ["a byte of an embedding", "the index", "cut off", "empty", "garbage", "more"])
    def test_a_damaged_store_is_made_anew_and_reported(self, cfg, encoder, kind):
        manifest = prepare(cfg)
        file = store_file(manifest.folder, cfg.text)
        whole = file.read_bytes()
        at = {"a byte of an embedding": 40, "the index": whole.index(b'"captions"')}.get(kind)
        if at is not None:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        else:
            file.write_bytes({"cut off": whole[:-9], "empty": b"", "garbage": b"x" * 999, "more": b"0" + whole}[kind])
        encoder.calls.clear()
        mended = prepare(cfg)
        assert re.search(r"note: captions-hash-\w+ was damaged \(.*\); it was made again", mended.summary())
        if at == 40:  # the rows of one caption
            assert "the embedding of 'the whole' has another checksum" in mended.summary()
            assert encoder.calls == ["the whole"]
        else:
            assert sorted(encoder.calls) == ["", "the shot", "the whole"]
        store = open_captions(mended, cfg.text)
        assert store.damaged() is None
        np.testing.assert_array_equal(store.read("the shot"), encoder("the shot"))
        assert "was damaged" not in prepare(cfg).summary()

    def test_damage_after_the_preparation_is_named(self, cfg):
        manifest = prepare(cfg)
        store_file(manifest.folder, cfg.text).write_bytes(b"x" * 999)
        with pytest.raises(DataError, match=r"captions-hash-\w+ cannot be read \(its end is damaged\); prepare"):
            make_pipeline(cfg, manifest, split="train")

    def test_a_crash_leaves_no_half_of_a_store(self, cfg, encoder, monkeypatch):
        manifest = prepare(cfg)
        other = _wider(cfg)
        write = CaptionWriter._write

        def dying(self, caption, rows, layout):
            if caption == "the shot":
                raise KeyboardInterrupt
            write(self, caption, rows, layout)

        stores = [store_file(manifest.folder, of.text) for of in (cfg, other)]
        (manifest.folder / f".{stores[1].name}.9999999999.tmp").write_bytes(b"a killed process's")
        monkeypatch.setattr(CaptionWriter, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            prepare(other)
        assert [store.exists() for store in stores] == [True, False]
        assert not list(manifest.folder.glob(".*"))

    def test_embeddings_that_are_not_finite_name_the_caption(self, cfg, encoder, monkeypatch):
        monkeypatch.setattr(Encoder, "__call__", lambda self, caption: np.full((2, 16), np.inf, np.float32))
        with pytest.raises(CaptionError, match=r"a.yaml: the embedding of 'the whole' holds NaN or infinite values"):
            prepare(cfg)

    def test_an_encoder_that_changes_its_mind_is_refused(self, tmp_path, encoder):
        with CaptionWriter(tmp_path / "store", CFG) as writer:
            writer.add({"one": "here"})
            encoder.dim = 8
            with pytest.raises(TypeError, match=r"'two' is encoded as \(8, 'bfloat16'\), other captions as \(16, "):
                writer.add({"two": "here"})

    def test_a_store_that_is_missing(self, tmp_path):
        with pytest.raises(CaptionStoreError, match="No such file"):
            CaptionStore(tmp_path / "store")


def test_a_limit_that_came_later_is_kept(tmp_path, encoder):
    """What is copied was encoded when longer captions were allowed."""
    old = _write(tmp_path / "old", ["a long caption"])
    limited = HashConfig(dim=16, max_tokens=9)
    message = r"here: the caption 'a long caption' has 15 tokens, but text.max_tokens is 9; shorten it or raise"
    with pytest.raises(CaptionError, match=message), CaptionWriter(tmp_path / "new", limited, [old.file]) as writer:
        writer.add({"a long caption": "here"})


def test_two_processes_at_once(tmp_path):
    """Both want the store of an encoder that came after the shards; one makes it."""
    make_videos(tmp_path, a=(13,))
    cfg = small_config(tmp_path)
    prepare(cfg)
    other = _wider(cfg)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(prepare, [other, other])
    assert first == second
    store = open_captions(first, other.text)
    np.testing.assert_array_equal(store.read("a video"), build_text_encoder(other.text)("a video"))


def test_memory_does_not_grow_with_the_store(tmp_path, monkeypatch):
    """Writing, checking and copying hold one caption at a time; reading maps the file."""
    encoder = Encoder(4096)
    monkeypatch.setattr(module, "build_text_encoder", lambda cfg: encoder)

    def peak(count):
        captions = [f"{k:03}" + "x" * 37 for k in range(count)]
        tracemalloc.start()
        store = _write(tmp_path / f"{count}", captions)
        assert store.damaged() is None
        _write(tmp_path / f"{count} copied", captions, others=[store.file])
        assert sum(float(store.read(caption)[0, 0]) for caption in captions)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, store.file.stat().st_size

    few, _ = peak(4)
    many, size = peak(60)
    assert size > 15e6
    assert many < 1.2 * few, f"{many / 1e6:.1f} MB against {few / 1e6:.1f} MB for {size / 1e6:.1f} MB"
