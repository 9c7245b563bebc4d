"""Hashed words: which words a caption has, and that their vectors are the same everywhere."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from moc_jax.config import HashConfig
from moc_jax.text import build_text_encoder
from moc_jax.text.hashed import split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  \n\t ...!? ", []),
        ("A man's bike, 3.5 km - £5!", ["a", "man's", "bike", "3", "5", "km", "£", "5"]),
        ("'quoted' rock’n’roll dogs'", ["quoted", "rock'n'roll", "dogs"]),
        ("Straße ÉCLAIR ﬁlm", ["strasse", "éclair", "film"]),
        ("Он едет на велосипеде", ["он", "едет", "на", "велосипеде"]),
        ("أمشي إلى البيت", ["أمشي", "إلى", "البيت"]),
        ("एक आदमी साइकिल", ["एक", "आदमी", "साइकिल"]),
        ("한국어 자전거", ["한국어", "자전거"]),
        ("自転車に乗る。", ["自", "転", "車", "に", "乗", "る"]),
        ("骑自行车 bike 2台", ["骑", "自", "行", "车", "bike", "2", "台"]),
        ("ปั่นจักร", ["ปั่", "น", "จั", "ก", "ร"]),
        ("🚲 and ☕", ["🚲", "and", "☕"]),
    ],
)
def test_words(text, words):
    assert split_words(text) == words


def test_vectors_are_read_off_a_standard_hash():
    """Golden values: a change here would silently break every checkpoint."""
    embedding = build_text_encoder(HashConfig(dim=8))("Bike")
    assert embedding.dtype == np.float32
    assert embedding.shape == (2, 8)
    stream = hashlib.shake_256(b"moc_jax hashed word 1:bike").digest(16)
    expected = [(int.from_bytes(stream[2 * k : 2 * k + 2], "little") + 0.5) / 32768 - 1 for k in range(8)]
    np.testing.assert_allclose(embedding[1], np.sqrt(3) * np.array(expected), rtol=1e-6)
    np.testing.assert_allclose(embedding[1, :4], GOLDEN, rtol=1e-5)


GOLDEN = [-0.882385, -0.408672, 0.905695, 0.832698]


def test_same_in_another_process():
    script = (
        "from moc_jax.config import HashConfig; from moc_jax.text import build_text_encoder; import sys;"
        "sys.stdout.write(build_text_encoder(HashConfig(dim=16))('Ein Rad, 自転車').tobytes().hex())"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True).stdout
    assert other == build_text_encoder(HashConfig(dim=16))("Ein Rad, 自転車").tobytes().hex()


def test_empty_caption_is_the_begin_token():
    encoder = build_text_encoder(HashConfig())
    assert encoder("").shape == (1, 256)
    np.testing.assert_array_equal(encoder("")[0], encoder("a b")[0])
    # No word can be mistaken for it.
    assert not any(np.array_equal(row, encoder("")[0]) for row in encoder("begin \x02 start")[1:])


def test_words_are_far_apart():
    rows = build_text_encoder(HashConfig(dim=256))(" ".join(f"word{k}" for k in range(60)))
    gram = rows @ rows.T / 256
    np.testing.assert_allclose(np.diag(gram), 1, atol=0.25)
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 0.35
    assert abs(rows.mean()) < 0.05


def test_too_long_names_count_limit_and_fix():
    encoder = build_text_encoder(HashConfig(max_tokens=5))
    assert len(encoder("one two three four")) == 5
    with pytest.raises(ValueError, match=r"'one two .*has 6 tokens.*text.max_tokens is 5.*raise text.max_tokens"):
        encoder("one two three four five")


def test_a_batch_is_each_caption_alone():
    encoder = build_text_encoder(HashConfig(dim=8))
    captions = ["", "a bike", "Ein Rad, 自転車"]
    for together, alone in zip(encoder.batch(captions), map(encoder, captions), strict=True):
        np.testing.assert_array_equal(together, alone)
