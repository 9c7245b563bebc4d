"""Columns give back the records they were made of, from memory, from a file and in another process."""

import pickle
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_jax.data.arrays_file import ArraysFile, write_arrays
from moc_jax.data.manifest import SceneEntry, ShotEntry, scene_table
from moc_jax.data.table import Table, TextMap

TEXT = st.text(max_size=6) | st.sampled_from(["", "a", "\udcff.mp4", "自転車"])
SHOT = st.builds(ShotEntry, caption=TEXT, frames=st.integers(1, 2**40), start=st.integers(0, 2**31))
SCENE = st.builds(
    SceneEntry,
    name=TEXT,
    source=TEXT,
    split=st.sampled_from(["train", "validation"]),
    caption=TEXT,
    shots=st.lists(SHOT, max_size=3).map(tuple),
    shard=st.integers(-(2**31), 2**31),
    record=st.integers(0, 9),
)


@settings(max_examples=60, deadline=None)
@given(scenes=st.lists(SCENE, max_size=6), data=st.data())
def test_columns_are_the_records(tmp_path_factory, scenes, data):
    made = scene_table(scenes)
    path = tmp_path_factory.mktemp("table") / "columns"
    write_arrays(path, {"other.x": np.arange(3), **made.columns})
    read = Table.checked(SceneEntry, ArraysFile(path), "scenes.")
    rows = data.draw(st.lists(st.integers(0, max(0, len(scenes) - 1)), max_size=9 if scenes else 0))
    for table in (made, read, pickle.loads(pickle.dumps(read))):
        assert list(table) == scenes
        assert table == read
        assert table.columns.keys() == made.columns.keys()
        chosen = table.select(np.array(rows, int))
        assert list(chosen) == [scenes[row] for row in rows]
        assert list(chosen[1:]) == [scenes[row] for row in rows[1:]]
        assert [table[-1]] == scenes[-1:] if scenes else not table
        assert chosen.counts("shots").tolist() == [len(scenes[row].shots) for row in rows]
        frames = [[shot.frames for shot in scenes[row].shots] for row in rows]
        assert chosen.sums("shots", chosen.inner("shots", "frames")).tolist() == [sum(of) for of in frames]
        assert [of.tolist() for of in chosen.inner_of("shots", "frames")] == frames
        assert [chosen.texts[k] for k in chosen.column("caption")] == [scenes[row].caption for row in rows]
        assert chosen.chosen("split", "train").tolist() == [scenes[row].split == "train" for row in rows]
        with pytest.raises(IndexError):
            table[len(scenes)]


@settings(deadline=None)
@given(st.dictionaries(TEXT, TEXT, max_size=9))
def test_a_map_of_texts(texts):
    columns = TextMap.of(texts)
    assert dict(columns) == texts
    for name in [*texts, *string.ascii_letters]:
        assert columns.get(name) == texts.get(name)


def test_numbers_take_as_few_bytes_as_they_need():
    columns = scene_table([SceneEntry(name="a", source="a", split="train", caption="", shots=(), shard=3, record=0)])
    assert {columns.column(name).dtype for name in ("name", "shard", "record")} == {np.dtype(np.int32)}
    assert columns.column("split").dtype == np.uint8
