"""How long a large data set takes to open, and in how much memory: `python -m benchmarks.manifest`.

A manifest of that many scenes with captions of their own is made up; all shards are links to one. A fresh process then
opens it and starts a pipeline, as training does, and reports seconds and the most memory that it held.
"""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from moc_jax.config import Config, DataConfig, HashConfig, MMDiTConfig, PcaConfig
from moc_jax.data.arrays_file import write_arrays
from moc_jax.data.caption_store import store_folder
from moc_jax.data.manifest import (
    Manifest,
    SceneEntry,
    ShardEntry,
    ShotEntry,
    latent_shape,
    load_manifest,
    scene_table,
    settings_of,
    shard_table,
    source_map,
)
from moc_jax.data.pipeline import make_pipeline
from moc_jax.data.shards import ShardWriter
from moc_jax.data.table import Table

_SCENES, _SHOTS = 10, 3  # of a video, of a scene
_TOKENS = 8  # of a caption


def config(folder: Path) -> Config:
    """Small latents and embeddings: what is measured does not depend on their size."""
    return Config(
        model=MMDiTConfig(dim=24, heads=2, depth=1, patch=(1, 1, 1), latent_channels=4, text_dim=16),
        codec=PcaConfig(stride=(4, 4, 4), channels=4),
        text=HashConfig(dim=16),
        data=DataConfig(cache=str(folder), height=8, width=12),
    )


def make(folder: Path, scenes: int) -> Path:
    """Makes a prepared folder of so many scenes in `folder`, which becomes a cache; returns it."""
    cfg, videos = config(folder), -(-scenes // _SCENES)
    random = np.random.default_rng(0)
    frames = random.integers(2, 26, _SCENES * _SHOTS)
    file = folder / "one.array_record"
    with ShardWriter(file) as writer:
        for number in frames.tolist():
            writer.write(
                np.zeros((number, *latent_shape(cfg)), np.float32), np.zeros((1, 1, *latent_shape(cfg)), np.float32)
            )
    shards = []
    for video in range(videos):
        key = hashlib.md5(str(video).encode(), usedforsecurity=False).hexdigest()
        shard = ShardEntry(
            file=f"encoded/{key[:2]}/{key}.array_record", records=len(frames), size=file.stat().st_size, sha256="0" * 64
        )
        shards.append(shard)
        (folder / "encoded" / key[:2]).mkdir(parents=True, exist_ok=True)
        (folder / shard.file).symlink_to(file)
    captions = [f"scene {k}: a red boat at noon, seen from the hill above the harbor" for k in range(scenes)]
    prepared = folder / "prepared"
    prepared.mkdir()
    Manifest(
        folder=prepared,
        fingerprint="prepared",
        settings=settings_of(cfg),
        origin=("",),
        sources=source_map({f"videos/{k:07}.mp4": f"{k:064x}" for k in range(videos)}),
        codec_fingerprint="",
        codec_psnr={},
        latent_shape=latent_shape(cfg),
        scenes=_scenes(captions, frames),
        shards=shard_table(shards),
        skipped={},
        notes=(),
        counts=dict.fromkeys(("files", "shots", "short_shots", "frames", "unused_frames", "latent_frames"), 0),
    ).save()
    _embed([*captions, "", *(f"shot {k + 1}" for k in range(_SHOTS))], store_folder(folder, cfg.text))
    return prepared


def _scenes(captions: list[str], frames: np.ndarray) -> Table[SceneEntry]:
    """As `scene_table` makes it of entries, without those."""
    count, videos = len(captions), -(-len(captions) // _SCENES)
    shot = ShotEntry(caption="", frames=1, start=0, continues=False)
    model = scene_table(
        [SceneEntry(name="", source="", split="train", caption="", shots=(shot,), shard=0, record=0)]
    ).columns
    names = [f"videos/{k // _SCENES:07}.mp4#{k % _SCENES}" for k in range(count)]
    texts = [
        *names,
        *(f"videos/{k:07}.mp4" for k in range(videos)),
        *captions,
        *(f"shot {k + 1}" for k in range(_SHOTS)),
    ]
    of_scene, of_shot = np.arange(count), np.arange(count * _SHOTS)
    columns = {
        "scenes.name": of_scene,
        "scenes.source": count + of_scene // _SCENES,
        "scenes.caption": count + videos + of_scene,
        "scenes.shots.ends": _SHOTS * (of_scene + 1),
        "scenes.shots.caption": 2 * count + videos + of_shot % _SHOTS,
        "scenes.shots.frames": frames[of_shot % len(frames)],
        "scenes.shard": of_scene // _SCENES,
        "scenes.record": _SHOTS * (of_scene % _SCENES),
        "scenes.texts": np.frombuffer("".join(texts).encode(), np.uint8),
        "scenes.text_ends": np.cumsum([len(text) for text in texts]),
    }
    rest = {
        name: np.repeat(c, count * (_SHOTS if "shots." in name else 1))
        for name, c in model.items()
        if name not in columns
    }
    return Table(SceneEntry, rest | {name: c.astype(model[name].dtype) for name, c in columns.items()}, "scenes.")


def _embed(captions: list[str], folder: Path) -> None:
    folder.mkdir()
    rows = np.zeros((_TOKENS, 16), np.float32)
    keys = b"".join(hashlib.blake2b(caption.encode(), digest_size=16).digest() for caption in captions)
    arrays = {
        "keys": np.frombuffer(keys, np.uint8).reshape(-1, 16),
        "ends": _TOKENS * np.arange(1, len(captions) + 1),
        "checksums": np.full(len(captions), zlib.crc32(rows.view(np.uint8)), np.uint32),
        "rows": np.zeros((_TOKENS * len(captions), 16), np.float32),
    }
    write_arrays(folder / "all.captions", arrays)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What opening takes."""

    manifest: float
    """Seconds until the manifest is open and all shards are found."""
    pipeline: float
    """Seconds from then on until the first batch is there."""
    memory: float
    """GB that the process held at most until then, imports and mapped files included."""
    memory_at_the_end: float
    """The same with the pipeline."""


def measure(prepared: Path) -> Measured:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.manifest", "--open", str(prepared)]
    return Measured(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _open(prepared: Path) -> Measured:
    cfg = config(prepared.parent)
    begin = time.perf_counter()
    manifest = load_manifest(prepared)
    opened, memory = time.perf_counter(), _memory()
    data = make_pipeline(cfg, manifest, split="train")
    next(data)
    started = time.perf_counter()
    data.close()
    return Measured(opened - begin, started - opened, memory, _memory())


def _memory() -> float:
    """The most of this program alone; what getrusage gives begins with the most of its parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1_000_000)
    parser.add_argument("--open", type=Path, help="only open this prepared folder, and print JSON")
    args = parser.parse_args()
    if args.open:
        print(json.dumps(dataclasses.asdict(_open(args.open))))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(make(Path(folder), args.scenes))
    print(f"{args.scenes:,} scenes: open in {found.manifest:.1f} s with {found.memory:.2f} GB")
    print(f"first batch {found.pipeline:.1f} s later, with {found.memory_at_the_end:.2f} GB at most")


if __name__ == "__main__":
    main()
