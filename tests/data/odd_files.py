"""Video files as they really come: one function makes each kind, small and fast, with PyAV.

Most show `pictures`: frame k is gray with the bits of k as bars, which `numbers` reads back whatever was done to it.
"""

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

SIZE = (32, 64)
GROUPS_OF_12 = {"g": "12", "bf": "2", "x264-params": "b-adapt=0:scenecut=0"}
_BITS = 8


def pictures(count: int, first: int = 0) -> np.ndarray:
    """uint8 [F Y X 3] of SIZE, numbered from `first` on."""
    frames = np.full((count, *SIZE, 3), 40, np.uint8)
    width = SIZE[1] // _BITS
    for k, frame in enumerate(frames, first):
        for bit in range(_BITS):
            if k >> bit & 1:
                frame[:, bit * width : (bit + 1) * width] = 210
    return frames


def numbers(frames: Iterable[np.ndarray]) -> list[int]:
    """The number that each frame of SIZE shows."""
    width = SIZE[1] // _BITS
    bars = [frame[8:-8].reshape(-1, _BITS, width, 3)[:, :, 2:-2].mean((0, 2, 3)) for frame in frames]
    return [sum(1 << bit for bit in range(_BITS) if bar[bit] > 125) for bar in bars]


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    stamps: Sequence[int] | None = None,
    *,
    clock: int = 25,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: tuple[float, bool, bool] | None = None,
    metadata: dict[str, str] | None = None,
    **context,
) -> Path:
    """One stream of RGB or RGBA frames; frame k at stamps[k] / clock seconds, by default one per tick."""
    with av.open(str(path), "w") as container:
        _encode(container, frames, stamps, clock, codec, pixels, options, rotation, metadata, **context)
    return path


def _encode(container, frames, stamps, clock, codec, pixels, options=None, rotation=None, metadata=None, **context):
    stream = container.add_stream(codec, rate=clock, options={"bf": "0", "crf": "10"} if options is None else options)
    stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
    stream.codec_context.time_base = Fraction(1, clock)
    for name, value in context.items():
        setattr(stream.codec_context, name, value)
    stream.metadata.update(metadata or {})
    if rotation is not None:
        stream.set_display_rotation(*rotation)
    for k, array in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(array, format="rgba" if array.shape[-1] == 4 else "rgb24")
        frame.pts, frame.time_base = k if stamps is None else stamps[k], Fraction(1, clock)
        if "color_trc" in context:
            frame.color_trc = context["color_trc"]
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def avi_with_b_frames(path: Path, count: int = 100) -> Path:
    """AVI has no presentation stamps: FFmpeg gives those of decoding, which step back at B-frames."""
    options = {"bf": "3", "x264-params": "b-adapt=0:aud=1", "crf": "10"}
    return write(path, pictures(count), options=options)


def restarted_clock(path: Path, parts: int = 2, count: int = 20) -> Path:
    """Transport streams one after another: each begins at the same time stamp."""
    content = b""
    for part in range(parts):
        content += write(path, pictures(count, part * count)).read_bytes()
    path.write_bytes(content)
    return path


def stamped(path: Path, stamps: Sequence[int], clock: int = 1000) -> Path:
    """Numbered frames without B-frames, with these time stamps."""
    return write(path, pictures(len(stamps)), stamps, clock=clock)


