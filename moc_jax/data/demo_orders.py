"""The demo's clip in other orders: `python -m moc_jax.data.demo_orders cache/demo/bikes.mp4 cache/demo-orders`.

A film that is as long as one likes needs a model that knows each shot after any others, and the clip has its six in
one order only. This writes the same shots in orders that are drawn, with their captions and cuts, at the demo's size
and rate.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import yaml

from moc_jax.config import DataConfig
from moc_jax.data.film import Film
from moc_jax.data.shots import CutDetector, find_shots
from moc_jax.data.video import decode, write_video
from moc_jax.documents import read_document
from moc_jax.files import write_text

HEIGHT, WIDTH, FPS = 64, 160, 12


def reorder(clip: Path, folder: Path, count: int) -> list[Path]:
    """Writes `count` videos, whose orders are drawn, and captions beside them; returns the videos.

    Args:
        clip: a video with a caption for each shot in the YAML file beside it.

    Raises:
        VideoError: the clip can't be read, or a video can't be written.
        DocumentError: its captions can't be read.
        ValueError: it has more or fewer shots than captions.
    """
    written = read_document(clip.with_suffix(".yaml"))
    assert isinstance(written, dict)
    with tempfile.TemporaryFile() as file:
        film = Film(file, HEIGHT, WIDTH)
        found = find_shots(decode(clip, HEIGHT, WIDTH), FPS, CutDetector(DataConfig().shot_threshold), film)
        shots = [np.array(shot) for shot in found]
    if len(shots) != len(written["shots"]):
        raise ValueError(f"{clip} has {len(shots)} shots, but {len(written['shots'])} captions of shots")
    folder.mkdir(parents=True, exist_ok=True)
    draw, paths = np.random.default_rng(0), list[Path]()
    for number in range(count):
        order = draw.permutation(len(shots))
        ends = np.cumsum([len(shots[shot]) for shot in order]) / FPS
        said = {"caption": written["caption"], "shots": [written["shots"][shot] for shot in order]}
        said["cuts"] = [round(float(end), 3) for end in ends[:-1]]
        paths.append(folder / f"{number:03}.mp4")
        write_video(paths[-1], np.concatenate([shots[shot] for shot in order]), FPS)
        write_text(paths[-1].with_suffix(".yaml"), yaml.safe_dump(said, allow_unicode=True, width=120))
    return paths


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clip", type=Path, help="the video, with its captions in the YAML file beside it")
    parser.add_argument("folder", type=Path, help="where to put the videos")
    parser.add_argument("--count", type=int, default=24, help="how many")
    args = parser.parse_args()
    paths = reorder(args.clip, args.folder, args.count)
    print(f"{len(paths)} videos in {args.folder}")


if __name__ == "__main__":
    main()
