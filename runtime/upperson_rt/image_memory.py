"""How much memory decoding a picture takes, told from its header.

A picture is held by Pillow (1, 2 or 4 bytes a pixel), while its decoder works and then while it is
copied into an array of 3 bytes a pixel; when it is resized, array and another copy exist. The
largest of these counts, with what decoders keep for themselves: libjpeg all coefficients of a
progressive file, libtiff a whole strip or tile, libwebp the canvas twice.
"""

import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

MOST_BYTES = 240 << 20
"""For any one picture: 36 megapixels in colour."""

MOST_TIFF_PIECES = 100_000

_ARRAY = 3
_RESIZED = 3 + 4
_WEBP = 8 + 4 + 4 + 4  # Two canvases, the decoder's pixels, what it returns, Pillow's image.
_WEBP_CODES = 5_700
_MOST_WEBP_CHUNKS = 10_000  # Beyond that a file is taken for the worst.
_PYTHON = 24
"""For the decoders that Pillow has in Python: they copy several times."""
_RESIZE = 20
"""For each row and column: the weights of the filter."""


def needed(size: tuple[int, int], mode: str, decoder_bytes: int) -> int:
    """Return the most bytes in use at a time from decoding to the resized picture."""
    pixels = size[0] * size[1]
    held = pixels * _held(mode)
    resized = _RESIZED * pixels + _RESIZE * (size[0] + size[1])
    return max(held + max(decoder_bytes, _ARRAY * pixels), resized)


def webp_size(start: bytes) -> tuple[int, int]:
    """Return width and height of a WebP file's canvas from its first 30 bytes."""
    kind = start[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(start[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (n & 0x3FFF for n in struct.unpack("<HH", start[26:30]))
    else:
        raise ValueError("not a WebP file")
    return width, height


def webp_needed(file: BinaryIO, size: tuple[int, int], file_bytes: int) -> int:
    """Return what `needed` does; the decoder keeps the file, and tables of a lossless picture.

    Such may bring five codes for each 4 x 4 pixels, 20 bits for each set of them. How many there
    are lies behind entropy-coded data; encoders write tables of 15 MB at most.
    """
    tables = 0
    if _has_lossless_part(file, file_bytes):
        pieces = -(-size[0] // 4) * -(-size[1] // 4)
        tables = _WEBP_CODES * min(pieces, 65_536, 8 * file_bytes // 20)
    return _WEBP * size[0] * size[1] + 3 * file_bytes + tables


def _has_lossless_part(file: BinaryIO, file_bytes: int) -> bool:
    """Tell whether a chunk of a WebP file, or of a frame in it, is lossless, such as its alpha."""
    ranges, left = [(12, file_bytes)], _MOST_WEBP_CHUNKS
    while ranges:
        at, end = ranges.pop()
        while at < end:
            file.seek(at)
            kind, size = file.read(4), int.from_bytes(file.read(4), "little")
            left -= 1
            if kind in (b"VP8L", b"ALPH") or not left:
                return True
            inside = at + 8
            if kind == b"ANMF":
                ranges.append((inside + 16, min(inside + size, end)))
            at = inside + size + size % 2
    return False


def jpeg_coefficients(image: JpegImageFile, file: BinaryIO) -> int:
    """Return the bytes of coefficients that libjpeg keeps of a file that was just opened.

    0 if a single scan holds all components in turn; else all, two bytes each.
    """
    components = len(image.layer)
    end = file.tell()  # Of the header of the first scan.
    scan = b"\xff\xda" + struct.pack(">HB", 6 + 2 * components, components)
    length = 8 + 2 * components
    file.seek(max(0, end - length))
    if "progressive" not in image.info and file.read(length).startswith(scan):
        return 0
    across = max(layer[1] for layer in image.layer)
    down = max(layer[2] for layer in image.layer)
    width, height = (
        -(-n // (8 * most)) for n, most in zip(image.size, (across, down), strict=True)
    )
    return 128 * width * height * sum(layer[1] * layer[2] for layer in image.layer)


def png_texts(file: BinaryIO) -> int:
    """Return the bytes that texts, profiles and unknown chunks of a PNG file take when read."""
    position, total = file.tell(), 0
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind not in (b"IDAT", b"fdAT"):
            total += 3 * length
        if kind in (b"iCCP", b"iTXt", b"zTXt"):
            total += 2 << 20  # Unpacked Pillow takes one MiB of each.
        if kind == b"IEND":
            break
        file.seek(length + 4, 1)
    file.seek(position)
    return total


def tiff_pieces(file: BinaryIO) -> int:
    """Return the number of strips or tiles of the first picture of a TIFF file."""
    file.seek(0)
    start = file.read(16)
    order, is_big = "<" if start.startswith(b"I") else ">", start[2] == 43
    first, number, entry = ("Q", "Q", "HHQQ") if is_big else ("L", "H", "HHLL")
    (at,) = struct.unpack_from(order + first, start, 8 if is_big else 4)
    file.seek(at)
    head = file.read(struct.calcsize(number))
    (left,) = struct.unpack(order + number, head)
    tag = struct.Struct(order + entry)
    pieces = 0
    while left and len(content := file.read(tag.size)) == tag.size:
        name, _, count, _ = tag.unpack(content)
        pieces = max(pieces, count if name in (273, 324) else 0)
        left -= 1
    return pieces


def tiff_decoder(tags: Mapping[int, Any], size: tuple[int, int], file_bytes: int) -> int:
    """Return the bytes that libtiff takes for a strip or tile, or Pillow to turn the picture.

    libtiff maps the file: what of it is read counts as memory, too.
    """
    bits, samples = tags.get(258, (1,)), tags.get(277, 1)
    is_tiled = 322 in tags and 323 in tags
    # Of a picture that lies on its side Pillow has swapped the two.
    width = tags[322] if is_tiled else max(size)
    height = tags[323] if is_tiled else tags.get(278) or max(size)
    if not all(
        isinstance(number, int) and number > 0 for number in (*bits, samples, width, height)
    ):
        raise ValueError("its tags are damaged")
    piece: int = width * height if is_tiled else min(width * height, size[0] * size[1])
    # Colour differences are unpacked, and JPEG inside may be progressive.
    stored = -(-max(bits) * samples // 8) + (4 if tags.get(262) == 6 else 0)
    stored += 2 * samples if tags.get(259) in (6, 7) else 0
    read = min(file_bytes, 2 * stored * size[0] * size[1])
    return int(max(stored * piece + read, 4 * size[0] * size[1]))


def simple_decoder(image: ImageFile) -> int:
    """Return the bytes that the decoder of a BMP, GIF or PPM file takes."""
    width, height = image.size
    if is_slow(image):
        return _PYTHON * width * height + 512 * width  # A code may skip 255 rows at once.
    return width * height


def is_slow(image: ImageFile) -> bool:
    """Tell a picture whose decoder is written in Python: it takes a microsecond a pixel."""
    return any(tile[0] not in ("raw", "gif") for tile in image.tile)


def _held(mode: str) -> int:
    """Return the bytes that Pillow takes for a pixel."""
    if mode in ("1", "L", "P"):
        return 1
    return 2 if mode.startswith("I;16") else 4
