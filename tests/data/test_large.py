"""A data set of many scenes, as the benchmark makes it up: what is in it, and what opening it takes."""

import pytest

from benchmarks.manifest import config, make, measure
from moc_jax.data import make_pipeline
from moc_jax.data.manifest import load_manifest


def test_it_is_data_like_any_other(tmp_path):
    manifest = load_manifest(make(tmp_path, 200))
    assert len(manifest.scenes) == 200
    scene = manifest.scenes[123]
    assert (scene.name, scene.source, scene.shard, scene.record) == (
        "videos/0000012.mp4#3",
        "videos/0000012.mp4",
        12,
        9,
    )
    assert scene.captions[0].startswith("scene 123: ")
    assert scene.captions[1:] == ("shot 1", "shot 2", "shot 3")
    assert manifest.sources["videos/0000012.mp4"] == f"{12:064x}"
    data = make_pipeline(config(tmp_path), manifest, split="train")
    assert int(next(data).lengths.shot_frames.sum()) > 0
    data.close()
    (tmp_path / manifest.shards[7].file).unlink()
    with pytest.raises(Exception, match=rf"{manifest.shards[7].file} is missing"):
        load_manifest(manifest.folder)


@pytest.mark.long
def test_a_million_scenes(tmp_path):
    found = measure(make(tmp_path, 1_000_000))
    assert found.manifest < 10, found
    assert found.pipeline < 10, found
    assert found.memory_at_the_end < 1, found
