"""Videos of a moving figure, made with PyAV: interlaced or not, upright or turned, of any codec."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, RATE = 320, 240, 25
_INTERLACED = 0x20040000
"""FFmpeg's flags ``ildct`` and ``ilme``."""


def picture_at(field: int) -> NDArray[np.uint8]:
    """Return a striped figure that moves 4 pixels a field, 50 fields a second: BGR."""
    picture = np.full((HEIGHT, WIDTH, 3), 110, np.uint8)
    x = 10 + 4 * field
    picture[30:210, x : x + 60] = 200
    picture[30:210, x + 15 : x + 30] = 40
    return cv2.GaussianBlur(picture, (0, 0), 1.0).astype(np.uint8)


def woven(count: int, top_first: bool) -> Iterator[NDArray[np.uint8]]:
    """Return frames of two fields each, of which the first is `picture_at` of twice its number."""
    for number in range(count):
        fields = picture_at(2 * number), picture_at(2 * number + 1)
        frame = fields[0 if top_first else 1].copy()
        frame[1::2] = fields[1 if top_first else 0][1::2]
        yield frame


def write_video(
    path: Path,
    pictures: Iterable[NDArray[np.uint8]],
    codec: str = "libx264",
    *,
    fields: str = "prog",
    turn: int = 0,
    **options: str,
) -> None:
    """Write BGR pictures; ``fields`` is ``tff`` or ``bff`` for interlaced ones."""
    with av.open(path, "w") as container:
        stream: Any = container.add_stream(codec, rate=RATE, options=options)
        graph = None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="bgr24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            if graph is None:
                stream.width, stream.height = frame.width, frame.height
                stream.pix_fmt = "yuv420p"
                if fields != "prog":
                    stream.codec_context.flags |= _INTERLACED
                if turn:
                    stream.set_display_rotation(turn)
                graph = _marking(frame, fields)
            graph.push(frame)
            container.mux(stream.encode(graph.vpull()))
        container.mux(stream.encode(None))


def _marking(frame: Any, fields: str) -> Any:
    """Return a graph that marks frames as interlaced, which PyAV cannot."""
    graph: Any = av.filter.Graph()
    size = {"width": frame.width, "height": frame.height}
    entrance = graph.add_buffer(**size, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(entrance, graph.add("setfield", fields), graph.add("buffersink")).configure()
    return graph


def combing(picture: NDArray[np.uint8]) -> float:
    """Return the share of pixels that differ from both the line above and below the same way."""
    grey = picture.mean(axis=2)
    above, line, below = grey[:-2], grey[1:-1], grey[2:]
    return float(((above - line) * (below - line) > 100).mean())


def error(picture: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Return the mean absolute difference in brightness."""
    return float(np.abs(picture.mean(axis=2) - truth.mean(axis=2)).mean())
