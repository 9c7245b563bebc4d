"""Shots that are left out on request, each with its reason; nothing is encoded again for that."""

import numpy as np
import pytest

from moc_jax.config import ConfigError, FilterConfig
from moc_jax.data import DataError, make_pipeline, prepare
from moc_jax.data import work as work_module
from moc_jax.data.filters import Filters, look_at
from moc_jax.data.shards import ShardReader
from moc_jax.data.video import write_video
from tests.data.small import small_config, with_data


def _noise(seed, frames=9, size=(32, 48)):
    """A scene that moves."""
    grid = np.random.default_rng(seed).integers(0, 255, (5, 7, 3)).astype(np.float32)
    big = np.kron(grid, np.ones((12, 12, 1), np.float32))
    return np.stack([np.roll(big, 2 * k, 1)[: size[0], : size[1]] for k in range(frames)]).astype(np.uint8)


SHOTS = {
    "good": _noise(1),
    "black": np.zeros((9, 32, 48, 3), np.uint8),
    "dark": (_noise(2) * 0.08).astype(np.uint8),
    "still": np.repeat(_noise(3)[:1], 9, axis=0),
    "also good": _noise(4),
    "again": _noise(1),
}
EVERY = FilterConfig(black=True, dark=15.0, still=0.5, duplicates=8)


def _reasons(cfg, shots=SHOTS):
    filters = Filters(cfg)
    return {
        name: filters.reason(name, look_at(frames), still=False).partition(":")[0] for name, frames in shots.items()
    }


def test_each_kind_has_its_reason():
    nothing = dict.fromkeys(SHOTS, "")
    assert _reasons(FilterConfig()) == nothing
    assert _reasons(FilterConfig(black=True)) == nothing | {"black": "it is black"}
    assert _reasons(FilterConfig(dark=15)) == nothing | dict.fromkeys(("black", "dark"), "it is too dark")
    assert _reasons(FilterConfig(still=0.5)) == nothing | dict.fromkeys(("black", "still"), "it stands still")
    assert _reasons(FilterConfig(duplicates=8)) == nothing | {"again": "it looks like good"}


def test_pictures_may_stand_still():
    assert not Filters(FilterConfig(still=9)).reason("x", look_at(SHOTS["still"]), still=True)


@pytest.mark.parametrize("most", [0, 3, 31])
def test_duplicates_are_those_of_so_many_bits(most):
    """Against all pairs."""
    random = np.random.default_rng(0)
    base = random.integers(0, 2, 128)
    hashes = []
    for _ in range(60):
        bits = base.copy()
        bits[random.choice(128, random.integers(0, 2 * most + 3), replace=False)] ^= 1
        hashes.append(bits)
    look = look_at(SHOTS["good"])
    filters, kept = Filters(FilterConfig(duplicates=most)), []
    for k, bits in enumerate(hashes):
        object.__setattr__(look, "hash", np.packbits(bits).tobytes().hex())
        like = any(np.count_nonzero(bits != hashes[other]) <= most for other in kept)
        assert bool(filters.reason(str(k), look, still=False)) == like
        if not like:
            kept.append(k)
    assert 1 < len(kept) < 60


def test_a_preparation_names_them_and_encodes_nothing_again(tmp_path, monkeypatch):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", np.concatenate(list(SHOTS.values())), 12.0)
    cuts = [round(0.75 * k - 0.01, 2) for k in range(1, len(SHOTS))]
    (tmp_path / "videos" / "a.yaml").write_text(f"cuts: {cuts}\nshots: {list(SHOTS)}\n")
    cfg = small_config(tmp_path, height=32, width=48)
    whole = prepare(cfg)
    (scene,) = whole.scenes
    assert scene.captions[1:] == tuple(SHOTS)
    monkeypatch.setattr(work_module, "shots_of", lambda *args, **kwargs: pytest.fail("a video is read"))
    manifest = prepare(with_data(cfg, filters=EVERY))
    assert [s.captions[1:] for s in manifest.scenes] == [("good",), ("also good",)]
    reader = ShardReader(manifest)
    for scene, number in zip(manifest.scenes, (0, 4)):
        np.testing.assert_array_equal(reader.read(scene)[0][0], ShardReader(whole).read(whole.scenes[0])[0][number])
    told = manifest.summary()
    for number, reason in (
        (2, "it is black"),
        (3, "it is too dark"),
        (4, "it stands still"),
        (6, "it looks like a.mp4, shot 1"),
    ):
        assert f"note: left out a.mp4, shot {number}, from {0.75 * (number - 1):.1f} s on: {reason}" in told
    assert "data.filters left out 4 shots" in told
    assert manifest.counts["shots"] == 2
    next(make_pipeline(with_data(cfg, filters=EVERY), manifest, split="train"))
    with pytest.raises(
        DataError, match=r"(?s)no training scene is left of 1 files\n  left out a.mp4, shot 1, .*too dark"
    ):
        prepare(with_data(cfg, filters=FilterConfig(dark=255)))


def test_what_no_filter_can_be():
    with pytest.raises(ConfigError, match=r"data.filters.duplicates is 64; it must lie in -1..31 \(-1: none\)"):
        FilterConfig(duplicates=64)
