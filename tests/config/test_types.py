"""A config written in Python is checked as strictly as one on the command line or in JSON."""

import dataclasses
import enum
import json
import pathlib
import re
import sys

import numpy as np
import pytest

from moc_jax.config import (
    BucketConfig,
    ChunkConfig,
    ChunkStage,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    MMDiTConfig,
    MoCConfig,
    OptimizerConfig,
    PcaConfig,
    SampleConfig,
    TrainConfig,
)
from moc_jax.config.base import Settings
from moc_jax.config_json import config_from_json, config_to_json
from tests.config.fields import fields, get, put

CONFIG = Config()


class Hostile:
    """Raises where a number or a path is asked for."""

    def __index__(self):
        raise RuntimeError

    __float__ = __fspath__ = __index__


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(checkpoint_every=2e0), "train.checkpoint_every is 2.0; it must be of type int: write 2"),
        (lambda: TrainConfig(steps=2.5), "train.steps is 2.5; it must be of type int"),
        (lambda: TrainConfig(steps=True), "train.steps is True; it must be of type int"),
        (lambda: TrainConfig(steps="3"), "train.steps is '3'; it must be of type int"),
        (lambda: TrainConfig(steps=np.float32(3)), "train.steps is"),
        (
            lambda: MoCConfig(visibility="Past"),
            "moc.visibility is 'Past'; it must be one of scene, past, own, before; did you",
        ),
        (
            lambda: ChunkConfig(unit="frame"),
            "moc.chunk.unit is 'frame'; it must be one of frames, tokens; did",
        ),
        (
            lambda: OptimizerConfig(schedule="linear"),
            "optimizer.schedule is 'linear'; it must be one of constant",
        ),
        (lambda: MoCConfig(mode="sparse"), "moc.mode is 'sparse'; it must be one of moc, dense"),
        (lambda: MoCConfig(mode=None), "moc.mode is None; it must be one of moc, dense"),
        (lambda: MoCConfig(causal_routing="no"), "moc.causal_routing is 'no'; it must be of type bool"),
        (lambda: MoCConfig(causal_routing=1), "moc.causal_routing is 1; it must be of type bool"),
        (lambda: MMDiTConfig(dtype="fp16"), "model.dtype is 'fp16'; it must be one of bfloat16, float32"),
        (lambda: MMDiTConfig(dtype=np.float32), "model.dtype is <class 'numpy.float32'>; it must be one of"),
        (lambda: MMDiTConfig(patch=(1, 2)), "model.patch has 2 entries; it must have 3"),
        (lambda: MMDiTConfig(patch=(1, 2, 2.0)), "model.patch[2] is 2.0; it must be of type int: write 2"),
        (lambda: MMDiTConfig(patch=2), "model.patch is 2; it must be a list of 3"),
        (lambda: MMDiTConfig(mlp_ratio=np.timedelta64(4, "s")), "model.mlp_ratio is np.timedelta64(4,'s'); it"),
        (lambda: TrainConfig(steps=1e300), "train.steps is 1e+300; it must be of type int"),
        (lambda: TrainConfig(steps=Hostile()), "train.steps is <"),
        (lambda: SampleConfig(shift=Hostile()), "sample.shift is <"),
        (lambda: Config(workdir=Hostile()), "workdir is <"),
        (lambda: MMDiTConfig(mlp_ratio="4"), "model.mlp_ratio is '4'; it must be of type float"),
        (lambda: MMDiTConfig(mlp_ratio=True), "model.mlp_ratio is True; it must be of type float"),
        (lambda: Config(train=3), "train is 3; it must be a TrainConfig"),
        (lambda: Config(train={"steps": 3}), "train is {'steps': 3}; it must be a TrainConfig"),
        (lambda: Config(moc=MoCConfig), "moc is <class 'moc_jax.config.network.MoCConfig'>; it must be a MoCConfig"),
        (lambda: Config(moc=None), "moc is None; it must be a MoCConfig"),
        (lambda: DataConfig(source="/path"), "data.source is '/path'; it must be a list: ('/path',) in Python"),
        (lambda: DataConfig(source=pathlib.Path("/path")), "it must be a list"),
        (lambda: DataConfig(source=(3,)), "data.source[0] is 3; it must be a path"),
        (lambda: DataConfig(source=("a", "")), "data.source[1] is empty"),
        (lambda: DataConfig(buckets=BucketConfig()), "data.buckets is BucketConfig(shots=8"),
        (lambda: DataConfig(buckets=((1, 2, 3),)), "data.buckets[0] is (1, 2, 3); it must be a BucketConfig"),
        (lambda: TrainConfig(chunk_schedule=(BucketConfig(),)), "train.chunk_schedule[0] is BucketConfig("),
        (lambda: SampleConfig(negative_prompt=3), "sample.negative_prompt is 3; it must be of type str"),
        (
            lambda: SampleConfig(negative_prompt="\udcff"),
            "sample.negative_prompt is '\\udcff', which is not UTF-8",
        ),
        (lambda: Config(workdir=b"out"), "workdir is b'out'; it must be a path, as text"),
        (lambda: Config(workdir=""), "workdir is empty"),
        (lambda: Config(workdir="  "), "workdir is empty"),
        (lambda: Config(workdir="a\0b"), "workdir is 'a\\x00b'; a path can't contain that character"),
        (lambda: DataConfig(cache=""), "data.cache is empty"),
        (lambda: MeshConfig(coordinator="host"), "mesh.coordinator is 'host'; it must be host:port"),
    ],
)
def test_what_is_no_such_type_choice_or_part_is_named(build, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message) if message[0] != "i" else message):
        build()


