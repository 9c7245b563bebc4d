"""What the codec loses on your videos: `python -m benchmarks.codec VIDEO_OR_FOLDER...`.

One codec is fitted on the first part of every shot; the rest is held out. PSNR is the mean over shots, for each file
and over the files.
"""

import argparse
import dataclasses

import numpy as np

from moc_jax.codecs import crop_frames, fit_codec, pixels_from_unit, pixels_to_unit
from moc_jax.config import DataConfig, PcaConfig
from moc_jax.data.quality import psnr
from moc_jax.data.sources import find_sources
from moc_jax.data.survey import Survey

_FITTED = 0.6  # of a shot's frames


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+", help="video files or folders of them")
    parser.add_argument("--size", nargs=2, type=int, default=(96, 160), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--most", type=int, default=101, help="frames of a shot that are looked at")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32])
    args = parser.parse_args()

    height, width = args.size
    data = DataConfig(source=tuple(args.source), height=height, width=width, fps=args.fps, max_shot_frames=args.most)
    files = {source.name: _shots(data, source.path) for source in find_sources(data)}
    for channels in args.channels:
        cfg = PcaConfig(channels=channels)
        least = 2 * cfg.stride[0] + 1
        halves = {
            name: [_halves(cfg, shot) for shot in shots if len(shot) >= 2 * least] for name, shots in files.items()
        }
        codec = fit_codec(cfg, [pixels_to_unit(seen) for shots in halves.values() for seen, _ in shots])
        print(f"\n{channels} channels, {width}x{height} at {args.fps:g} fps\n{'':30} fitted on   held out")
        rows = {
            name: [np.mean([_quality(codec, part) for part in parts]) for parts in zip(*shots)]
            for name, shots in halves.items()
            if shots
        }
        for name, (seen, held_out) in [*rows.items(), ("mean over the files", np.mean(list(rows.values()), axis=0))]:
            print(f"{name:30} {seen:6.2f} dB  {held_out:6.2f} dB")


def _shots(data, path):
    alone = dataclasses.replace(data, source=(str(path),))
    survey = Survey(alone, find_sources(alone), stride=1, patch=1)
    return [pixels_from_unit(clip) for clip in survey.clips()]


def _halves(cfg, shot):
    """What the codec is fitted on, and the rest; both of a length that it can encode."""
    at = int(len(shot) * _FITTED)
    return [part[: crop_frames(len(part), cfg.stride[0])] for part in (shot[:at], shot[at:])]


def _quality(codec, shot):
    return psnr(shot, pixels_from_unit(codec.decode(codec.encode(pixels_to_unit(shot)))))


if __name__ == "__main__":
    main()
