"""The routing atlas: one HTML file, without network, in which a click on a patch shows what its heads read.

Frames are JPEGs inside of the file. Picks are one array [T, depth, H, F, Y, X, K] of chunk numbers, of 8 bits where
they suffice, else 16, in base64; the highest number is an empty slot. Where they would take more than `LIMIT`, only
every n-th row and column of patches can be clicked, and is meant with its neighbours.
"""

import base64
import io
import json
import os

import numpy as np
from PIL import Image

from moc_jax.files import write_text
from moc_jax.sampling.generate import Sample, SamplingError
from moc_jax.sampling.picks import Picks
from moc_jax.shapes import UInt8

LEVELS = 0.9, 0.5, 0.1
"""Noise levels that an atlas shows."""
LIMIT = 16 << 20
"""Bytes of picks."""
_WIDEST = 240  # pixels of a frame


class AtlasError(SamplingError):
    """An atlas that cannot be made or written: says why."""


def save_atlas(html: str, path: str | os.PathLike, *, replace: bool = True) -> None:
    """Writes the file, which appears under its name only when it is complete.

    Raises:
        TakenError: there is another file, and it is not to be replaced; see `whole_file`.
        AtlasError: the file cannot be written, for instance because the disk is full.
    """
    try:
        write_text(path, html, replace=replace)
    except OSError as error:
        raise AtlasError(
            f"{os.fspath(path)} cannot be written ({error.strerror or error}); free some space, or write elsewhere"
        ) from error


def atlas(sample: Sample, picks: Picks, limit: int = LIMIT) -> str:
    """The page of one sampled scene.

    Raises:
        AtlasError: there are more chunks than 16 bits number, or even one patch per frame has too many picks.
    """
    empty = 255 if len(picks.shot) < 255 else 65535
    if len(picks.shot) > empty:
        raise AtlasError(f"the scene has {len(picks.shot):,} chunks; an atlas shows at most {empty:,}: use larger ones")
    dtype = np.dtype("u1" if empty == 255 else "<u2")
    frames, rows, columns = picks.grid
    routes = picks.routes.reshape(*picks.routes.shape[:3], *picks.grid, -1)
    every = 1
    while (shown := routes[:, :, :, :, ::every, ::every]).size * dtype.itemsize > limit:
        if every >= max(rows, columns):
            raise AtlasError(f"{picks.routes.size:,} picks are too many for an atlas; give fewer or shorter shots")
        every += 1
    numbers = np.where(shown < 0, empty, shown).astype(dtype)
    captions = ["→ " * shot.continues + shot.caption for shot in sample.storyboard.shots]  # those that continue one
    data = {
        "caption": sample.storyboard.caption,
        "levels": picks.levels,
        "shape": numbers.shape,
        "bits": 8 * dtype.itemsize,
        "every": every,
        "grid": picks.grid,
        "chunks": np.stack([picks.shot, picks.start, picks.length], axis=1).tolist(),
        "captions": captions,
        "shots": _shots_of_frames(sample, frames),
        "frames": _pictures(sample, frames),
        "picks": base64.b64encode(numbers.tobytes()).decode(),
    }
    text = json.dumps(data).replace("<", "\\u003c")  # nothing in it ends the script
    return _PAGE.replace("{{data}}", text)


