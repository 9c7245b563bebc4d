"""What the codec loses on your videos: `python -m benchmarks.codec VIDEO_OR_FOLDER...`.

One codec is fitted on the first three fifths of every shot; the rest is held out. The baseline is the best linear code
of patches that do not overlap, with as many channels. PSNR is the mean over shots, for each file and over the files.
"""

import argparse
import tempfile

import numpy as np
from einops import rearrange

from moc_jax.codecs import crop_frames, fit_codec, pixels_from_unit, pixels_to_unit
from moc_jax.config import DataConfig, PcaConfig
from moc_jax.data.encode import shots_of
from moc_jax.data.film import Film
from moc_jax.data.quality import psnr
from moc_jax.data.sources import find_sources

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
    files = {source.name: _shots(data, source) for source in find_sources(data)}
    for channels in args.channels:
        cfg = PcaConfig(channels=channels)
        least = 2 * (2 * cfg.stride[0] + 1)
        parts = {name: [_parts(cfg, shot) for shot in shots if len(shot) >= least] for name, shots in files.items()}
        seen = [pixels_to_unit(shot) for shots in parts.values() for shot, _ in shots]
        codecs = _Separate(cfg, seen), fit_codec(cfg, seen)
        rows = {
            name: [np.mean([_quality(codec, shot) for shot in part]) for part in zip(*shots) for codec in codecs]
            for name, shots in parts.items()
            if shots
        }
        print(f"\n{channels} channels, {width}x{height} at {args.fps:g} fps, PSNR in dB")
        print(f"{'':24} fitted on: separate  overlapping   held out: separate  overlapping")
        for name, row in [*rows.items(), ("mean over the files", np.mean(list(rows.values()), axis=0))]:
            print(f"{name:24} {row[0]:19.2f} {row[1]:12.2f} {row[2]:20.2f} {row[3]:12.2f}")


def _shots(data, source):
    """How each shot begins."""
    shots = []
    with tempfile.TemporaryFile() as file:
        film = Film(file, data.height, data.width)
        for shot in shots_of(source, data, film, []):
            shots.append(np.array(shot[: data.max_shot_frames]))
            film.forget()
    return shots


def _parts(cfg, shot):
    """What the codec is fitted on, and the rest; both of a length that it can encode."""
    at = int(len(shot) * _FITTED)
    return [part[: crop_frames(len(part), cfg.stride[0])] for part in (shot[:at], shot[at:])]


def _quality(codec, shot):
    return psnr(shot, pixels_from_unit(codec.decode(codec.encode(pixels_to_unit(shot)))))


class _Separate:
    """Principal components of patches that do not overlap: of the first frames', and of the others'."""

    def __init__(self, cfg, clips):
        self._stride = cfg.stride
        self._bases = [self._components(part, cfg.channels) for part in zip(*map(self._patches, clips))]

    def _patches(self, clip):
        _, h, w = self._stride
        return [
            rearrange(frames, "(f t) (y h) (x w) c -> f y x (t h w c)", t=t, h=h, w=w)
            for frames, t in ((clip[:1], 1), (clip[1:], self._stride[0]))
        ]

    @staticmethod
    def _components(clips, channels):
        patches = np.concatenate([clip.reshape(-1, clip.shape[-1]) for clip in clips])
        mean = patches.mean(axis=0)
        _, vectors = np.linalg.eigh(np.cov(patches, rowvar=False))
        return mean, vectors[:, -channels:].astype(np.float32)

    def encode(self, clip):
        return [(part - mean) @ basis for part, (mean, basis) in zip(self._patches(clip), self._bases)]

    def decode(self, latents):
        _, h, w = self._stride
        parts = [part @ basis.T + mean for part, (mean, basis) in zip(latents, self._bases)]
        pattern = "f y x (t h w c) -> (f t) (y h) (x w) c"
        return np.concatenate([rearrange(p, pattern, t=t, h=h, w=w) for p, t in zip(parts, (1, self._stride[0]))])


if __name__ == "__main__":
    main()
