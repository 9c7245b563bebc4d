"""Files that moc-sample would write over each other or over what it reads; refused before the checkpoint is opened."""

import re
from pathlib import Path

import pytest
from PIL import Image

from moc_jax.commands import sample
from moc_jax.config import ConfigError

BOARD = "caption: a street\nshots:\n  - {caption: a van, seconds: 0.4, image: first.png}\n"


@pytest.fixture
def boards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    Path("link").symlink_to("d")
    Path("D").symlink_to("d")  # as where letter case makes no name
    Image.new("RGB", (8, 8)).save("first.png")
    Path("a.png").symlink_to("first.png")
    for name in ("a.yaml", "b.yaml"):
        Path(name).write_text(BOARD)
    Path("board.png").write_text(BOARD)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "a.yaml b.yaml --out d --contact-sheet d --routing-picture d",
            "d/a.png and --routing-picture d/a.png are one",
        ),
        ("a.yaml --contact-sheet x.png --routing-picture d/../x.png", "--routing-picture d/../x.png are one file; "),
        ("a.yaml --contact-sheet d/x.png --routing-picture {here}/link/x.png", "d/x.png and --routing-picture {here}/"),
        ("a.yaml --contact-sheet d/x.png --routing-picture d/X.png", "d/x.png and --routing-picture d/X.png are one"),
        ("a.yaml --contact-sheet first.png --overwrite", "first.png, which is read, and --contact-sheet first.png are"),
        ("a.yaml --contact-sheet . --overwrite", "first.png, which is read, and --contact-sheet a.png are one file"),
        ("board.png --routing-picture board.png --overwrite", "board.png, which is read, and --routing-picture board"),
    ],
)
def test_no_file_is_written_over_another_or_over_what_is_read(boards, words, message):
    before = sorted(boards.rglob("*"))
    out = [] if "--out" in words else ["--out", "d/out.mp4"]
    with pytest.raises(ConfigError, match=re.escape(message.format(here=boards))):
        sample.main(["--checkpoint", "none", *out, "--storyboard", *words.format(here=boards).split()])
    assert sorted(boards.rglob("*")) == before
