"""The routing atlas: the page holds every pick, and a click on a patch says what its heads read."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from moc_jax.sampling import atlas as page
from moc_jax.sampling.atlas import AtlasError, atlas, save_atlas
from moc_jax.sampling.generate import Sample
from moc_jax.sampling.picks import Picks
from moc_jax.sampling.storyboard import Shot, Storyboard

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHAPE = 2, 3, 2, 4, 2, 4, 2  # levels, layers, heads, frames, rows, columns, slots


def sample_and_picks(chunks=12):
    """Two shots of two frames of 2 x 4 patches; chunks are a caption's, then rows of four patches, 8 of them."""
    shots = tuple(np.full((5, 16, 32, 3), shade, np.uint8) for shade in (60, 200))
    board = Storyboard(
        caption="<b>A</b> </script>", shots=(Shot(caption="one", seconds=1), Shot(caption="t<w>o", seconds=1))
    )
    latents = tuple(np.zeros((2, 2, 4, 8), np.float32) for _ in shots)
    shot, start = np.full(chunks, -1), np.zeros(chunks, int)
    shot[1:9], start[1:9] = np.repeat([0, 1], 4), np.arange(8) * 4
    length = np.where(shot >= 0, 4, 0)
    routes = np.full(SHAPE, -1)
    routes[:, :, :, 2:] = 1 + np.arange(2)  # the second shot reads both rows of the first shot's first frame
    routes[1, 2, 1, 3, 1, 3] = 4, 3  # at t = 0.1 in layer 3, head 2, its last patch reads the second frame's
    tokens = routes.reshape(*SHAPE[:3], -1, SHAPE[-1])
    of = {name: x.astype(np.int32) for name, x in (("shot", shot), ("start", start), ("length", length))}
    return Sample(board, shots, latents), Picks(levels=(0.9, 0.1), routes=tokens, grid=(4, 2, 4), **of), routes


def data_of(html):
    (text,) = re.findall(r'(?s)<script type="application/json" id="data">(.*?)</script>', html)
    data = json.loads(text)
    dtype = {8: "u1", 16: "<u2"}[data["bits"]]
    return data, np.frombuffer(base64.b64decode(data["picks"]), dtype).reshape(data["shape"]).astype(int)


@pytest.mark.parametrize("chunks", [12, 300])
def test_the_page_holds_all_picks_frames_and_captions(chunks):
    sample, picks, routes = sample_and_picks(chunks)
    html = atlas(sample, picks)
    data, found = data_of(html)
    np.testing.assert_array_equal(np.where(found == (255 if chunks == 12 else 65535), -1, found), routes)
    assert data["caption"] == "<b>A</b> </script>"
    assert data["captions"] == ["one", "t<w>o"]
    assert data["shots"] == [0, 0, 1, 1]
    assert data["chunks"][5] == [1, 16, 4]
    assert len(data["frames"]) == 4
    assert all(base64.b64decode(frame.split(",")[1]).startswith(b"\xff\xd8") for frame in data["frames"])
    assert not re.search(r"https?://|src=|href=|@import|url\(", html)  # nothing is fetched


def test_too_many_picks_are_thinned_and_then_refused():
    sample, picks, routes = sample_and_picks()
    data, found = data_of(atlas(sample, picks, limit=routes.size // 4))
    assert (data["every"], found.shape[4:6]) == (2, (1, 2))
    np.testing.assert_array_equal(np.where(found == 255, -1, found), routes[:, :, :, :, ::2, ::2])
    with pytest.raises(AtlasError, match=r"768 picks are too many for an atlas; give fewer or shorter shots"):
        atlas(sample, picks, limit=10)


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_text", full)
    with pytest.raises(AtlasError, match=r"a\.html cannot be written \(No space left on device\)"):
        save_atlas("", tmp_path / "a.html")


CLICK = """<script>
window.onload = () => {
  byId("level").value = LEVEL; byId("layer").value = LAYER; byId("head").value = HEAD;
  const canvas = document.querySelectorAll("canvas")[FRAME], box = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new MouseEvent("click", { clientX: box.right - 1, clientY: box.bottom - 1 }));
  const lit = [...document.querySelectorAll("canvas")].map((canvas) => {
    const at = (row) => canvas.getContext("2d").getImageData(2, (row + 0.5) * canvas.height / 2, 1, 1).data[0];
    return `${at(0)},${at(1)}`;
  });
  document.body.append(`lit ${lit.join(" ")}.`);
};
</script></html>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize(
    ("frame", "level", "layer", "head", "says", "lit"),
    [
        (3, 0, 0, 0, "Its picks: shot 1 100 %", [(0, 0), (0, 1)]),
        (3, 1, 3, 2, "Its picks: shot 1 100 %", [(1, 0), (1, 1)]),
        (0, 0, 0, 0, "It picks nothing: only its own shot and captions are read.", []),
    ],
)
def test_a_click_shows_what_a_patch_reads(tmp_path, frame, level, layer, head, says, lit):
    html = atlas(*sample_and_picks()[:2])
    click = CLICK
    for name, value in (("LEVEL", level), ("LAYER", layer), ("HEAD", head), ("FRAME", frame)):
        click = click.replace(name, str(value))
    (tmp_path / "atlas.html").write_text(html.replace("</html>", click))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'atlas.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert says in shown
    assert "1. one" in shown
    assert "2. t&lt;w&gt;o" in shown
    (found,) = re.findall(r"lit ([\d, ]+)\.", shown)
    shades = [tuple(map(int, of.split(","))) for of in found.split()]
    plain = [0.55 * shade + 0.45 * 255 for shade in (60, 60, 200, 200)]
    for f, rows in enumerate(shades):
        for row, shade in enumerate(rows):
            assert (shade < plain[f] - 20) == ((f, row) in lit), shades
