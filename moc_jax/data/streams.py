"""Which stream of a file is its video, what it says about itself, and where its pictures begin."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import av
from av.container import Container, InputContainer
from av.stream import Disposition
from av.video import VideoStream
from av.video.codeccontext import VideoCodecContext

_PROBED = 400  # packets of all video streams together after which a stream of one picture is known
_LATE = 1000  # packets without a key frame after which none is waited for
_USUAL_RATE = 25.0  # frames per second where a file says nothing
_RATES = 0.1, 240.0  # the least and the most that is trusted; beyond it, a header gives the rate of its clock
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders drop it
_COLOURS = "color_primaries", "color_trc", "colorspace", "color_range"
_STRICT_WITHOUT_DAMAGE = {"tiff"}  # decoders that otherwise refuse what their own encoder wrote
_TRANSPORT_STREAM = "mpegts"  # FFmpeg's name of the format
# FFmpeg takes their duration from the last time stamp, so it says nothing about whether that is right.
_WITHOUT_DURATION = _TRANSPORT_STREAM, "mpeg"
_TORN = *_WITHOUT_DURATION, "mpegvideo", "h264", "hevc"  # without header or index: recordings, DVDs in parts of 1 GB


def best_stream(container: InputContainer, note: Callable[[str], None]) -> VideoStream | None:
    """The stream that FFmpeg calls best, but a single picture (a cover) only if there is nothing else.

    None if there is no video stream that can be decoded. If there are several videos, the choice is noted.
    """
    streams = [stream for stream in container.streams.video if stream.codec_context is not None]
    moving = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
    if len(moving) > 1:
        moving = _moving(container.name, moving)
    best = container.streams.best("video")
    if best not in (moving or streams):
        best = max(moving or streams, key=_pixels, default=None)
    if best is not None and len(moving) > 1:
        others = ", ".join(_named(stream) for stream in moving if stream is not best)
        note(f"it holds {len(moving)} videos: {_named(best)} is used, not {others}")
    return best


def _pixels(stream: VideoStream) -> int:
    return stream.codec_context.width * stream.codec_context.height


def _named(stream: VideoStream) -> str:
    context = stream.codec_context
    return f"stream {stream.index} ({context.name}, {context.width}x{context.height})"


def _moving(name: str, streams: list[VideoStream]) -> list[VideoStream]:
    """Those with more than one picture; all of them if none has."""
    with av.open(name) as container:
        packets = itertools.islice(container.demux([stream.index for stream in streams]), _PROBED)
        count = collections.Counter(packet.stream_index for packet in packets if packet.size)
    return [stream for stream in streams if count[stream.index] > 1] or streams


def can_be_torn(container: Container) -> bool:
    """Whether a file of this format is whole wherever it ends, be it in the middle of a frame."""
    return container.format.name in _TORN


def decoder_of(stream: VideoStream) -> VideoCodecContext:
    """What decodes the stream: it stops at damage, and keeps the transparency that WebM stores beside the picture."""
    context = stream.codec_context
    if {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1":
        name = _ALPHA_DECODERS.get(context.name)
        context = context if name is None else _other_decoder(name, context)
    context.thread_type = "AUTO"
    if can_be_torn(stream.container):  # several threads report damage too late to know where it is, or not at all
        context.thread_count = 1
    # By default FFmpeg paints over damage, and with several threads it forgets some of it.
    if context.name not in _STRICT_WITHOUT_DAMAGE:
        context.options = {"err_detect": "explode"}
    return context


def _other_decoder(name: str, known: VideoCodecContext) -> VideoCodecContext:
    context = cast(VideoCodecContext, av.CodecContext.create(name, "r"))
    for colour in _COLOURS:  # the container may say more than the stream
        setattr(context, colour, getattr(known, colour))
    return context


def display_matrix(stream: VideoStream) -> bytes | None:
    """How the container says the picture is turned. Only a decoder of FFmpeg's choice hands it on to its frames."""
    return stream.codec_context.coded_side_data.get("display_matrix")


def usual_step(stream: VideoStream) -> float:
    """Seconds from one frame to the next, as the header says."""
    rate = float(stream.average_rate or stream.guessed_rate or _USUAL_RATE)
    return 1 / (rate if _RATES[0] <= rate <= _RATES[1] else _USUAL_RATE)


def end_of(container: InputContainer, stream: VideoStream) -> float | None:
    """The time stamp in seconds at which the file ends, as its header says; None if it doesn't say."""
    if container.format.name in _WITHOUT_DURATION:
        return None
    ends = []
    if container.duration is not None:
        ends.append(((container.start_time or 0) + container.duration) / av.time_base)
    if stream.duration is not None and stream.time_base is not None:
        ends.append(float(((stream.start_time or 0) + stream.duration) * stream.time_base))
    return max(ends, default=None)


def packets(container: InputContainer, stream: VideoStream, note: Callable[[str], None]) -> Iterator[av.Packet]:
    """The packets of a stream, without those that refer to pictures which the file lacks; these are counted.

    A recording may begin in the middle of a group of pictures, and a transport stream may be interrupted. What lies
    between there and the next key frame, or behind that frame but is shown before it, cannot be decoded.
    """
    rest = container.demux(stream)  # a packet without content ends it
    early = [next(rest)]
    while early[-1].size and not early[-1].is_keyframe and len(early) < _LATE:
        early.append(next(rest))
    if not early[-1].is_keyframe:  # key frames are not marked; a decoder may do without
        yield from itertools.chain(early, rest)
        return
    transport = container.format.name == _TRANSPORT_STREAM
    whole, leading, key = False, False, early[-1]
    torn, lost = 0, 0
    for packet, *after in _with_next_two(itertools.chain(early, rest)):
        if packet.is_keyframe:
            whole, leading, key = True, not whole, packet
        if transport and packet.is_corrupt:  # the packet or the one after it
            torn += 1
            # If a key frame follows, two streams were joined, and it is only the count of packets that jumps.
            whole = whole and any(not later.size or later.is_keyframe for later in after)
        shown_before = packet.pts is not None and key.pts is not None and packet.pts < key.pts
        if packet.size and (not whole or (leading and shown_before)):
            lost += 1
        else:
            yield packet
    begins = "it begins in the middle of a group of pictures" if len(early) > 1 else ""
    broken = f"its transport stream is interrupted {'once' if torn == 1 else f'{torn} times'}" if torn else ""
    if begins or broken:
        note(f"{' and '.join(filter(None, (begins, broken)))}: frames that cannot be decoded are left out ({lost})")


def _with_next_two(packets: Iterable[av.Packet]) -> Iterator[Sequence[av.Packet]]:
    window = collections.deque[av.Packet](maxlen=3)
    for packet in packets:
        window.append(packet)
        if len(window) == 3:
            yield tuple(window)
    window = list(window)[-2:]
    yield from (window[k:] for k in range(len(window)))
