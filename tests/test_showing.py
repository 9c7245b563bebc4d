"""Values and names in messages: on one line, and never at great length."""

from pathlib import Path

import numpy as np
import pytest

from moc_jax.showing import named, printable, shown


class Odd:
    def __repr__(self):
        raise RuntimeError


ODD = {"text": "x" * 10**6, "list": list(range(10**6)), "number": 10**5000, "array": np.zeros((99, 99)), "repr": Odd()}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_values_are_cut_short_and_on_one_line(value):
    assert len(shown(value)) < 400
    assert shown(value).isprintable()


def test_short_values_are_shown_whole():
    assert [shown(value) for value in ("a\n'b'", 10**20, (1, 2))] == [r'''"a\n'b'"''', str(10**20), "(1, 2)"]
    assert "Odd" in shown(Odd())
    assert shown(10**5000) == "an integer of about 4,983 digits"


def test_names_are_on_one_line_that_can_be_encoded():
    assert printable("a\nb\udcff\0ä 🚲") == r"a\nb\udcff\x00ä 🚲"
    assert named(Path("videos/a\nb.mp4")) == r"videos/a\nb.mp4"
    assert named("gs://bucket/run") == "gs://bucket/run"
    assert named("x" * 500) == "x" * 120 + "… (500 characters)"
