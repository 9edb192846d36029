"""Clips in which only one person can be recognised, see `blur`.

The box of the person is known at the times of the track's pictures, and is between two of them
where a straight line puts it. Where it is not known, nothing can be recognised. Needs PyAV with
libx264, as the extra ``camera`` installs it.
"""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from PIL import Image

from upperson_console.blur import Box, pixelated
from upperson_console.problems import withheld

KnownBoxes: TypeAlias = Sequence[tuple[float, Box]]
"""Unix seconds and the box in the frame of that time, ascending."""
LONGEST_GAP_S = 5.0
"""Between two boxes that a straight line connects. A track has a picture every 2 s by default."""
_HELD_S = 1.0
"""Before the first box, after the last one and beside a gap."""
_MOST_PIXELS = 1 << 25
_LONGEST_SIDE = 960
_ENCODING = {"preset": "ultrafast", "crf": "26", "threads": "2"}


def can_blur_clips() -> bool:
    """Return whether PyAV is installed, with an encoder of H.264."""
    try:
        import av

        return "libx264" in av.codecs_available
    except ImportError:
        return False


def box_at(known: KnownBoxes, at: float) -> Box | None:
    """Return the box at a time; None if it is not known."""
    before = next(((t, box) for t, box in reversed(known) if t <= at), None)
    after = next(((t, box) for t, box in known if t >= at), None)
    if before is not None and after is not None and after[0] - before[0] <= LONGEST_GAP_S:
        share = (at - before[0]) / ((after[0] - before[0]) or 1.0)
        edges = zip(before[1], after[1], strict=True)
        x0, y0, x1, y1 = (round(a + share * (b - a)) for a, b in edges)
        return x0, y0, x1, y1
    near = [one for one in (before, after) if one is not None and abs(one[0] - at) <= _HELD_S]
    return min(near, key=lambda one: abs(one[0] - at))[1] if near else None


def blurred_clip(file: Path, begin: float, known: KnownBoxes, until: float) -> bytes:
    """Return a clip as MP4 (H.264, 960 pixels at most, no sound) that shows one person.

    Args:
        file: The clip.
        begin: Unix seconds of its first frame.
        known: Boxes of the person.
        until: Time on `time.monotonic` at which it is given up.

    Raises:
        ProblemError: It is withheld: PyAV is missing, it cannot be decoded, or takes too long.
    """
    if not can_blur_clips():
        what = "the extra camera, whose PyAV has libx264, is needed to pixelate them"
        raise withheld(f"the clip shows others, too: {what}")
    import av

    made = io.BytesIO()
    try:
        with av.open(str(file)) as source, av.open(made, "w", format="mp4") as target:
            stream: Any = target.add_stream("libx264", rate=25, options=_ENCODING)
            first, frame_type = None, cast("Any", av.VideoFrame)
            frame: Any
            for frame in source.decode(video=0):
                if time.monotonic() > until:
                    raise withheld("the clip shows others, too; hiding them takes too long")
                image, whole = _upright(frame)
                if first is None:
                    first, stream.codec_context.time_base = frame.pts, frame.time_base
                    stream.width, stream.height = image.size
                box = box_at(known, begin + float((frame.pts - first) * frame.time_base))
                copy = frame_type.from_image(pixelated(image, whole, box))
                copy.pts, copy.time_base = frame.pts - first, frame.time_base
                target.mux(stream.encode(copy))
            target.mux(stream.encode(None))
    except (av.FFmpegError, OSError, ValueError, LookupError, TypeError) as error:
        raise withheld("the clip shows others, too, and cannot be decoded to hide them") from error
    return made.getvalue()


def _upright(frame: Any) -> tuple[Image.Image, tuple[int, int]]:
    """Return a frame as a small picture of even sides, and its size before."""
    whole = frame.width, frame.height
    if whole[0] * whole[1] > _MOST_PIXELS:
        raise ValueError("the picture is too large")
    shrink = max(1.0, max(whole) / _LONGEST_SIDE)
    width, height = (max(2, int(edge / shrink) // 2 * 2) for edge in whole)
    pixels = frame.reformat(width, height, "rgb24").to_ndarray()
    turns = round(frame.rotation / 90) % 4
    image = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))
    return image, whole[::-1] if turns % 2 else whole
