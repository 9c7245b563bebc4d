"""What is told before the first step: figures that agree with those counted elsewhere."""

import collections
import shutil

import pytest

from moc_jax.attention.accounting import account
from moc_jax.attention.api import RoutedAttention
from moc_jax.attention.xla import Xla, XlaTiling
from moc_jax.config import ChunkStage
from moc_jax.data import make_pipeline, prepare
from moc_jax.models import matrix_flops, parameter_count, scene_shape
from moc_jax.scene import chunk_table
from moc_jax.training.summary import scene_costs, si, stage_costs, summary
from tests.training.small import blueprint_of, changed, mesh_of


@pytest.fixture(scope="module")
def made(prepared_config):
    config = changed(
        prepared_config,
        train={"chunk_schedule": (ChunkStage(step=4, size=2),)},
        data={"caption_dropout": 0.0, "image_conditioning": 0.0},
    )
    manifest = prepare(config)
    return config, manifest, make_pipeline(config, manifest, split="train")


def test_the_cost_of_a_scene_is_that_of_the_batches_it_comes_in(made):
    config, _, data = made
    (cost,) = scene_costs(config, config.moc, data.buckets)
    scene = next(data)  # both scenes, as the model gets them
    data.close()
    shape, lengths = scene_shape(config.model, scene.video.shape, scene.text.shape, scene.lengths)
    counted = account(chunk_table(lengths, shape, config.moc.chunk), config.moc, config.model.head_dim)
    text = int(scene.lengths.text_lengths.sum())
    attention = config.model.depth * config.model.heads * counted.flops
    assert cost.tokens == counted.tokens / 2
    assert cost.sparsity == counted.sparsity
    assert cost.flops == 3 * (matrix_flops(config.model, text, counted.tokens - text) + attention) / 2
    assert 0 < cost.attention_share < 1


def test_every_stage_of_the_schedule_is_counted(made):
    config, _, data = made
    costs = stage_costs(config, data.buckets)
    assert [moc.chunk.size for moc in costs] == [1, 2]
    assert len({of_buckets[0].flops for of_buckets in costs.values()}) == 2


def test_the_summary_says_where_tiles_were_measured(made, monkeypatch):
    config, manifest, data = made
    mesh = mesh_of(1)

    def shown():
        costs = stage_costs(config, data.buckets)
        return summary(config, manifest, [data.buckets], costs, mesh, blueprint_of(config, mesh))

    assert "frames) skips" in shown()
    measured = RoutedAttention(backend=Xla(tiling=XlaTiling()))
    monkeypatch.setattr("moc_jax.training.summary.routed_attention", lambda cfg: measured)
    assert shown().count("frames, measured tiles) skips") == 2  # stages


def test_the_summary_names_what_a_user_looks_for(made, monkeypatch, tmp_path):
    config, manifest, data = made
    usage = collections.namedtuple("usage", "free")
    for mesh, free in ((mesh_of(1), 10**12), (mesh_of(8, data=8), 10**5)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free))
        blueprint = blueprint_of(config, mesh)
        text = summary(config, manifest, [data.buckets], stage_costs(config, data.buckets), mesh, blueprint)
        assert f"{parameter_count(config.model):,} parameters" in text
        assert f"data {mesh.shape['data']} x fsdp 1" in text
        assert "train: 2 scenes in the bucket" in text
        assert "chunks of 1 frames, top 2" in text
        assert "chunks of 2 frames, top 2" in text
        assert ("every device holds the whole state" in text) == (mesh.size > 1)
        assert ("NOT ENOUGH for the 2 that are kept" in text) == (free == 10**5)


def test_weights_that_no_mesh_axis_divides_are_named(made):
    config, manifest, data = made
    odd = changed(config, model={"dim": 12, "heads": 2, "mlp_ratio": 0.75})  # 12 and 9 by 8
    mesh = mesh_of(8, data=1, fsdp=8)
    blueprint = blueprint_of(odd, mesh)
    text = summary(odd, manifest, [data.buckets], stage_costs(odd, data.buckets), mesh, blueprint)
    assert "not split over fsdp, since no dimension divides by 8: blocks/text/mlp/down/bias (2, 12)" in text


def test_batches_that_make_no_update_are_reported(made):
    config, manifest, data = made
    config = changed(config, optimizer={"accumulate": 4}, train={"steps": 6})
    mesh = mesh_of(1)
    text = summary(config, manifest, [data.buckets], {}, mesh, blueprint_of(config, mesh))
    assert text.endswith("the last 2 batch(es) make no update; 4 or 8 steps would waste none")


def test_prefixes():
    assert [si(x) + "B" for x in (0, 999, 1000, 40_100_000, 2.5e12)] == ["0 B", "999 B", "1 kB", "40.1 MB", "2.5 TB"]