def _shots_of_frames(sample: Sample, frames: int) -> list[int]:
    """The shot of each frame of tokens."""
    sizes = [len(latents) for latents in sample.latents]
    stride = sum(sizes) // frames  # latent frames per token
    return [shot for shot, size in enumerate(sizes) for _ in range(size // stride)]


def _pictures(sample: Sample, frames: int) -> list[str]:
    """A JPEG for each frame of tokens: the picture in the middle of what it stands for."""
    found = []
    stride = sum(map(len, sample.latents)) // frames
    for pixels, latents in zip(sample.shots, sample.latents):
        tokens = len(latents) // stride
        for n in range(tokens):
            found.append(_jpeg(pixels[min(len(pixels) - 1, int((n + 0.5) * len(pixels) / tokens))]))
    return found


def _jpeg(frame: UInt8[np.ndarray, "Y X 3"]) -> str:
    image = Image.fromarray(frame)
    image.thumbnail((_WIDEST, _WIDEST))
    written = io.BytesIO()
    image.save(written, "jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Routing atlas</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; background: #fcfcfa; color: #1d2330; margin: 24px; }
header { position: sticky; top: 0; background: #fcfcfaee; padding: 4px 0 12px; z-index: 1; }
h1 { font-size: 19px; margin: 0 0 8px; }
label { margin-right: 20px; }
#said { color: #7d8493; margin: 8px 0 0; }
section { margin: 0 0 18px; }
h2 { font-size: 14px; font-weight: 500; margin: 0 0 4px; }
.frames { display: flex; flex-wrap: wrap; gap: 6px; }
canvas { width: 160px; cursor: crosshair; display: block; image-rendering: pixelated; }
</style>
<header>
<h1 id="caption"></h1>
<label>noise <select id="level"></select></label>
<label>layer <select id="layer"></select></label>
<label>head <select id="head"></select></label>
<p id="said" aria-live="polite">Click a patch: blue is what it reads, the darker the more of its heads.</p>
</header>
<main></main>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [levels, depth, heads, frames, rows, columns, slots] = data.shape;
const [, tokenRows, tokenColumns] = data.grid;
const bytes = Uint8Array.from(atob(data.picks), (c) => c.charCodeAt(0));
const picks = data.bits === 8 ? bytes : new Uint16Array(bytes.buffer);
const empty = data.bits === 8 ? 255 : 65535;
const byId = (id) => document.getElementById(id);
let asked = null; // frame, row and column of the patch, in shown patches

function options(select, names) {
  names.forEach((name, value) => select.add(new Option(name, value)));
  select.onchange = draw;
}
const numbers = (count, all) => [all, ...Array.from({ length: count }, (_, n) => String(n + 1))];
options(byId("level"), data.levels.map((t) => `t = ${t}`));
options(byId("layer"), numbers(depth, "all"));
options(byId("head"), numbers(heads, "all"));
byId("caption").textContent = data.caption;

const canvases = [];
const sections = data.captions.map((caption, shot) => {
  const section = document.querySelector("main").appendChild(document.createElement("section"));
  section.appendChild(document.createElement("h2")).textContent = `${shot + 1}. ${caption}`;
  return Object.assign(section.appendChild(document.createElement("div")), { className: "frames" });
});
data.frames.forEach((source, frame) => {
  const canvas = sections[data.shots[frame]].appendChild(document.createElement("canvas"));
  const image = new Image();
  image.onload = () => {
    [canvas.width, canvas.height] = [image.width, image.height];
    draw();
  };
  image.src = source;
  canvas.onclick = (event) => {
    const box = canvas.getBoundingClientRect();
    const cell = (at, size, count, shown) =>
      Math.min(shown - 1, Math.floor(Math.floor((at / size) * count) / data.every));
    asked = [
      frame,
      cell(event.clientY - box.top, box.height, tokenRows, rows),
      cell(event.clientX - box.left, box.width, tokenColumns, columns),
    ];
    draw();
  };
  canvases.push({ canvas, image });
});

// The share of the heads and layers chosen that read each chunk.
function read([frame, row, column]) {
  const level = Number(byId("level").value);
  const some = (id, count) => {
    const chosen = Number(byId(id).value);
    return chosen ? [chosen - 1] : Array.from({ length: count }, (_, n) => n);
  };
  const [layers, chosenHeads] = [some("layer", depth), some("head", heads)];
  const shares = new Map();
  for (const layer of layers)
    for (const head of chosenHeads) {
      const at = ((((level * depth + layer) * heads + head) * frames + frame) * rows + row) * columns + column;
      for (let slot = 0; slot < slots; slot++) {
        const chunk = picks[at * slots + slot];
        if (chunk !== empty) shares.set(chunk, (shares.get(chunk) || 0) + 1 / (layers.length * chosenHeads.length));
      }
    }
  return shares;
}

function draw() {
  const shares = asked ? read(asked) : new Map();
  const weight = new Float32Array(canvases.length * tokenRows * tokenColumns);
  const ofShot = new Map();
  for (const [chunk, share] of shares) {
    const [shot, start, length] = data.chunks[chunk];
    weight.fill(share, start, start + length);
    ofShot.set(shot, (ofShot.get(shot) || 0) + share);
  }
  canvases.forEach(({ canvas, image }, frame) => {
    const context = canvas.getContext("2d");
    if (!canvas.width || !image.complete) return;
    context.globalAlpha = 1;
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalAlpha = asked ? 0.55 : 1;
    context.drawImage(image, 0, 0);
    const [high, wide] = [canvas.height / tokenRows, canvas.width / tokenColumns];
    for (let row = 0; row < tokenRows; row++)
      for (let column = 0; column < tokenColumns; column++) {
        const share = weight[(frame * tokenRows + row) * tokenColumns + column];
        if (!share) continue;
        context.globalAlpha = 0.25 + 0.6 * Math.min(1, share);
        context.fillStyle = "#12509f";
        context.fillRect(column * wide, row * high, wide, high);
      }
    context.globalAlpha = 1;
    if (asked && asked[0] === frame) {
      context.strokeStyle = "#c2570c";
      context.lineWidth = Math.max(2, canvas.width / 60);
      const size = data.every;
      context.strokeRect(asked[2] * size * wide, asked[1] * size * high, size * wide, size * high);
    }
  });
  if (!asked) return;
  const total = [...ofShot.values()].reduce((sum, share) => sum + share, 0);
  const parts = [...ofShot].sort((a, b) => b[1] - a[1]);
  byId("said").textContent = total
    ? "Its picks: " + parts.map(([shot, share]) => `shot ${shot + 1} ${Math.round((100 * share) / total)} %`).join(", ")
    : "It picks nothing: only its own shot and captions are read.";
}
</script>
</html>
"""
