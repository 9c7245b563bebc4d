"""The demo's clip in other orders: shots, captions and cuts stay together."""

import itertools

import numpy as np
import pytest
import yaml

from moc_jax.data.demo_orders import FPS, HEIGHT, WIDTH, reorder
from moc_jax.data.video import read_video
from tests.data.clips import make_clip


def test_shots_captions_and_cuts_stay_together(tmp_path):
    make_clip(tmp_path / "clip.mp4", shots=3)
    names = ["first", "second", "third"]
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump({"caption": "all", "shots": names}))
    paths = reorder(tmp_path / "clip.mp4", tmp_path / "orders", 4)
    looks, orders = {}, set()
    for path in paths:
        said = yaml.safe_load(path.with_suffix(".yaml").read_text())
        orders.add(tuple(said["shots"]))
        assert said["caption"] == "all"
        assert sorted(said["shots"]) == sorted(names)
        frames = read_video(path, HEIGHT, WIDTH, FPS)
        ends = [0, *(round(cut * FPS) for cut in said["cuts"]), len(frames)]
        for name, (begin, end) in zip(said["shots"], itertools.pairwise(ends), strict=True):
            shot = frames[begin:end].astype(np.float32)
            wanted = looks.setdefault(name, shot)
            assert shot.shape == wanted.shape
            assert np.abs(shot - wanted).mean() < 3, (path, name)
    assert len(orders) > 1
    again = reorder(tmp_path / "clip.mp4", tmp_path / "again", 4)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_a_clip_with_other_captions_is_refused(tmp_path):
    make_clip(tmp_path / "clip.mp4", shots=3)
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump({"caption": "all", "shots": ["one"]}))
    with pytest.raises(ValueError, match=r"clip.mp4 has 3 shots, but 1 captions of shots"):
        reorder(tmp_path / "clip.mp4", tmp_path / "orders", 1)
    assert not (tmp_path / "orders").exists()
