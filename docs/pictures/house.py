"""The pictures of the architecture: the modules by layers, and how data flows through them.

A test reads the imports of the package and compares: a module may import those of lower layers, and those to its right.
"""

import pathlib

from svg import INK, MUTED, OWN, PICK, TEXT, Picture

# From top to bottom. Each module: what it holds, and its colour.
LAYERS: tuple[tuple[str, dict[str, tuple[str, str]]], ...] = (
    ("programs", {"commands": ("moc-train, moc-sample", INK), "planning": ("what a pod will need", INK)}),
    (
        "runs",
        {
            "training": ("state, step, loop, metrics", INK),
            "sampling": ("storyboard to video", INK),
            "weights": ("public files of weights", TEXT),
            "cli": ("command lines, exit codes", MUTED),
        },
    ),
    (
        "on disk",
        {
            "checkpoint": ("save, restore, resume", MUTED),
            "checkpoint_base": ("what adapters adapt", MUTED),
            "public_weights": ("read and written", TEXT),
            "compilation": ("compiled programs, kept", MUTED),
        },
    ),
    (
        "building blocks",
        {
            "models": ("the transformers", OWN),
            "diffusion": ("process, solvers", OWN),
            "data": ("shots, shards, batches", OWN),
            "cuts": ("chunks cut by hand", TEXT),
            "checkpoint_layout": ("what it holds", MUTED),
        },
    ),
    (
        "parts",
        {
            "attention": ("Mixture of Contexts", PICK),
            "codecs": ("video and latents", OWN),
            "text": ("captions to embeddings", OWN),
            "processes": ("several hosts", MUTED),
            "digest": ("checksums of weights", MUTED),
        },
    ),
    (
        "forms",
        {
            "scene": ("shots and chunks", TEXT),
            "tensor_files": ("public weights' files", MUTED),
            "files": ("all or nothing", MUTED),
            "checkpoint_names": ("which are steps", MUTED),
            "stories": ("others' scene files", TEXT),
            "provenance": ("what made a video", TEXT),
            "config_json": ("configs as JSON", MUTED),
            "sharding": ("rules of the mesh", MUTED),
            "mesh": ("where devices lie", MUTED),
        },
    ),
    (
        "settings",
        {
            "dialogue": ("with users' commands", MUTED),
            "config": ("every setting, checked", TEXT),
            "documents": ("strict YAML", MUTED),
            "reading": ("strict text and JSON", MUTED),
            "showing": ("values in messages", MUTED),
            "cloud": ("objects in buckets", MUTED),
        },
    ),
    (
        "leaves",
        {
            "shapes": ("glossary, array types", TEXT),
            "chips": ("their data sheets", MUTED),
            "errors": ("clear causes", MUTED),
            "signals": ("Ctrl-C, SIGTERM", MUTED),
            "watcher": ("lost processes", MUTED),
            "progress": ("while one waits", MUTED),
            "timing": ("runs of a program", MUTED),
            "phases": ("seconds until a result", MUTED),
            "flags": ("options of XLA", MUTED),
        },
    ),
)
_LEFT, _RIGHT, _HIGH, _STEP = 150, 1010, 50, 68


def draw_layers(path: pathlib.Path) -> None:
    """Writes the picture of the modules."""
    picture = Picture(1040, 60 + _STEP * len(LAYERS), "The modules of moc_jax by layers; imports point down")
    for i, (layer, modules) in enumerate(LAYERS):
        y = 28 + _STEP * i
        picture.text(24, y + 30, layer, size=12.5, colour=MUTED)
        gap = 10
        width = min(280, (_RIGHT - _LEFT - gap * (len(modules) - 1)) / len(modules))
        for j, (name, (words, colour)) in enumerate(modules.items()):
            _module(picture, _LEFT + j * (width + gap), y, width, name, words, colour)
    bottom = 28 + _STEP * (len(LAYERS) - 1) + _HIGH
    picture.line(1025, 34, 1025, bottom - 8, MUTED, 1.2)
    picture.path(f"M1021 {bottom - 10}h8l-4 8z", fill=MUTED)
    picture.text(
        _LEFT,
        bottom + 24,
        "A module imports only what lies in lower layers, or to its right in its own.",
        size=12,
        colour=MUTED,
    )
    picture.save(path)


def _module(picture: Picture, x: float, y: float, width: float, name: str, words: str, colour: str) -> None:
    strong = colour not in (MUTED, INK)
    fill = colour if strong else "#ffffff"
    picture.box(x, y, width, _HIGH, fill, radius=7, stroke=colour, stroke_width=1.4)
    on = "#ffffff" if strong else INK
    picture.text(x + width / 2, y + 22, name, size=13, colour=on, anchor="middle", bold=True)
    picture.text(x + width / 2, y + 39, words, size=11, colour=on if strong else MUTED, anchor="middle")