def test_a_list_is_proposed_only_where_it_would_be_right():
    with pytest.raises(ConfigError, match=r"data\.source is \{3\}; it must be a list$"):
        DataConfig(source={3})
    with pytest.raises(ConfigError, match=r"data\.buckets is .*; it must be a list: \(BucketConfig\("):
        DataConfig(buckets=BucketConfig())
    with pytest.raises(ConfigError, match=r"codec\.stride is '4,8,8'; it must be a list of 3$"):
        PcaConfig(stride="4,8,8")


def test_a_subclass_is_refused_since_json_would_not_bring_it_back():
    class Mine(MoCConfig):
        pass

    with pytest.raises(ConfigError, match=r"^moc is .*Mine\(.*it must be a MoCConfig"):
        Config(moc=Mine())


def test_whole_numbers_become_floats_and_lists_become_tuples():
    config = Config(
        model=MMDiTConfig(rope_theta=10000, mlp_ratio=np.int64(4), depth=np.int32(2), patch=[1, 2, np.uint8(2)]),
        sample=SampleConfig(shift=5, guidance=np.float32(5)),
        data=DataConfig(source=["a", pathlib.Path("b")], buckets=[BucketConfig()]),
        workdir=pathlib.Path("out"),
    )
    values = config.model.rope_theta, config.model.mlp_ratio, config.sample.shift, config.sample.guidance
    assert values == (10000.0, 4.0, 5.0, 5.0)
    assert all(type(value) is float for value in values)
    assert config.model.patch == (1, 2, 2)
    assert type(config.model.depth) is type(config.model.patch[2]) is int
    assert (config.data.source, config.data.buckets, config.workdir) == (("a", "b"), (BucketConfig(),), "out")
    assert config_from_json(config_to_json(config)) == config


def test_texts_of_a_subclass_become_plain():
    class Solver(enum.StrEnum):
        EULER = "euler"

    config = SampleConfig(solver=Solver.EULER, negative_prompt=np.str_("blur"))
    assert type(config.solver) is type(config.negative_prompt) is str
    assert config == SampleConfig(solver="euler", negative_prompt="blur")