def restamped(path: Path, change, count: int = 20, options: dict[str, str] | None = None) -> Path:
    """Numbered frames, of which change(presented, decoded) gives each packet's two stamps, in 40 ms, or None."""
    plain = write(path.with_name("plain.mp4"), pictures(count), options=options)
    with av.open(str(plain)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                tick = Fraction(1, 25) / packet.time_base
                stamps = change(int(packet.pts // tick), int(packet.dts // tick))
                packet.pts, packet.dts = (None if s is None else round(s * tick) for s in stamps)
                packet.stream = stream
                container.mux(packet)
    plain.unlink()
    return path


def begins_mid_group(path: Path, *, codec: str = "libx264", options: dict[str, str] | None = None) -> Path:
    """A transport stream of 36 numbered frames in groups of 12, without its first five packets."""
    content = write(path, pictures(36), codec=codec, options=options or GROUPS_OF_12).read_bytes()
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(content[positions[5] :])
    return path


def cover_first(path: Path, *, flagged: bool = True) -> Path:
    """A picture as stream 0, marked as a cover or not, and a video as stream 1."""
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=25)
        cover.height, cover.width, cover.pix_fmt = 256, 256, "yuvj420p"
        video = container.add_stream("libx264", rate=25, options={"bf": "0"})
        video.height, video.width, video.pix_fmt = *SIZE, "yuv420p"
        if flagged:
            cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((256, 256, 3), 250, np.uint8), format="rgb24")))
        container.mux(cover.encode(None))
        for array in pictures(20):
            container.mux(video.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(video.encode(None))
    return path


def two_videos(path: Path) -> Path:
    """Stream 0 counts from 0, stream 1 from 100 and is the default."""
    with av.open(str(path), "w") as container:
        streams = []
        for number in range(2):
            stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
            stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
            stream.disposition = Disposition.default if number else Disposition(0)
            streams.append(stream)
        for pair in zip(pictures(20), pictures(20, 100)):
            for stream, array in zip(streams, pair):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def fields(count: int) -> np.ndarray:
    """A bar that moves between the two fields of each frame: its edges are combs."""
    frames = np.full((count, *SIZE, 3), 16, np.uint8)
    for k, frame in enumerate(frames):
        frame[0::2, 6 * k : 6 * k + 4] = frame[1::2, 6 * k + 3 : 6 * k + 7] = 235
    return frames


def interlaced(path: Path, stamps: Sequence[int] = range(10)) -> Path:
    """`fields`, marked as such."""
    options = {"x264-params": "tff=1", "crf": "4", "bf": "0"}
    return write(path, fields(len(stamps)), stamps, options=options)


def transparent(path: Path, codec: str = "qtrle", pixels: str = "argb") -> Path:
    """White over all, of which only the middle half can be seen."""
    frames = np.full((3, *SIZE, 4), 255, np.uint8)
    frames[:, :, : SIZE[1] // 4, 3] = frames[:, :, -SIZE[1] // 4 :, 3] = 0
    return write(path, frames, codec=codec, pixels=pixels, options={}, metadata={"alpha_mode": "1"})


def turned(path: Path, degrees: float, left_to_right: bool = False, upside_down: bool = False) -> Path:
    """White in the corner that is stored top left, and a display matrix that moves it."""
    frames = np.zeros((3, *SIZE, 3), np.uint8)
    frames[:, :6, :12] = 255
    return write(path, frames, rotation=(degrees, left_to_right, upside_down))


def jumps_past_its_end(path: Path) -> Path:
    """A Matroska file whose header says 0.5 s, and whose fourth frame comes two hours after the third."""
    content = stamped(path, [0, 100, 200, 7_200_000, 7_200_100]).read_bytes()
    at = content.index(b"\x44\x89\x88") + 3  # Duration, a float of 8 bytes, in milliseconds
    path.write_bytes(content[:at] + struct.pack(">d", 500.0) + content[at + 8 :])
    return path


def lost_packets(path: Path) -> Path:
    """A transport stream of 36 numbered frames, key frames at 0, 12 and 24, without the middle of frame 5."""
    content = write(path, pictures(36), options=GROUPS_OF_12 | {"bf": "0"}).read_bytes()
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(content[: positions[5]] + content[positions[5] + 188 :])
    return path


def changes_size(path: Path) -> Path:
    """A transport stream of ten frames of SIZE, then ten of twice that."""
    small = write(path, pictures(10), options=GROUPS_OF_12).read_bytes()
    large = pictures(10, 10).repeat(2, axis=1).repeat(2, axis=2)
    path.write_bytes(small + write(path, large, options=GROUPS_OF_12).read_bytes())
    return path
