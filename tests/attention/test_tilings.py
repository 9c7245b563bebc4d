"""Tilings that were measured: kept, read strictly, and taken where they fit; and how they are found."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from moc_jax.attention import autotune as search
from moc_jax.attention import backends, tilings
from moc_jax.attention.api import RoutedAttention, moc_attention, route, routed_attention
from moc_jax.attention.autotune import autotune, descend, neighbours
from moc_jax.attention.backends import Hopper, Reference, Tpu, Xla
from moc_jax.attention.tilings import (
    Kind,
    Tilings,
    Tuned,
    kept_file,
    read_tilings,
    tiling_of,
    tilings_from_json,
    with_tiling,
)
from moc_jax.attention.xla import XlaTiling
from moc_jax.commands import autotune as command
from moc_jax.commands import sample, train
from moc_jax.config import AttentionConfig, ConfigError
from moc_jax.timing import Effort
from tests.attention.configs import DENSE, MULTI_SHOT, WINDOW
from tests.attention.scenes import HEADS, LONGEST_CHUNK, PAIR, TOKENS, qkv, table_of

TABLE = table_of(PAIR)
Q, K, V = (jnp.asarray(x) for x in qkv(0, PAIR))
BACKENDS = [Xla(), Hopper(), Tpu(chip="v5e")]
SMALL = XlaTiling(anchor_tile=8, anchor_block=16, routed_tile=8, routed_block=16)


def tuned(tokens, tiling, backend=Xla(), cfg=MULTI_SHOT):
    return Tuned(kind=Kind.of(backend, Q, TABLE, cfg), tokens=tokens, milliseconds=1.5, tiling=tiling)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_tilings_survive_json(backend):
    own = tiling_of(backend, jax.ShapeDtypeStruct((2, TOKENS, HEADS, 64), jnp.bfloat16), TABLE, MULTI_SHOT)
    some = Tilings((tuned(64, own, backend), tuned(128, next(neighbours(own))[1], backend)))
    again = tilings_from_json(some.to_json())
    assert again == some
    assert hash(again) == hash(some)
    assert tilings.given_tiling(with_tiling(backend, own)) == own


def test_the_nearest_number_of_tokens_counts():
    sizes = [dataclasses.replace(SMALL, anchor_tile=size) for size in (8, 16, 32)]
    known = Tilings(tuple(tuned(tokens, tiling) for tokens, tiling in zip((8, 100, 10**6), sizes, strict=True)))
    assert known.chosen(Xla(), Q, TABLE, MULTI_SHOT) == Xla(tiling=sizes[1])  # of 64 tokens
    newer = known.updated(tuned(100, sizes[2]))
    assert len(newer.tuned) == 3
    assert newer.chosen(Xla(), Q, TABLE, MULTI_SHOT) == Xla(tiling=sizes[2])


def test_what_was_measured_of_others_is_not_taken():
    known = Tilings((tuned(TOKENS, SMALL),))
    assert known.chosen(Xla(), Q, TABLE, MULTI_SHOT) == Xla(tiling=SMALL)
    given = Xla(tiling=XlaTiling())
    assert known.chosen(given, Q, TABLE, MULTI_SHOT) == given  # what is given stays
    longer = dataclasses.replace(TABLE, max_chunk=LONGEST_CHUNK + 1)
    for q, table, cfg in (
        (Q.astype(jnp.bfloat16), TABLE, MULTI_SHOT),
        (Q[..., :8], TABLE, MULTI_SHOT),
        (Q, longer, MULTI_SHOT),
        (Q, TABLE, WINDOW),
        (Q, TABLE, DENSE[0]),
        (Q, TABLE, dataclasses.replace(MULTI_SHOT, top_k=1)),
    ):
        assert known.chosen(Xla(), q, table, cfg) == Xla()
    assert known.chosen(Reference(), Q, TABLE, MULTI_SHOT) == Reference()
    for chip in ("v4", "v6e"):
        of_chip = Kind.of(Tpu(chip=chip), Q, TABLE, MULTI_SHOT)
        assert of_chip.device == chip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(backend="cudnn"), r"tilings\[0\].backend is 'cudnn'; it must be one of xla"),
        (lambda entry: entry.update(colour=1), r"tilings\[0\].colour is unknown"),
        (lambda entry: entry.pop("tokens"), r"tilings\[0\].tokens is missing"),
        (lambda entry: entry["tiling"].update(tile=1), r"tilings\[0\].tiling.tile is unknown"),
        (lambda entry: entry["tiling"].pop("anchor_tile"), r"tiling.anchor_tile is missing"),
        (lambda entry: entry["tiling"].update(anchor_tile="8"), "anchor_tile is '8'; it must be of type int"),
        (lambda entry: entry["tiling"].update(anchor_tile=0), "tiles and blocks must be at least 1"),
        (lambda entry: entry.update(tiling=None), "tiling is None; it must be an object"),
    ],
)
def test_a_file_of_something_else_is_refused(change, message, tmp_path):
    tree = json.loads(Tilings((tuned(64, SMALL),)).to_json())
    change(tree["tilings"][0])
    file = tmp_path / "tilings.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=rf"attention.tilings = .*tilings.json: .*{message}"):
        read_tilings(file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tilings": 3}'])
def test_no_tilings_at_all_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"no list of tilings|Expecting value"):
        tilings_from_json(text)
    with pytest.raises(ConfigError, match=r"attention.tilings = .*no.json: .*No such file"):
        routed_attention(AttentionConfig(tilings=str(tmp_path / "no.json")))


def test_a_file_that_is_not_there_is_reported_first(tmp_path, capsys):
    missing = ["--attention.tilings", str(tmp_path / "no.json")]
    with pytest.raises(SystemExit) as exited:
        train.main(["--config", "demo", "--workdir", str(tmp_path / "run"), *missing])
    assert exited.value.code == 2
    assert "no.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"attention.tilings = .*no.json"):
        sample.main(
            ["--checkpoint", str(tmp_path), "--training-scene", "0", "--out", str(tmp_path / "x.mp4"), *missing]
        )


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("own_cache")
def test_what_was_measured_here_is_found_by_itself(tmp_path, monkeypatch):
    """Unless a file is given, or nothing; and by one process only, since all have to compile the same."""
    assert routed_attention(AttentionConfig()).tilings == Tilings()
    kept, given = (Tilings((tuned(tokens, SMALL),)) for tokens in (8, 9))
    kept_file().parent.mkdir()
    kept_file().write_text(kept.to_json())
    (tmp_path / "given.json").write_text(given.to_json())
    assert routed_attention(AttentionConfig()).tilings == kept
    assert routed_attention(AttentionConfig(tilings=str(tmp_path / "given.json"))).tilings == given
    assert routed_attention(AttentionConfig(tilings="")).tilings == Tilings()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert routed_attention(AttentionConfig()).tilings == Tilings()


@pytest.mark.usefixtures("own_cache")
def test_tilings_of_another_version_are_not_found(monkeypatch):
    here = kept_file()
    for module in ("moc_jax", "jax"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.__version__", "0.0.1")
            assert kept_file() != here


@pytest.mark.usefixtures("own_cache")
def test_kept_tilings_that_cannot_be_read_stop_nothing():
    kept_file().parent.mkdir()
    kept_file().write_text("{")
    with pytest.warns(UserWarning, match=r"no measured tilings are used: .*tilings-.*json"):
        assert routed_attention(AttentionConfig()).tilings == Tilings()


def test_attention_of_a_model_takes_them(tmp_path):
    """By the settings of a run: the same program as with the tiling given by hand."""
    file = tmp_path / "tilings.json"
    file.write_text(Tilings((tuned(TOKENS, SMALL),)).to_json())
    attention = routed_attention(AttentionConfig(backend="xla", tilings=str(file)))

    def by_hand(q, k, v, backend):
        routes = route(q, k, TABLE, MULTI_SHOT, backend=backend)
        return moc_attention(q, k, v, TABLE, MULTI_SHOT, routes=routes, backend=backend), routes

    def traced(function):
        return str(jax.make_jaxpr(function)(Q, K, V))

    ours = traced(lambda q, k, v: attention(q, k, v, TABLE, MULTI_SHOT))
    assert ours == traced(lambda q, k, v: by_hand(q, k, v, Xla(tiling=SMALL)))
    assert ours != traced(lambda q, k, v: by_hand(q, k, v, Xla()))
    assert hash(attention) == hash(RoutedAttention(backend="xla", tilings=read_tilings(file)))


def test_a_model_takes_the_kernels_if_its_chunks_are_few(monkeypatch):
    """As `moc_attention` by itself: no query holds more picks than there are chunks."""
    monkeypatch.setattr(backends.gpu, "is_hopper", lambda: True)
    x = jax.ShapeDtypeStruct((2, TOKENS, HEADS, 64), jnp.bfloat16)
    many = dataclasses.replace(MULTI_SHOT, top_k=1000)
    assert RoutedAttention().backend_for(x, x, x, TABLE, many) == Hopper()


def test_descent_finds_the_best_of_each_size():
    """Sizes halved and doubled until nothing is faster; what can't run is passed over, each tiling is tried once.

    What is faster than before is given at once.
    """
    best = XlaTiling(anchor_tile=32, anchor_block=512, routed_tile=128, routed_block=64)
    seen, lines = [], []

    def measure(backend):
        seen.append(backend.tiling)
        if backend.tiling.routed_tile > 128:
            raise ValueError("too large:\n  256")
        pairs = zip(dataclasses.astuple(backend.tiling), dataclasses.astuple(best), strict=True)
        return 1 + sum(abs(a - b) / max(a, b) for a, b in pairs)

    def run(start, trials):
        for tiling, milliseconds in descend(Xla(), start, measure, trials=trials, report=lines.append):
            assert tiling == seen[-1]
            yield tiling, milliseconds

    found = list(run(XlaTiling(), 100))
    assert (found[0][0], found[-1]) == (XlaTiling(), (best, 1.0))
    assert all(later < 0.99 * before for (_, before), (_, later) in itertools.pairwise(found))
    assert len(seen) == len(set(seen)) == len(lines)
    assert "routed_tile 256: can't run: too large: 256" in lines
    seen.clear()
    list(run(XlaTiling(), 5))
    assert len(seen) == 5
    with pytest.raises(NotImplementedError, match=r"xla can't run with its own tiling, .*: too large: 256"):
        list(run(XlaTiling(routed_tile=256), 5))


def test_neighbours_are_tilings_that_can_be():
    found = dict(neighbours(Hopper().tiles))
    assert found["forward.block 64"].forward.block == 64
    assert found["gradients.stages 4"].gradients.stages == 4
    assert "gradients.block 32" not in found  # they are of 64
    assert all(tiling != Hopper().tiles for tiling in found.values())


@pytest.mark.long
def test_autotune_measures_on_this_device():
    lines = []
    *_, found = autotune(
        Q, K, V, TABLE, MULTI_SHOT, backend=Xla(tiling=SMALL), trials=3, effort=Effort(samples=1), report=lines.append
    )
    assert found.kind == Kind.of(Xla(), Q, TABLE, MULTI_SHOT)
    assert found.kind.device == jax.devices()[0].device_kind
    assert found.tokens == TOKENS
    assert len(lines) == 3
    times = [float(line.split(" ms")[0]) for line in lines]
    assert 0 < found.milliseconds <= times[0] + 1e-3
    assert found.tiling == SMALL or min(times) < times[0]
    with pytest.raises(NotImplementedError, match="reference has no tiles; choose one of xla"):
        list(autotune(Q, K, V, TABLE, MULTI_SHOT, backend="reference"))


SCENE = {"shots": 2, "frames": 2, "rows": 2, "columns": 2, "caption": 1, "heads": 1, "head-dim": 8, "dtype": "float32"}
SETTING = {"moc.chunk.size": 4, "moc.top-k": 1, "attention.backend": "xla"}


def options(**more):
    return [str(word) for name, value in (SCENE | SETTING | more).items() for word in (f"--{name}", value)]


@pytest.mark.long
def test_the_command_adds_to_its_file(tmp_path, capsys):
    file = tmp_path / "tilings.json"
    command.main(options(trials=1, out=file))
    command.main([*options(trials=1, out=file), "--moc.self-anchor", "chunk"])
    found = read_tilings(file)
    assert [tuned.kind.anchors for tuned in found.tuned] == ["shot", "chunk"]
    assert {(tuned.tokens, tuned.kind.head_dim, tuned.kind.chunk) for tuned in found.tuned} == {(19, 8, 4)}
    assert capsys.readouterr().out.count(" ms: XlaTiling") == 2
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(ConfigError, match=r"out = .*other.json: no list of tilings"):
        command.main(options(out=other))


@pytest.mark.usefixtures("own_cache")
def test_without_a_file_the_command_keeps_what_it_finds_where_runs_look(monkeypatch):
    monkeypatch.setattr(search, "_milliseconds", lambda *_: 3.0)
    command.main(options(trials=1))
    assert [tuned.milliseconds for tuned in routed_attention(AttentionConfig()).tilings.tuned] == [3.0]


def test_ctrl_c_keeps_what_was_found(tmp_path, monkeypatch):
    """Also beside what was added meanwhile; and the search starts where the file given ends."""
    file, measured = tmp_path / "tilings.json", []

    def milliseconds(backend, *_):
        measured.append(backend.tiling)
        if len(measured) == 4:
            file.write_text(read_tilings(file).updated(tuned(64, SMALL)).to_json())
        if len(measured) == 6:
            raise KeyboardInterrupt
        return 10.0 - len(measured)

    monkeypatch.setattr(search, "_milliseconds", milliseconds)
    with pytest.raises(KeyboardInterrupt):
        command.main(options(out=file))
    of_others, found = read_tilings(file).tuned
    assert of_others == tuned(64, SMALL)
    assert (found.tiling, found.milliseconds) == (measured[4], 5.0)
    command.main(options(out=file, trials=1, **{"attention.tilings": file}))
    assert measured[6:] == [found.tiling]
