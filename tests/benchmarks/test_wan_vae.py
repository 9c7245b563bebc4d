"""What docs/wan.md says of the autoencoders' pieces."""

import pytest

from benchmarks.wan_vae import counted


@pytest.mark.parametrize(
    ("version", "size", "kept", "flops"),
    [("2.1", (480, 832), (1.1, 1.9), (8.0, 13.5)), ("2.2", (704, 1280), (1.1, 3.2), (12.5, 66.0))],
)
def test_pieces_keep_and_take_what_the_page_says(version, size, kept, flops):
    found = [(round(x / 1e9, 1), round(y / 1e12, 1)) for _, x, y in counted(version, size, 1, "bfloat16")]
    assert found == list(zip(kept, flops))
