"""A prepared folder's manifest: what was edited or damaged is refused by name; and its lock harms nobody's file."""

import dataclasses
import json
import shutil

import pytest

from moc_jax.config import ConfigError
from moc_jax.data.manifest import COLUMNS, MANIFEST, DataError, load_manifest, scene_table, shard_table
from moc_jax.data.prepare import prepare
from tests.data.small import make_videos, small_config, with_data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepared once; each test takes a copy."""
    folder = tmp_path_factory.mktemp("prepared")
    make_videos(folder, a=(13,), b=(13, 13))
    return prepare(small_config(folder, validation_fraction=0.01)).folder


@pytest.fixture
def folder(prepared, tmp_path):
    shutil.copytree(prepared.parent, tmp_path / "cache")
    return tmp_path / "cache" / prepared.name


def _edit(folder, change):
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


EDITS = {
    "settings": lambda m: m["settings"].update({"data.fps": 24.0}),
    "skipped": lambda m: m["skipped"].update({"c.mp4": "x"}),
    "counts": lambda m: m["counts"].update(files=7),
    "digest of the columns": lambda m: m.update(columns="0" * 64),
    "digest removed": lambda m: m.pop("sha256"),
    "digest of another type": lambda m: m.update(sha256=3),
    "key removed": lambda m: m.pop("notes"),
    "key added": lambda m: m.update(more=1),
    "counts are a list": lambda m: m.update(counts=[]),
    "latent shape is a number": lambda m: m.update(latent_shape=3),
    "columns are null": lambda m: m.update(columns=None),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_edits_are_found(folder, change):
    _edit(folder, change)
    with pytest.raises(
        DataError, match=r"manifest.json cannot be read \(it was changed after it was written.*; delete"
    ):
        load_manifest(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"3",
        b"{",
        b'{"version": 5}',
        b"[" * 100_000,
        b"9" * 5000,
        b'{"version": 5}x',
        b"\0",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_damage_is_named(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json cannot be read \(.*; delete .* and prepare the data again"):
        load_manifest(folder)


@pytest.mark.parametrize("version", [1, 2, 3, 4, 6, None, "5", [5], {}])
def test_other_versions_are_refused(folder, version):
    _edit(folder, lambda m: m.update(version=version))
    with pytest.raises(DataError, match=r"manifest.json was written by another version of this program; delete"):
        load_manifest(folder)


def test_layout_makes_no_difference(folder):
    before = load_manifest(folder)
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(dict(reversed(content.items())), ensure_ascii=False, indent=4))
    assert load_manifest(folder) == before


@pytest.mark.parametrize("at", [0, 100, -200, -1], ids=["first", "early", "index", "last"])
def test_a_changed_byte_of_the_columns_is_found(folder, at):
    content = bytearray((folder / COLUMNS).read_bytes())
    content[at] ^= 1
    (folder / COLUMNS).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json cannot be read \(columns was changed .*; delete"):
        load_manifest(folder)
    (folder / COLUMNS).unlink()
    with pytest.raises(DataError, match=r"manifest.json cannot be read \(.*No such file.*columns'\); delete"):
        load_manifest(folder)


def _shards(manifest, **changes):
    return shard_table([dataclasses.replace(manifest.shards[0], **changes)])


def _scenes(manifest, **changes):
    return scene_table([dataclasses.replace(manifest.scenes[0], **changes), *manifest.scenes[1:]])


def _column(table, name, change):
    """The table with one column changed as no program writes it."""
    columns = table.columns
    columns[name] = change(columns[name])
    return type(table)(table.kind, columns, name.partition(".")[0] + ".")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"shards": _shards(m, file=f"../{m.shards[0].file}")}, r"shards\[0\].file is '../encoded"),
        (lambda m: {"shards": _shards(m, file="/etc/passwd")}, r"shards\[0\].file is '/etc/passwd'"),
        (lambda m: {"shards": _shards(m, file="..")}, r"shards\[0\].file is '..'"),
        (lambda m: {"shards": _shards(m, file="")}, r"shards\[0\].file is ''"),
        (lambda m: {"shards": _shards(m, file="a\0b")}, r"shards\[0\].file is"),
        (lambda m: {"shards": _shards(m, file="x" * 300)}, r"shards\[0\].file is"),
        (lambda m: {"shards": shard_table(())}, r"scenes\[0\] is records 0 to 0 of shard 0, which do not exist"),
        (lambda m: {"scenes": _scenes(m, record=1)}, r"scenes\[0\] is records 1 to 1 of shard 0"),
        (lambda m: {"scenes": _scenes(m, shard=-1)}, r"scenes\[0\] is records 0 to 0 of shard -1"),
        (lambda m: {"scenes": _scenes(m, shots=())}, r"scenes\[0\] must have shots"),
        (lambda m: {"scenes": _scenes(m, name=m.scenes[1].name)}, r"two scenes have the same name"),
        (lambda m: {"scenes": _column(m.scenes, "scenes.split", lambda c: c + 2)}, r"scenes.split must lie in 0..1"),
        (lambda m: {"scenes": _column(m.scenes, "scenes.name", lambda c: c + 99)}, r"scenes.name must lie in 0.."),
        (lambda m: {"scenes": _column(m.scenes, "scenes.record", lambda c: c[:1])}, r"the column scenes.record is int"),
        (
            lambda m: {"scenes": _column(m.scenes, "scenes.record", lambda c: c * 0.5)},
            r"the column scenes.record is fl",
        ),
        (
            lambda m: {"scenes": _column(m.scenes, "scenes.shots.ends", lambda c: c + 1)},
            r"the column scenes.shots.ends",
        ),
        (lambda m: {"scenes": _column(m.scenes, "scenes.text_ends", lambda c: -c)}, r"the column scenes.text_ends"),
        (lambda m: {"counts": {"files": True}}, r"counts\['files'\] is True; it must be int"),
        (lambda m: {"counts": {}}, r"counts lacks files, frames"),
        (lambda m: {"latent_shape": (2, 3)}, r"latent_shape is \[2, 3\]"),
    ],
    ids=range(20),
)
def test_what_no_program_wrote_is_refused_even_with_a_digest(folder, change, message):
    manifest = load_manifest(folder)
    dataclasses.replace(manifest, **change(manifest)).save()
    with pytest.raises(DataError, match=rf"manifest.json cannot be read \({message}.*; delete"):
        load_manifest(folder)


class TestLock:
    def test_a_link_in_its_place_is_refused_and_not_emptied(self, tmp_path):
        make_videos(tmp_path, a=(13,))
        (tmp_path / "cache").mkdir()
        (tmp_path / "thesis.txt").write_text("years of work")
        (tmp_path / "cache" / ".lock").symlink_to(tmp_path / "thesis.txt")
        with pytest.raises(DataError, match=r"cache/.lock is a link; it must be a regular file, so remove it"):
            prepare(small_config(tmp_path))
        assert (tmp_path / "thesis.txt").read_text() == "years of work"
        (tmp_path / "cache" / ".lock").unlink()
        (tmp_path / "cache" / ".lock").hardlink_to(tmp_path / "thesis.txt")
        prepare(small_config(tmp_path))
        assert (tmp_path / "thesis.txt").read_text() == "years of work"

    @pytest.mark.parametrize("cache", ["a\0b", "x" * 300, "\udcff"])
    def test_caches_that_cannot_be(self, tmp_path, cache):
        make_videos(tmp_path, a=(13,))
        with pytest.raises(ConfigError, match=r"data.cache .*(too long|can't contain that character|UTF-8)"):
            prepare(with_data(small_config(tmp_path), cache=cache))
