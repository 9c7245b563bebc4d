"""What is attended to changes with the steps of sampling, as set, and is accounted for."""

import dataclasses

import numpy as np
import pytest

from moc_jax.config import Config, ConfigError, MMDiTConfig, MoCConfig, SampleConfig, TopKStage, WanConfig
from moc_jax.sampling.plan import moc_of_calls, spared
from moc_jax.sampling.scenes import make_request
from moc_jax.text import build_text_encoder
from tests.sampling.worlds import BUCKET, CONFIG, canvas_of, make_board, make_params, make_sampler, with_moc

BOARD = make_board([("a van", 0.4), ("a dog runs", 0.1), ("night", 0.8)])
SCHEDULE = (TopKStage(timestep=300, top_k=3), TopKStage(timestep=800, top_k=7))


def kinds(moc, **sample):
    return ["dense" if x.mode == "dense" else x.top_k for x in moc_of_calls(moc, SampleConfig(**sample))]


def test_steps_are_dense_at_both_ends_and_picks_follow_the_noise_level():
    moc = MoCConfig(top_k=1, dense_first_steps=1, dense_last_steps=2, top_k_schedule=SCHEDULE)
    # 1, 0.9, ... 0.1 before a shift of 1
    assert kinds(moc, steps=10, shift=1.0, solver="dpm++") == ["dense", 7, 7, 3, 3, 3, 3, 3, "dense", "dense"]
    assert kinds(MoCConfig(top_k=1, top_k_schedule=SCHEDULE), steps=4, shift=1.0, solver="dpm++") == [7, 3, 3, 1]
    assert kinds(MoCConfig(dense_first_steps=9), steps=3) == ["dense"] * 3
    assert kinds(MoCConfig(mode="dense", dense_last_steps=1), steps=2) == ["dense"] * 2
    for each in moc_of_calls(moc, SampleConfig(steps=10)):
        assert each == dataclasses.replace(MoCConfig(), mode=each.mode, top_k=each.top_k)


def test_a_level_that_is_called_at_twice_is_one_step():
    moc = MoCConfig(top_k=2, dense_first_steps=1, dense_last_steps=1)
    assert kinds(moc, steps=4, solver="heun") == ["dense", 2, 2, 2, 2, "dense", "dense"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: MoCConfig(top_k_schedule=SCHEDULE[::-1]),
            r"top_k_schedule has the timesteps \[800, 300\]; they must rise",
        ),
        (lambda: TopKStage(timestep=1001, top_k=1), r"timestep is 1001; it must lie in 0\.\.1000"),
        (lambda: Config(moc=MoCConfig(dense_layers=(9,))), r"dense_layers = \[9\]; mmdit has 6 blocks, from 0"),
        (
            lambda: Config(moc=MoCConfig(dense_layers=(0, 6)), model=WanConfig()),
            r"dense_layers = \[0, 6\]; wan has 6 blocks, from 0",
        ),
    ],
)
def test_what_can_not_be_is_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.long
def test_what_is_skipped_is_counted_over_steps_and_layers():
    config = dataclasses.replace(CONFIG, model=MMDiTConfig(depth=2, latent_channels=4, text_dim=8))

    def line(moc, model=config.model):
        of = dataclasses.replace(config, moc=dataclasses.replace(CONFIG.moc, **moc), model=model)
        request = make_request([BOARD], canvas_of(of), of.sample, build_text_encoder(of.text), BUCKET)
        return spared(of.moc, of.model, moc_of_calls(of.moc, of.sample), request)

    def share(text):
        return float(text.split("; ")[1].split("%")[0])

    assert line({}) == ""
    some = line({"dense_first_steps": 1})
    assert some.startswith("attention: dense in 1, top 1 in 2 of 3 calls; ")
    two = line({"dense_first_steps": 1, "dense_last_steps": 1})
    assert share(two) == pytest.approx(share(some) / 2, abs=0.1)
    wan = WanConfig(depth=2, dim=32, heads=2, latent_channels=4, text_dim=8)
    layers = line({"dense_layers": (1,)}, wan)
    assert layers.startswith("attention: top 1 in 3 of 3 calls, with 1 of 2 layers dense; ")
    assert share(layers) > 0


@pytest.mark.long
def test_dense_steps_are_dense_and_others_are_not(capsys):
    params = make_params()

    def sampled(**moc):
        (sample,) = make_sampler(with_moc(**moc))(params, [BOARD], bucket=BUCKET)
        return np.concatenate(sample.latents)

    dense, every = sampled(mode="dense"), sampled(dense_first_steps=3)
    np.testing.assert_array_equal(dense, every)
    some = sampled(dense_first_steps=1)
    assert np.abs(some - dense).max() > 1e-4
    assert np.abs(some - sampled()).max() > 1e-4
