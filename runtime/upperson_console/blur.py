"""Whole frames in which only one person can be recognised (`serve --blur`).

All pixels outside of the box are averaged in blocks. No detector is asked, so that nobody is missed
outside of the box; who stands in it stays visible.
"""

from PIL import Image

_BLOCKS = 40
"""Along the longer side of a frame."""
_MARGIN = 0.04
"""Around the box, in shares of its longer side."""

Box = tuple[int, int, int, int]


def pixelated(image: Image.Image, whole: tuple[int, int], box: Box | None) -> Image.Image:
    """Return a picture with large pixels, except in a box x0, y0, x1, y1.

    The box is in pixels of the ``whole`` picture, of which this may be a smaller copy. Without a
    box, or with one outside of the picture, nothing stays.
    """
    block = max(2, -(-max(image.size) // _BLOCKS))
    small = image.reduce(block)
    made = small.resize((small.width * block, small.height * block), Image.Resampling.NEAREST)
    made = made.crop((0, 0, *image.size))
    if box is None:
        return made
    margin = _MARGIN * max(box[2] - box[0], box[3] - box[1], 0)
    edges = (box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin)
    scales = 2 * (image.width / whole[0], image.height / whole[1])
    most = 2 * image.size
    x0, y0, x1, y1 = (
        round(min(max(edge * scale, 0), end))
        for edge, scale, end in zip(edges, scales, most, strict=True)
    )
    if box[0] < box[2] and box[1] < box[3] and x0 < x1 and y0 < y1:
        made.paste(image.crop((x0, y0, x1, y1)), (x0, y0))
    return made