def test_what_a_message_shows_is_short_whatever_the_value():
    class Odd:
        def __repr__(self):
            raise ValueError

    for value in ("x" * 10**6, 10**10_000, [0] * 10**6, Odd(), {1: {2: {}}}, float("nan")):
        with pytest.raises(ConfigError) as caught:
            TrainConfig(steps=value)
        assert len(str(caught.value)) < 400
        assert str(caught.value).startswith("train.steps is ")


# Values that no field takes as they are, and one of each kind that some do.
ODD = [None, True, 0, 1, -1, 2.0, 0.5, "x", "", b"x", (), [1], {}, object(), CONFIG, np.zeros(2), int, 1j, "moc"]


@pytest.mark.parametrize("path", list(fields()), ids=".".join)
def test_what_can_be_built_can_be_saved_and_read_back(path):
    """Each field with each odd value: refused by name, or back from JSON as it is, in plain types."""
    for value in [*ODD, get(CONFIG, path)]:
        config, message = CONFIG, ".".join(path)
        try:
            config = put(CONFIG, path, value)
        except ConfigError as error:
            message = str(error)
        assert path[0] in message
        assert path[-1] in message.replace("mesh sizes", path[-1])
        assert config_from_json(config_to_json(config)) == config
        assert type(get(config, path)) is type(get(CONFIG, path))
        hash(config)


def test_every_class_of_settings_is_checked_when_it_is_built():
    """None forgets its checks: an object in each field is refused."""
    module = sys.modules["moc_jax.config"]
    names = {getattr(module, name) for name in module.__all__}  # unions of one kind are that kind
    kinds = [kind for kind in names if isinstance(kind, type) and issubclass(kind, Settings)]
    assert len(kinds) == 22
    required = {
        "ChunkStage": {"step": 0, "size": 1},
        "TopKStage": {"timestep": 0, "top_k": 1},
        "Reference": {"name": "a", "version": "1", "sha256": "0" * 64},
    }
    for kind in kinds:
        for field in dataclasses.fields(kind):
            with pytest.raises(ConfigError, match=rf"{field.name} is <object"):
                kind(**required.get(kind.__name__, {}) | {field.name: object()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"workdir": "a", "workdir": "b"}', "the key 'workdir' appears twice"),
        ('{"moc": {"top_k": 1, "top_k": 2}}', "the key 'top_k' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"train": {"seed": ' + "9" * 5000 + "}}", "a number has 5,000 digits; the limit is 64"),
        ('{"optimizer": {"eps": NaN}}', "it holds NaN, which is not JSON; give a finite number"),
        ('{"optimizer": {"eps": -Infinity}}', "it holds -Infinity, which is not JSON; give a finite number"),
        ('{"optimizer": {"eps": 1e999}}', "optimizer.eps is inf; it must lie in"),
        ('{"train": {"chunk_schedule": [{"step": 1}]}}', "train.chunk_schedule[0] lacks size"),
        ('{"train": {"chunk_schedule": [3]}}', "train.chunk_schedule[0] is 3; it must be an object"),
        ('{"data": {"source": ["a", 3]}}', "data.source[1] is 3; it must be a path"),
        ("3", "the file is 3; it must be an object"),
        ("", "is not JSON: Expecting value"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lacks")
def test_odd_json_is_named(text, message):
    with pytest.raises(ConfigError, match=r"^old\.json.*" + re.escape(message)):
        config_from_json(text, name="old.json")


def test_json_with_a_byte_order_mark_is_read():
    assert config_from_json("\ufeff" + config_to_json(CONFIG)) == CONFIG


def test_saved_stages_and_buckets_come_back():
    config = Config(
        data=DataConfig(buckets=(BucketConfig(frames=3),)),
        train=TrainConfig(chunk_schedule=(ChunkStage(step=np.int64(3), size=4),)),
    )
    assert config_from_json(config_to_json(config)) == config
    assert json.loads(config_to_json(config))["train"]["chunk_schedule"] == [{"step": 3, "size": 4, "top_k": -1}]