# ------------------------------------------------------------------------------------------------ the flow


def draw_flow(path: pathlib.Path) -> None:
    """Writes the picture of the data's way."""
    picture = Picture(1040, 450, "From video files to a model, and from a storyboard to a video")
    _lane(picture, 44, "training", _TRAINING)
    _lane(picture, 376, "sampling", _SAMPLING)
    _transformer(picture)
    _arrow(picture, 941, 94, 941, 152)
    _arrow(picture, 602, 376, 602, 324)
    _arrow(picture, 670, 324, 670, 376)
    picture.text(931, 126, "noisy scene, t of each shot", size=11, colour=MUTED, anchor="end")
    picture.text(592, 356, "noise, captions", size=11, colour=MUTED, anchor="end")
    picture.text(680, 356, "velocity", size=11, colour=MUTED)
    picture.save(path)


_TRAINING = (
    ("video files", "and captions", MUTED),
    ("data", "shots, frames", OWN),
    ("codecs", "frames to latents", OWN),
    ("text", "captions to vectors", OWN),
    ("data", "shards, batches", OWN),
    ("diffusion", "noise, per shot", OWN),
)
_SAMPLING = (
    ("storyboard", "captions, pictures", MUTED),
    ("sampling", "shots, noise", INK),
    ("text", "captions to vectors", OWN),
    ("diffusion", "solver, guidance", OWN),
    ("codecs", "latents to frames", OWN),
    ("video", "and pictures", MUTED),
)


def _lane(picture: Picture, y: float, name: str, steps) -> None:
    picture.text(24, y - 14, name, size=12.5, colour=MUTED)
    width, gap = 140.0, 29.6
    for i, (step, words, colour) in enumerate(steps):
        x = 24 + i * (width + gap)
        _module(picture, x, y, width, step, words, colour)
        if i:
            _arrow(picture, x - gap + 3, y + _HIGH / 2, x - 3, y + _HIGH / 2)


def _arrow(picture: Picture, x1: float, y1: float, x2: float, y2: float) -> None:
    picture.line(x1, y1, x2, y2, INK, 1.4)
    across, along = (4, 0) if x1 == x2 else (0, 4), (0, 1) if x1 == x2 else (1, 0)
    sign = 1 if (y2 - y1) + (x2 - x1) > 0 else -1
    back = x2 - sign * 8 * along[0], y2 - sign * 8 * along[1]
    ends = [(back[0] - across[0], back[1] - across[1]), (back[0] + across[0], back[1] + across[1])]
    picture.path(f"M{x2} {y2}L{ends[0][0]} {ends[0][1]}L{ends[1][0]} {ends[1][1]}Z", fill=INK)


def _transformer(picture: Picture) -> None:
    """The model in the middle, which both lanes call."""
    x, y, width, height = 190, 152, 826, 172
    picture.box(x, y, width, height, "#f4f7fd", radius=10, stroke=OWN, stroke_width=1.4)
    picture.text(x + 18, y + 26, "models", size=13, colour=OWN, bold=True)
    picture.text(
        x + 76, y + 26, "text and video have weights of their own and meet in attention", size=11.5, colour=MUTED
    )
    steps = (
        ("patches", "tokens, chunk table", TEXT),
        ("q, k, v", "norm, rotary positions", OWN),
        ("attention", "route, anchors, picks", PICK),
        ("MLP", "residual", OWN),
        ("velocity", "of every latent", TEXT),
    )
    for i, (name, words, colour) in enumerate(steps):
        at = x + 18 + i * 160
        _module(picture, at, y + 52, 148, name, words, colour)
        if i:
            _arrow(picture, at - 11, y + 77, at - 2, y + 77)
    left, right = x + 18 + 160, x + 18 + 3 * 160 + 148
    picture.path(f"M{left} {y + 110}v8H{right}v-8", stroke=MUTED, width=1.2)
    picture.text((left + right) / 2, y + 134, "a block, repeated", size=11.5, colour=MUTED, anchor="middle")
    picture.box(24, y + 52, 140, _HIGH, "#ffffff", radius=7, stroke=INK, stroke_width=1.4)
    picture.text(94, y + 74, "training", size=13, anchor="middle", bold=True)
    picture.text(94, y + 91, "loss, update, average", size=11, colour=MUTED, anchor="middle")
    _arrow(picture, x, y + 77, 168, y + 77)
    picture.box(24, y + 122, 140, _HIGH, "#ffffff", radius=7, stroke=MUTED, stroke_width=1.4)
    picture.text(94, y + 144, "checkpoint", size=13, anchor="middle", bold=True)
    picture.text(94, y + 161, "weights, codec, config", size=11, colour=MUTED, anchor="middle")
    _arrow(picture, 94, y + 104, 94, y + 120)
    _arrow(picture, 166, y + 147, x - 2, y + 147)
