"""What is printed before the first step: figures that agree with those counted elsewhere."""

import collections
import shutil

import jax
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
    taught = changed(config, moc={"visibility": "past"}, diffusion={"teacher_forcing": True})
    once, twice = (scene_costs(each, taught.moc, data.buckets)[0] for each in (config, taught))
    assert twice.flops == 2 * once.flops
    assert twice.tokens == once.tokens, "of the scene, however often it is computed"


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


def test_the_summary_says_how_a_scene_lies_on_its_devices(made):
    config, manifest, data = made
    with jax.set_mesh(mesh := mesh_of(8, data=1, context=8)):
        for kind, told in (
            ("gather", "B of keys, and as much of gradients; "),
            ("dispatch", " rounds of anchors and "),
        ):
            of = changed(config, attention={"exchange": kind})
            costs = stage_costs(of, data.buckets)
            text = summary(of, manifest, [data.buckets], costs, mesh, blueprint_of(of, mesh))
            lies = "a scene lies on 8 devices, 2 groups of heads x 4 of tokens; for a layer each receives "
            assert text.count(lies) == text.count(told) == 2


def test_the_summary_names_sinks_and_descriptors(made):
    config, manifest, data = made
    plain, more = config, changed(config, moc={"sink_chunks": 1, "descriptors": 2})
    texts, pairs = [], []
    for of in (plain, more):
        costs = stage_costs(of, data.buckets)
        texts.append(summary(of, manifest, [data.buckets], costs, mesh_of(1), blueprint_of(of, mesh_of(1))))
        pairs.append([cost.sparsity for of_buckets in costs.values() for cost in of_buckets if cost is not None])
    assert "top 2 by 2 descriptors and the first 1 of earlier shots" in texts[1]
    assert "descriptors" not in texts[0]
    assert all(a >= b for a, b in zip(*pairs))


def test_weights_that_no_mesh_axis_divides_are_named(made):
    config, manifest, data = made
    odd = changed(config, model={"dim": 12, "heads": 2, "mlp_ratio": 0.75})
    mesh = mesh_of(7, data=1, fsdp=7)
    blueprint = blueprint_of(odd, mesh)
    text = summary(odd, manifest, [data.buckets], stage_costs(odd, data.buckets), mesh, blueprint)
    assert "whole on every device, as no dimension divides by mesh.fsdp and context: blocks/text/mlp/" in text
    assert "blocks/video/mlp/up/kernel (2, 12, 9)" in text
    assert "bias" not in text


def test_batches_that_make_no_update_are_reported(made):
    config, manifest, data = made
    config = changed(config, optimizer={"accumulate": 4}, train={"steps": 6})
    mesh = mesh_of(1)
    text = summary(config, manifest, [data.buckets], {}, mesh, blueprint_of(config, mesh))
    assert text.endswith("the last 2 batch(es) make no update; 4 or 8 steps would waste none")


def test_prefixes():
    assert [si(x) + "B" for x in (0, 999, 1000, 40_100_000, 2.5e12)] == ["0 B", "999 B", "1 kB", "40.1 MB", "2.5 TB"]
