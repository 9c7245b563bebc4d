"""First frames of shots that training gives: as the condition of a model that reads one, or clean."""

import dataclasses

import jax
import numpy as np
import pytest

from moc_jax.config import BucketConfig, ConfigError, WanConfig
from moc_jax.data import codec_of, prepare
from moc_jax.data.manifest import DataError, check_settings
from moc_jax.data.pack import blank_scene, stack_scenes
from moc_jax.data.pipeline import make_pipeline
from moc_jax.data.shards import ShardReader
from moc_jax.training.loop import train
from moc_jax.training.start import check_first_frames
from tests.data.small import make_videos, small_config, with_data
from tests.training.small import mesh_of

ANIMATING = WanConfig(
    dim=24,
    heads=2,
    depth=1,
    mlp_dim=32,
    patch=(1, 1, 1),
    latent_channels=4,
    condition_channels=8,
    text_dim=16,
    text_rows=4,
    dtype="float32",
    remat="none",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two files, of shots of 3 and 2 latent frames, and of 4."""
    folder = tmp_path_factory.mktemp("given")
    make_videos(folder, a=[9, 5], b=[13])
    cfg = dataclasses.replace(small_config(folder, image_conditioning=0.0, caption_dropout=0.0), model=ANIMATING)
    return cfg, prepare(cfg)


def batches(prepared, count, split="train", model=None, **data):
    cfg, manifest = prepared
    cfg = with_data(cfg, **data)
    iterator = make_pipeline(dataclasses.replace(cfg, model=model or cfg.model), manifest, split=split)
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def test_a_condition_is_the_first_frame_with_nothing_behind_it(prepared):
    cfg, manifest = prepared
    codec, reader = codec_of(manifest, cfg.codec), ShardReader(manifest)
    for entry in manifest.scenes:
        for shot, start in zip(reader.read(entry)[0], reader.starts(entry), strict=True):
            video = codec.decode(shot)
            assert start.shape == shot.shape
            np.testing.assert_allclose(start[:1], shot[:1], atol=2e-3)  # the first frame is encoded alone
            grey = codec.encode(np.concatenate([video[:1], np.zeros_like(video[1:])]))
            assert np.abs(start[1:] - grey[1:]).max() < 0.5 * np.abs(shot[1:] - grey[1:]).max()
    for scene in batches(prepared, 4, first_frames=1.0):
        for lengths, video, condition in zip(scene.lengths.shot_frames, scene.video, scene.condition):
            begins = np.cumsum(lengths) - lengths
            mask = np.zeros(len(video), bool)
            mask[begins[lengths > 0]] = True
            np.testing.assert_array_equal(
                condition[..., :4], np.broadcast_to(mask[:, None, None, None], condition[..., :4].shape)
            )
            np.testing.assert_allclose(condition[mask][..., 4:], video[mask], atol=2e-3)
            assert not condition[sum(lengths) :].any()
        assert scene.lengths.clean_first is None


def test_what_is_not_given_is_zeros(prepared):
    seen = {bool(scene.condition[0, 0].any()) for scene in batches(prepared, 20, first_frames=0.5)}
    assert seen == {True, False}
    for scene in batches(prepared, 4, first_frames=1.0, image_conditioning=1.0):  # stills stand for all shots
        assert not scene.condition.any()


def test_other_models_are_given_them_clean(prepared):
    plain = dataclasses.replace(ANIMATING, condition_channels=0)
    seen = set()
    for scene in batches(prepared, 20, model=plain, first_frames=0.5, image_conditioning=0.3):
        assert scene.condition is None
        stills = scene.lengths.shot_frames == 1
        assert not (scene.lengths.clean_first & (stills | (scene.lengths.shot_frames == 0))).any()
        seen |= set(scene.lengths.clean_first[scene.lengths.shot_frames > 1].tolist())
    assert seen == {True, False}
    assert batches(prepared, 1, model=plain)[0].lengths.clean_first is None


def test_what_does_not_fit_is_named(prepared):
    cfg, manifest = prepared
    without = {key: value for key, value in manifest.settings.items() if key != "model.condition_channels"}
    with pytest.raises(DataError, match=r"model\.condition_channels = 8, but it was prepared with None"):
        check_settings(dataclasses.replace(manifest, settings=without), cfg)
    with pytest.raises(ConfigError, match=r"condition_channels = 8 reads first frames, but data\.first_frames = 0"):
        check_first_frames(cfg)
    with pytest.raises(ConfigError, match=r"condition_channels = 5, but a mask of codec\.stride\[0\] = 4 frames and"):
        dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, condition_channels=5))
    other = dataclasses.replace(cfg.model, condition_channels=0, patch=(2, 1, 1))
    with pytest.raises(ConfigError, match="given clean need tokens of one latent frame"):
        with_data(dataclasses.replace(cfg, model=other), first_frames=0.5)


@pytest.mark.parametrize("condition", [8, 0])
def test_programs_are_made_for_what_batches_hold(prepared, condition):
    cfg, manifest = prepared
    model = dataclasses.replace(ANIMATING, condition_channels=condition)
    cfg = dataclasses.replace(with_data(cfg, first_frames=0.5), model=model)
    (scene,) = batches((cfg, manifest), 1, first_frames=0.5)
    shape = BucketConfig(shots=2, frames=scene.video.shape[1], text_tokens=scene.text.shape[1])
    given = {"clean": cfg.clean_first_frames, "condition": cfg.condition_channels}
    blank = stack_scenes([blank_scene(shape, manifest.latent_shape, cfg.text.dim, **given)] * 2)
    sizes = [jax.tree.map(lambda x: (x.shape[2:], x.dtype), each) for each in (scene, blank)]
    assert sizes[0] == sizes[1]


@pytest.mark.long
def test_a_run_trains_on_them(prepared, tmp_path):
    cfg, manifest = prepared
    cfg = dataclasses.replace(with_data(cfg, first_frames=0.5), workdir=str(tmp_path / "run"))
    settings = dataclasses.replace(cfg.train, steps=1, ema_decay=0)
    train(dataclasses.replace(cfg, train=settings), manifest, mesh_of(1))
