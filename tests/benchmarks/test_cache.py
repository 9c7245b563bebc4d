"""benchmarks/cache.py end to end on a small model."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import cache
from moc_jax.attention.kept import SMALL, Kept, Rows


@pytest.mark.parametrize("small", [False, True])
def test_what_is_timed_reads_no_zeros(small):
    rows = jnp.zeros((1, 1, 3 * 8, 2, 4), SMALL if small else jnp.bfloat16)
    of_layers = Rows(rows, jnp.zeros(rows.shape[:-1]) if small else None)
    text, phi = jnp.zeros((1, 1, 3, 5, 2, 4), jnp.bfloat16), jnp.zeros((1, 1, 3, 2, 7, 4))
    found = cache._random(3, Kept(of_layers, of_layers, text, text, phi))
    for x, given in zip(
        jax.tree.leaves(found), jax.tree.leaves(Kept(of_layers, of_layers, text, text, phi)), strict=True
    ):
        assert (x.shape, x.dtype) == (given.shape, given.dtype)
        assert jnp.mean(x.astype(jnp.float32) == 0) < 0.1


@pytest.mark.long
def test_a_step_is_stored_beside_the_whole_scenes(tmp_path, capsys):
    size = ["--shots", "3", "--frames", "2", "--rows", "8", "--columns", "8", "--caption", "2", "--repeats", "1"]
    network = ["--model.dim", "16", "--model.depth", "2", "--model.heads", "2", "--model.text-dim", "8"]
    cache.run([*size, *network, "--moc.chunk.size", "8", "--moc.top-k", "2", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("cache-*.json")
    ((name, entry),) = json.loads(file.read_text())["entries"].items()
    assert name == "3 shots, 2 layers of 16, xla"
    assert entry["tokens"] == 3 * 2 * 16
    # Keys, values and float32 means in two heads of 8: rows of a layer are filled up to a multiple of 128.
    rows, chunks, width = 128 + 4 * 2, 1 + 3 + 14, 2 * 8
    assert entry["kept_bytes"] == 2 * (2 * rows * width * 2 + chunks * width * 4)
    picked = 32 * 2 * 8  # each of the last shot's tokens two chunks of 8
    assert entry["picks_ms"] == pytest.approx(4 * 8 * 2 * 2 * picked / entry["flops_per_second"] * 1e3)
    assert entry["ratio"] == entry["step"]["median_ms"] / entry["bound_ms"]
    assert entry["whole"]["median_ms"] > 0
    assert "GiB are kept" in capsys.readouterr().out
