"""Which names are checkpoints, and what a checkpoint may say of itself."""

import json
import pathlib

import pytest
from etils import epath

from moc_jax.checkpoint_layout import FORMAT, own_data_state, parse_meta
from moc_jax.checkpoint_names import CheckpointError, foreign_in, free_aside, step_of, steps_in, unfinished_in
from moc_jax.config import Config, ConfigError
from moc_jax.config_json import config_to_json
from moc_jax.digest import text_digest

BODY = {
    "format": FORMAT,
    "step": 5,
    "config": config_to_json(Config()),
    "data": ['{"step": 5}'],
    "shapes": {"params": {"w": [2, 3]}},
    "digests": {"params": {"w": 7}},
    "codec": {"basis": "ab"},
}


def saved(body):
    text = body if isinstance(body, str) else json.dumps(body)
    return {"body": text, "sha256": text_digest(text)}


def parse(meta, name="5"):
    return parse_meta(meta, epath.Path("/run/checkpoints") / name)


@pytest.mark.parametrize("name", ["0010", "00", "²", "١٢", "-1", "+1", "1e3", "1_0", " 5", "5 ", "5\n", "", "0x5"])
def test_other_names_are_no_steps(name):
    assert step_of(name) is None


def test_steps_are_whatever_bears_their_name(tmp_path):
    for name in ("10", "9", "²", "damaged-3", "7.orbax-checkpoint-tmp", "11.orbax-checkpoint-tmp-17", ".cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "8").write_text("")
    (tmp_path / "6.orbax-checkpoint-tmp").write_text("")
    (tmp_path / "12").symlink_to("nowhere")
    (tmp_path / ("9" * 200)).mkdir()
    root = epath.Path(tmp_path)
    assert steps_in(root) == [8, 9, 10, 12, int("9" * 200)]
    assert foreign_in(root) == ["6.orbax-checkpoint-tmp", "²"]
    assert [path.name for path in unfinished_in(root)] == ["11.orbax-checkpoint-tmp-17", "7.orbax-checkpoint-tmp"]
    assert steps_in(root / "nowhere") == steps_in(root / "8") == []


def test_what_was_set_aside_before_stays(tmp_path):
    names = []
    for _ in range(3):
        aside = pathlib.Path(free_aside(epath.Path(tmp_path), 5))
        aside.mkdir()
        names.append(aside.name)
    assert names == ["damaged-5", "damaged-5-2", "damaged-5-3"]


def test_meta_comes_back():
    meta = parse(saved({**BODY, "versions": {"jax": "1"}}))
    assert (meta.step, meta.config, meta.data) == (5, Config(), [{"step": 5}])
    assert (meta.shapes, meta.digests, meta.codec) == (BODY["shapes"], BODY["digests"], BODY["codec"])


@pytest.mark.parametrize("meta", [None, [], "x", 3, {}, {"body": "{}"}, {"body": 3, "sha256": "x"}, {"body": None}])
def test_meta_of_another_form_is_damaged(meta):
    with pytest.raises(ValueError, match="meta: it must hold a body and its digest"):
        parse(meta)


def test_meta_that_was_edited_is_damaged():
    meta = saved(BODY)
    with pytest.raises(ValueError, match="meta: the digest does not match"):
        parse({**meta, "body": meta["body"].replace("5", "6", 1)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in BODY if name != "format" for value in (None, [], 1.5, True, [[3]], {"x": None})),
        ("step", "5"),
        ("config", {}),
        ("data", "{}"),
        ("data", [3]),
        ("data", ["3"]),
        ("data", ["null"]),
        ("shapes", {"params": {"w": "2"}}),
        ("shapes", {"params": {"w": [2.0]}}),
        ("digests", {"params": {"w": "7"}}),
        ("codec", {"basis": 3}),
        *(("format", value) for value in (0, -1, "2", 2.0, True, [2])),
    ],
)
def test_a_field_of_another_type_is_named(name, value):
    with pytest.raises(ValueError, match=f"meta: {name} "):
        parse(saved({**BODY, name: value}))
    if value is None:
        with pytest.raises(ValueError, match=f"meta: {name} is missing"):
            parse(saved({key: BODY[key] for key in BODY if key != name}))


@pytest.mark.parametrize("body", ["", "{", "null", "[]", "3", '"x"', "[" * 100])
def test_a_body_that_is_no_object_is_damaged(body):
    with pytest.raises(ValueError, match=r"meta: step is missing|Expecting"):
        parse(saved(body))


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (
            None,
            "5 is of format 1, written by moc_jax 0.0.9, but moc_jax .* reads format 3. Resume or sample it with the",
        ),
        (
            1,
            "5 is of format 1, written by moc_jax 0.0.9, .* version that wrote it, or train again in another --workdir",
        ),
        (4, "5 is of format 4, written by moc_jax 0.0.9, but moc_jax .* reads format 3. Update moc_jax to resume"),
    ],
)
def test_another_format_is_refused_before_anything_else_is_read(format, message):
    """Its other fields, and its config, may be whatever they were then."""
    body = {"step": 5, "config": "{}", "versions": {"moc_jax": "0.0.9"}, **({"format": format} if format else {})}
    with pytest.raises(CheckpointError, match=message):
        parse(saved(body))
    with pytest.raises(CheckpointError, match="written by moc_jax of an unknown version"):
        parse(saved({**body, "versions": None}))


def test_the_step_must_be_that_of_the_folder():
    for name in ("6", "05", "damaged-5"):
        with pytest.raises(ValueError, match="it holds step 5, so the folder was renamed or copied"):
            parse(saved(BODY), name)


def test_a_config_that_this_version_does_not_know_is_named():
    with pytest.raises(ConfigError, match=r"the config saved in /run/checkpoints/5: unknown key modle"):
        parse(saved({**BODY, "config": '{"modle": {}}'}))
    with pytest.raises(ConfigError, match=r"the config saved in /run/checkpoints/5"):
        parse(saved({**BODY, "config": "no JSON"}))


def test_each_process_resumes_at_its_own_place_in_the_data(monkeypatch):
    """Where all stand at the same place, another number of processes can, too."""
    path = epath.Path("/run/checkpoints/5")
    apart = parse(saved({**BODY, "data": ['{"step": 5}', '{"step": 6}']}))
    same = parse(saved({**BODY, "data": ['{"step": 5}', '{"step": 5}']}))
    assert own_data_state(same, path) == {"step": 5}
    with pytest.raises(CheckpointError, match=r"written by 2 processes.* can't be resumed by 1; start 2 processes"):
        own_data_state(apart, path)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert own_data_state(apart, path) == {"step": 6}
