"""Numbers without bounds hang, overflow or train nothing: each has a range, and says so."""

import contextlib
import dataclasses
import io
import json
import math
import re
import time
import types

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moc_jax import models
from moc_jax.cli import parse
from moc_jax.config import (
    BucketConfig,
    ChunkStage,
    Config,
    ConfigError,
    DataConfig,
    MMDiTConfig,
    OptimizerConfig,
    PcaConfig,
    TrainConfig,
)
from moc_jax.config.base import field_kinds
from moc_jax.config_json import config_from_json, config_to_json
from moc_jax.data.buckets import assign_buckets
from moc_jax.data.manifest import DataError, SceneEntry, ShotEntry, scene_table
from moc_jax.data.plan import TrainPlan
from moc_jax.scene import SceneShape
from moc_jax.training.optimizer import learning_rate
from tests.config.fields import fields, option, put

CONFIG = Config()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(seed=-1), "train.seed is -1; it must lie in 0..4294967295"),
        (lambda: TrainConfig(seed=10**20), "train.seed is 100000000000000000000; it must lie in 0..4294967295"),
        (lambda: TrainConfig(batch_size=10**11), "train.batch_size is 100000000000; it must lie in 1..16384"),
        (lambda: TrainConfig(steps=2**31), "train.steps is 2147483648; it must lie in 1..2147483647"),
        (lambda: TrainConfig(ema_decay=0.99999999), "train.ema_decay is 0.99999999; it must lie in 0..0.9999999"),
        (lambda: DataConfig(keyframes=10**9), "data.keyframes is 1000000000; it must lie in 1..4096"),
        (
            lambda: DataConfig(workers=-1),
            "data.workers is -1; it must lie in 0..1024 (0: read in the training process)",
        ),
        (
            lambda: DataConfig(min_shot_frames=9, max_shot_frames=8),
            "data.min_shot_frames is 9, but data.max_shot_frames is",
        ),
        (lambda: MMDiTConfig(mlp_ratio=math.inf), "model.mlp_ratio is inf; it must lie in"),
        (lambda: MMDiTConfig(rope_theta=math.nan), "model.rope_theta is nan; it must lie in"),
        (
            lambda: MMDiTConfig(mlp_ratio=10**400),
            "model.mlp_ratio is an integer of about 398 digits, which is more than",
        ),
        (
            lambda: MMDiTConfig(dim=2**16, depth=2**12),
            "model.depth 4096, model.dim 65536 and model.mlp_ratio 4 make about",
        ),
        (lambda: MMDiTConfig(patch=(256, 256, 256)), "model.patch (256, 256, 256) x model.latent_channels 16 are"),
        (
            lambda: PcaConfig(stride=(256, 256, 256)),
            "codec.stride (256, 256, 256) makes patches of 50,331,648 numbers",
        ),
        (lambda: OptimizerConfig(learning_rate=math.nan), "optimizer.learning_rate is nan; it must lie in 1e-12..1000"),
        (lambda: OptimizerConfig(weight_decay=math.inf), "optimizer.weight_decay is inf"),
        (lambda: OptimizerConfig(eps=1e-50), "optimizer.eps is 1e-50"),  # 0 in float32
        (lambda: OptimizerConfig(clip_norm=1e-50), "optimizer.clip_norm is 1e-50, which leaves nothing"),
        (
            lambda: OptimizerConfig(b2=1 - 1e-9),
            "optimizer.b2 is 0.999999999",
        ),  # 1 in float32: nothing is left to divide by
        (lambda: ChunkStage(step=-1, size=1), "train.chunk_schedule.step is -1"),
        (lambda: BucketConfig(frames=0), "data.buckets.frames is 0"),
        (
            lambda: Config(data=DataConfig(buckets=(BucketConfig(frames=10**9),))),
            "data.buckets: 1000000000 frames of 8x20 latents with 16 channels are 2,560,000,000,000 numbers per scene",
        ),
        (
            lambda: Config(data=DataConfig(buckets=(BucketConfig(text_tokens=10**9),))),
            "data.buckets: 1000000000 text tokens of text.dim 256 are 256,000,000,000 numbers per scene",
        ),
        (
            lambda: Config(data=DataConfig(buckets=(BucketConfig(frames=10**5),)), train=TrainConfig(batch_size=2**13)),
            "train.batch_size 8192 scenes of a bucket of 100000 frames are",
        ),
        (lambda: SceneShape(shots=1, frames=2**20, rows=2**6, columns=2**6, text_tokens=0), "SceneShape("),
    ],
)
def test_numbers_that_can_not_be_are_named_with_their_limit(build, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        build()


NUMBERS = [0, 1, -1, 2, 255, 256, 2**14, 2**16, 10**6, 10**9, 2**31 - 1, 2**31, 2**32, 10**11, 10**20, 10**400]
NUMBERS += [0.0, -0.0, 0.5, 1.0, 1e-300, 1e-45, 1 - 1e-16, 1e12, 1e300, math.nan, math.inf, -math.inf]
EXTREMES = st.one_of(
    st.sampled_from(NUMBERS), st.integers(), st.floats(), st.sampled_from(["", "\0", "~", "x" * 10**5])
)
AT_ONCE = 10  # seconds; it takes some 0.01, a collection of garbage that falls into it a second or more
SHOT = ShotEntry(caption="", frames=3, start=0, continues=False)
SCENE = SceneEntry(name="a#0", source="a", split="train", caption="", shots=(SHOT,), shard=0, record=0)
MANIFEST = types.SimpleNamespace(scenes=scene_table([SCENE]), split=lambda split: MANIFEST.scenes)


def used(config: Config) -> None:
    """What settings decide before any data is read: the model's shapes, rates, buckets and the first batch's scenes."""
    models.abstract(config.model)
    rate = learning_rate(config.optimizer, config.train.steps)
    assert all(np.isfinite(float(rate(n))) for n in (0, 1, config.train.steps))
    with contextlib.suppress(DataError):  # a bucket too small for any scene
        assign_buckets(config, MANIFEST, np.ones(len(MANIFEST.scenes.texts), int), "train")
    for sizes in ((1,), (2, 3)):
        assert len(TrainPlan(sizes, config.train.batch_size, config.train.seed)[0].scenes) == config.train.batch_size


TWINS = {("model", "text_dim"): ("text", "dim"), ("model", "latent_channels"): ("codec", "channels")}


def put_extreme(path: tuple[str, ...], value) -> Config:
    """The config with `value` in a field, or in a part of it; what has to equal another field follows it."""
    if path[-1] in ("patch", "stride"):
        return put(CONFIG, path, (1, 1, value))
    if path[-1] == "buckets":
        return put(
            CONFIG, path, (BucketConfig(shots=value), BucketConfig(frames=value), BucketConfig(text_tokens=value))
        )
    if path[-1] == "chunk_schedule":
        return put(CONFIG, path, (ChunkStage(step=0, size=value), ChunkStage(step=value, size=1)))
    if path in TWINS:
        model = dataclasses.replace(CONFIG.model, **{path[1]: value})
        section = dataclasses.replace(getattr(CONFIG, TWINS[path][0]), **{TWINS[path][1]: value})
        return dataclasses.replace(CONFIG, model=model, **{TWINS[path][0]: section})
    return put(CONFIG, path, value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(list(fields())), value=EXTREMES)
def test_extremes_are_refused_by_name_or_work_at_once(path, value):
    begin, message = time.thread_time(), ""
    try:
        config = put_extreme(path, value)
        assert config_from_json(config_to_json(config)) == config
        used(config)
    except ConfigError as error:
        message = str(error)
    assert time.thread_time() - begin < AT_ONCE
    named = path[0] in message or TWINS.get(path, path)[0] in message
    assert not message or (named and len(message) < 600)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(path=st.sampled_from(list(fields())), value=EXTREMES)
def test_extremes_on_the_command_line_end_alike(path, value):
    word = "9" * 5000 if value == 10**400 else str(value)
    words = [word] * (3 if path[-1] in ("patch", "stride") else 1)
    shown, begin, code = io.StringIO(), time.thread_time(), 0
    try:
        with contextlib.redirect_stderr(shown):
            parse(Config, [option(path), *words], default=CONFIG, flags=False)
    except SystemExit as end:
        code = end.code
    except ConfigError as error:  # a name that no kind has; programs print it and exit with 2
        code = 2
        shown.write(str(error))
    assert time.thread_time() - begin < AT_ONCE
    assert code == 0 or (code == 2 and path[0] in shown.getvalue())


@settings(max_examples=60, deadline=None)
@given(path=st.sampled_from(list(fields())), value=EXTREMES)
def test_extremes_in_json_end_alike(path, value):
    tree = json.loads(config_to_json(CONFIG))
    inner = tree
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with contextlib.suppress(ConfigError):
        config = config_from_json(json.dumps(tree))
        assert config_from_json(config_to_json(config)) == config


def test_a_field_of_numbers_has_a_range():
    """A bare int or float would take anything."""
    for path in fields():
        kind = CONFIG
        for name in path[:-1]:
            kind = getattr(kind, name)
        assert field_kinds(type(kind))[path[-1]] not in (int, float), path
