"""One decoded frame -> the picture that a player shows, at the size that is asked for."""

import math
from collections.abc import Iterable, Iterator

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type

from moc_jax.shapes import UInt8

_MOST_SCALED = 16  # times as many pixels as the result: a longer strip is cropped before it is scaled, not afterwards
_SLANT = 0.02  # of a display matrix that turns by about a degree more than a whole number of quarters
_HDR = {16: "PQ, smpte2084", 18: "HLG, arib-std-b67"}  # transfer characteristics by the numbers of ISO 23001-8
_NO_FRAME = BlockingIOError, EOFError  # the filter wants another frame; it has given the last one


def deinterlaced(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """The same frames, of which those made of two fields are rebuilt by FFmpeg's bwdif; all others pass unchanged."""
    graph: Graph | None = None
    waiting: list[av.VideoFrame] = []  # as decoded: the filter keeps their time stamps in a clock of its own
    layout = None
    for frame in frames:
        if graph is not None and layout != (frame.width, frame.height, frame.format.name):
            yield from _rebuilt(graph, None, waiting)
            graph = None
        if graph is None and frame.interlaced_frame and min(frame.width, frame.height) > 3:  # all that bwdif takes
            layout = frame.width, frame.height, frame.format.name
            graph = _deinterlacer(frame)
        if graph is None:
            yield frame
        else:
            yield from _rebuilt(graph, frame, waiting)
    if graph is not None:
        yield from _rebuilt(graph, None, waiting)


def _deinterlacer(frame: av.VideoFrame) -> Graph:
    graph = Graph()
    layout = {"video_size": f"{frame.width}x{frame.height}", "pix_fmt": frame.format.name}
    source = graph.add("buffer", time_base=str(frame.time_base), **layout)
    rebuild = graph.add("bwdif", mode="send_frame", parity="auto", deint="interlaced")
    graph.link_nodes(source, rebuild, graph.add("buffersink")).configure()
    return graph


def _rebuilt(graph: Graph, frame: av.VideoFrame | None, waiting: list[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    if frame is not None:
        waiting.append(frame)
    graph.vpush(frame)
    while waiting:
        try:
            rebuilt = graph.vpull()
        except _NO_FRAME:
            return
        original = waiting.pop(0)
        rebuilt.time_base, rebuilt.pts, rebuilt.dts = original.time_base, original.pts, original.dts
        rebuilt.duration = original.duration
        yield rebuilt


def remarks(frame: av.VideoFrame, matrix: bytes | None) -> Iterator[str]:
    """What a user should know about how the frame will look; `matrix` as in `fit`."""
    name = _HDR.get(frame.color_trc)
    if name:
        yield f"its colours are HDR ({name}) and are used without tone mapping: they look flat and gray"
    a, b, c, d = _matrix(frame, matrix)
    straight, turned = abs(a) + abs(d), abs(b) + abs(c)
    if min(straight, turned) > _SLANT * max(straight, turned):
        angle = math.degrees(math.atan2(-b, a))  # counterclockwise
        yield f"it should be shown turned by {angle:.0f} degrees: only quarter turns are applied"


def fit(
    frame: av.VideoFrame, aspect: float, matrix: bytes | None, height: int, width: int
) -> UInt8[np.ndarray, "Y X 3"]:
    """The frame over black and the right way round, scaled to cover the size, and cropped to it around the centre.

    Args:
        frame: as decoded.
        aspect: width of its pixels over their height.
        matrix: how the container says it is turned; the frame's own display matrix comes first.
        height: rows of the result.
        width: columns of the result.
    """
    a, b, c, d = _matrix(frame, matrix)
    turned = abs(b) + abs(c) > abs(a) + abs(d)  # phones store portrait video lying on its side
    goal_rows, goal_columns = (width, height) if turned else (height, width)
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        frame = _over_black(frame)
    scale = max(goal_rows / frame.height, goal_columns / (frame.width * aspect))
    if frame.height * frame.width * aspect * scale**2 > _MOST_SCALED * height * width:
        frame = _middle(frame, math.ceil(goal_rows / scale), math.ceil(goal_columns / scale / aspect))
    rows = max(round(frame.height * scale), goal_rows)
    columns = max(round(frame.width * aspect * scale), goal_columns)
    method = "AREA" if scale < 1 else "BICUBIC"
    image = frame.reformat(columns, rows, format="rgb24", interpolation=method).to_ndarray()
    image = _centre(image, goal_rows, goal_columns)
    if turned:
        image = image.transpose(1, 0, 2)
    right_to_left, upside_down = (c < 0, b < 0) if turned else (a < 0, d < 0)
    return np.ascontiguousarray(image[:: -1 if upside_down else 1, :: -1 if right_to_left else 1])


def _matrix(frame: av.VideoFrame, matrix: bytes | None) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the display matrix: what lies at (x, y) is shown at (a x + c y, b x + d y), y downwards."""
    own = frame.side_data.get(Type.DISPLAYMATRIX)
    data = matrix if own is None else bytes(own)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    return a, b, c, d


def _over_black(frame: av.VideoFrame) -> av.VideoFrame:
    """Before it is scaled: what nobody sees must not bleed into what is seen."""
    image = frame.to_ndarray(format="rgba")
    colours, alpha = image[..., :3].astype(np.uint16), image[..., 3:]
    return av.VideoFrame.from_ndarray(((colours * alpha + 127) // 255).astype(np.uint8), format="rgb24")


def _middle(frame: av.VideoFrame, rows: int, columns: int) -> av.VideoFrame:
    """What lies around the centre; what scaling needs of its surroundings is included."""
    image = _centre(frame.to_ndarray(format="rgb24"), min(rows + 2, frame.height), min(columns + 2, frame.width))
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")


def _centre(image: UInt8[np.ndarray, "Y X 3"], rows: int, columns: int) -> UInt8[np.ndarray, "_ _ 3"]:
    top, left = (image.shape[0] - rows) // 2, (image.shape[1] - columns) // 2
    return image[top : top + rows, left : left + columns]
