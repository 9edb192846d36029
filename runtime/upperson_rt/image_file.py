"""Opening picture files: nine formats, by their content, in a bounded amount of memory.

Nothing else in the toolkit opens a picture. Pillow itself would try all of its readers, some of
which start programs, whatever a file is called; here a file's first bytes choose one of the seven
classes below. HEIC and AVIF are decoded by a process of their own, see `upperson_photos`.

A header is read from a file that gives out so many bytes and no more. From it follows what decoding
will take, before anything is decoded; a JPEG that would take more than `MOST_BYTES` is decoded at a
half, a quarter or an eighth of its size, any other picture is refused. HEIC and AVIF above 25
megapixels are halved once they are decoded. All threads of a process share `_BUDGET`: who would
exceed it waits.
"""

import errno
import io
import math
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, BinaryIO, Literal, TypeAlias

from PIL import ExifTags, Image, TiffTags, features
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from upperson_rt.arguments import LONGEST_PATH
from upperson_rt.errors import BackendError, InputError, install_command
from upperson_rt.machine import limit_heap, trim_heap
from upperson_rt.printable import safe_repr

MOST_BYTES = 240 << 20
"""For any one picture: 36 megapixels in colour."""

_MOST_TIFF_PIECES = 100_000

_ARRAY = 3
_RESIZED = 3 + 4
_WEBP = 8 + 4 + 4 + 4  # Two canvases, the decoder's pixels, what it returns, Pillow's image.
_WEBP_CODES = 5_700
_MOST_WEBP_CHUNKS = 10_000  # Beyond that a file is taken for the worst.
_PYTHON = 24
"""For the decoders that Pillow has in Python: they copy several times."""
_RESIZE = 20
"""For each row and column: the weights of the filter."""

_HEADER_BYTES = 16 << 20
"""Colour profiles take up to 3 MB, descriptions in XMP seldom more than one."""

_SMALL_HEADER_BYTES = 1 << 20
"""Of BMP, GIF and PPM. Older Pillows copy a GIF's comment again for each 255 bytes of it."""

_EXIF_BYTES = 256 << 10
"""Of a JPEG, where it comes in segments of 64 KiB; one is usual."""

MOST_FILE_BYTES = 2 * MOST_BYTES
"""Of any picture file; one of 36 megapixels has less in any format. Nothing of a larger one is
read."""

_MOST_READS = 100_000
"""Of one file. Pillow's readers take one to three for each chunk, segment, block or fill byte, and
a microsecond or more each; a PNG of 100 MB has 40,000."""

_MOST_SLOW_PIXELS = 4_000_000

_MOST_SCANS = 100
"""Of a JPEG; every one is a pass over all of its coefficients. Usual are 10."""


class _TooLargeError(Exception):
    """What a picture would need is beyond the bound; says how much and of what."""


@contextmanager
def open_image(
    path: str | os.PathLike[str], content: bytes | None = None, *, header_only: bool = False
) -> Iterator[ImageFile]:
    """Open a picture file, or its content; it is decoded when its pixels are used, in this thread.

    With ``header_only``, for the EXIF, no pixel of HEIC and AVIF is decoded: the picture has one. A
    JPEG may already be set to a smaller size. Until the pixels are used, ``info["shrink"]`` says by
    what each side was divided: 1, 2, 4 or 8; None if the default limit needs that, too, as boxes
    may be in pixels of either size then. Waits while pictures of other threads take the memory; a
    thread that has one open does not wait for a second.
    """
    name = os.fspath(path)
    if len(name) > LONGEST_PATH:
        message = f"cannot read image {safe_repr(name)}: {os.strerror(errno.ENAMETOOLONG)}"
        raise InputError(message, code="image_unreadable", path=safe_repr(name))
    if os.path.exists(name) and not os.path.isfile(name):
        # Opening a pipe would wait for its other end forever.
        message = f"cannot read image {name}: not a regular file"
        raise InputError(message, code="image_unreadable", path=name)
    with ExitStack() as stack:

        def take(size_bytes: int) -> None:
            stack.enter_context(_BUDGET.share(size_bytes))

        with naming_image(name):
            raw = io.FileIO(name) if content is None else io.BytesIO(content)
            file = stack.enter_context(_Metered(raw))
            size_bytes = os.stat(name).st_size if content is None else len(content)
            if size_bytes > MOST_FILE_BYTES:
                raise _TooLargeError(
                    f"its file has {size_bytes >> 20:,} MiB, the limit is {MOST_FILE_BYTES >> 20}"
                )
            image = _opener(file.peek(64)[:64], header_only)(file, take)
            stack.callback(image.close)
        yield image


@contextmanager
def naming_image(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an InputError that names the picture."""
    try:
        yield
    except (_TooLargeError, Image.DecompressionBombError) as error:
        message = f"image {name} is too large to be a person's picture: {error}"
        raise InputError(message, code="image_too_large", path=name) from error
    except BackendError as error:  # Of `upperson_photos`.
        message = f"cannot read image {name}: its decoder does not start: {error}"
        raise InputError(message, code="photo_decoder_unusable", path=name) from error
    except Exception as error:  # A damaged file may lead Pillow's readers to any error.
        fields = {"path": name} | (error.fields if isinstance(error, InputError) else {})
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        reason = (isinstance(error, OSError) and error.strerror) or reason
        message = f"cannot read image {name}: {reason}"
        raise InputError(message, code="image_unreadable", **fields) from error


def free_pixels(image: Image.Image) -> None:
    """Close a picture early: what it took is free for copies of it, in the same share."""
    size_bytes = _needed(image.size, image.mode, 0)
    image.close()
    if size_bytes > _WORTH_RETURNING:
        trim_heap()


class _Budget:
    def __init__(self, size_bytes: int) -> None:
        self.each = MOST_BYTES
        """For any one picture."""
        self._free = size_bytes
        self._changed = threading.Condition()
        self._holding = threading.local()

    @contextmanager
    def share(self, size_bytes: int) -> Iterator[None]:
        is_second = getattr(self._holding, "any", False)
        if size_bytes > _WORTH_RETURNING:
            limit_heap(_LARGEST_IN_HEAP)
        with self._changed:
            # A second, such as a template that a detector reads, might wait for the first one.
            self._changed.wait_for(lambda: is_second or self._free >= size_bytes)
            self._free -= size_bytes
        self._holding.any = True
        try:
            yield
        finally:
            self._holding.any = is_second
            if size_bytes > _WORTH_RETURNING:
                trim_heap()
            with self._changed:
                self._free += size_bytes
                self._changed.notify_all()

    def limit(self, size_bytes: int) -> None:
        with self._changed:
            self._free += size_bytes - 2 * self.each
            self.each = size_bytes // 2


_BUDGET = _Budget(2 * MOST_BYTES)
_WORTH_RETURNING = 32 << 20
_LARGEST_IN_HEAP = 32 << 20


def limit_memory(size_bytes: int) -> None:
    """Let all threads share this many bytes for pictures; one picture takes half at most."""
    _BUDGET.limit(size_bytes)


class _Metered(io.BufferedReader):
    """A file that gives out a limited number of bytes and reads, until it gives all.

    Directories in it may name the same bytes again and again: what counts is what is read.
    """

    def __init__(self, raw: io.FileIO | io.BytesIO) -> None:
        super().__init__(raw)
        self._bytes_left: float = _HEADER_BYTES
        self._reads_left = _MOST_READS
        self._exif = b""

    def give(self, size_bytes: float = math.inf) -> None:
        self._bytes_left = size_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self._bytes_left -= len(content)
        self._reads_left -= 1
        if self._reads_left < 0:
            raise _TooLargeError(f"it is in more than {_MOST_READS:,} pieces")
        if self._bytes_left < 0:
            raise _TooLargeError("its header takes more than a header may")
        if content.startswith(b"Exif\0\0"):  # A segment of a JPEG, parsed while it is opened.
            self._exif += content[6:]
            if len(self._exif) > _EXIF_BYTES:
                raise _TooLargeError(f"its EXIF takes more than {_EXIF_BYTES >> 10} KiB")
            _check_exif(self._exif)
        return content


def _check_exif(block: bytes) -> None:
    """Read the directories of an EXIF block once, so that reading them again is safe."""
    exif = Image.Exif()
    try:
        exif.load_from_fp(_Metered(io.BytesIO(block.removeprefix(b"Exif\0\0"))))
        exif.get_ifd(ExifTags.IFD.Exif)
    except _TooLargeError:
        raise
    except Exception:  # Damaged: reading it for its content raises the error.
        return


_Take: TypeAlias = Callable[[int], None]
"""Sets memory aside; may wait."""


def _settle(image: ImageFile, file: _Metered, take: _Take, decoder_bytes: int) -> ImageFile:
    """Set aside what an opened picture needs, and let it be decoded."""
    take(_checked(_needed(image.size, image.mode, decoder_bytes), image.size))
    file.give()
    image.info["shrink"] = 1
    return image


def _checked(needed_bytes: int, size: tuple[int, int]) -> int:
    if needed_bytes > _BUDGET.each:
        raise _TooLargeError(
            f"{size[0]}x{size[1]} pixels in its format take {-(-needed_bytes >> 20)} MiB to "
            f"decode, the limit is {_BUDGET.each >> 20}: make it smaller, or a plain JPEG of it"
        )
    return needed_bytes


def _open_jpeg(file: _Metered, take: _Take) -> ImageFile:
    image = JpegImageFile(file)
    stored = _jpeg_coefficients(image, file)
    if stored and _count(file, b"\xff\xda") > _MOST_SCANS:
        raise _TooLargeError(f"it has more than {_MOST_SCANS} scans")
    width, height = image.size
    for shrink in (1, 2, 4, 8):
        smaller = -(-width // shrink), -(-height // shrink)
        needed_bytes = _needed(smaller, image.mode, stored)
        if needed_bytes <= _BUDGET.each:
            break
    take(_checked(needed_bytes, image.size))
    is_huge = _needed(image.size, image.mode, stored) > MOST_BYTES
    image.info["shrink"] = None if is_huge else shrink
    if shrink > 1:
        image.draft(None, (width // shrink, height // shrink))
    file.give()
    return image


def _open_png(file: _Metered, take: _Take) -> ImageFile:
    image = PngImageFile(file)
    exif = image.info.get("exif")
    text = image.info.get("Raw profile type exif")
    if exif is None and text:
        exif = bytes.fromhex("".join(text.split("\n")[3:]))
    _check_exif(exif or b"")
    return _settle(image, file, take, _png_texts(file))


def _open_webp(file: _Metered, take: _Take) -> ImageFile:
    if not features.check("webp"):
        raise InputError("this installation of Pillow was built without WebP")
    # The decoder allocates and reads everything when it is made.
    file.seek(0)
    start = file.read(30)
    if start[8:12] == b"AVI ":  # The other kind of RIFF file that people have.
        message = "it is a video, not a picture:  upperson-rt watch  takes videos"
        raise InputError(message, found="a video")
    size, file_bytes = _webp_size(start), file.seek(0, os.SEEK_END)
    take(_checked(_webp_needed(file, size, file_bytes), size))
    file.seek(0)
    file.give()
    image = WebPImageFile(file)
    image.info["shrink"] = 1
    _check_exif(image.info.get("exif", b""))
    return image


def _open_tiff(file: _Metered, take: _Take) -> ImageFile:
    # Of an uncompressed file Pillow makes objects for each of them.
    pieces = _tiff_pieces(file)
    if pieces > _MOST_TIFF_PIECES:
        raise _TooLargeError(f"it is cut into {pieces:,} pieces")
    file.seek(0)
    image = TiffImageFile(file)
    exif = image.getexif()
    for tag in TiffTags.TAGS_V2_GROUPS:  # Loaded with the pixels, if not before.
        if tag in exif:
            exif.get_ifd(tag)
    decoder_bytes = _tiff_decoder(image.tag_v2, image.size, file.seek(0, os.SEEK_END))
    return _settle(image, file, take, decoder_bytes)


def _open_other(reader: Callable[[Any], ImageFile]) -> Callable[[_Metered, _Take], ImageFile]:
    def open_it(file: _Metered, take: _Take) -> ImageFile:
        file.give(_SMALL_HEADER_BYTES)
        image = reader(file)
        if _is_slow(image) and image.width * image.height > _MOST_SLOW_PIXELS:
            raise _TooLargeError(
                f"{image.width}x{image.height} pixels as text, in runs or of an odd depth, the "
                f"limit of which is {_MOST_SLOW_PIXELS:,}: make it smaller, or a plain PNG of it"
            )
        decoder_bytes = image.width * image.height
        if _is_slow(image):  # A code may skip 255 rows at once.
            decoder_bytes = _PYTHON * decoder_bytes + 512 * image.width
        return _settle(image, file, take, decoder_bytes)

    return open_it


_OPENERS: dict[tuple[bytes, ...], Callable[[_Metered, _Take], ImageFile]] = {
    (b"BM",): _open_other(BmpImageFile),
    (b"GIF87a", b"GIF89a"): _open_other(GifImageFile),
    (b"\xff\xd8\xff",): _open_jpeg,
    (b"\x89PNG\r\n\x1a\n",): _open_png,
    (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"): _open_other(PpmImageFile),
    (b"II*\0", b"II\0*", b"II+\0", b"MM\0*", b"MM*\0", b"MM\0+"): _open_tiff,
    (b"RIFF",): _open_webp,
}
"""By how a file begins."""


# --- HEIC and AVIF

PhotoKind: TypeAlias = Literal["heic", "avif"]

_BRANDS: dict[PhotoKind, frozenset[bytes]] = {
    "avif": frozenset({b"avif", b"avis"}),  # First: such a file may also be called mif1.
    "heic": frozenset({b"heic", b"heix", b"heim", b"heis", b"mif1"}),
}
_MOST_PHOTO_BYTES = 64 << 20
_DECODED = 10
"""Bytes a pixel of the PNG that the decoder writes, and of what it is decoded to."""


def obstacle_to(kind: PhotoKind) -> str:
    """Return what is missing to read HEIC or AVIF files here; empty if nothing is."""
    if sys.platform == "win32":
        return "not on Windows, where no process can be limited"
    if kind == "avif":
        known = features.modules  # Pillow before 11.3 warns of a name that it does not know.
        return "" if "avif" in known and features.check("avif") else "needs Pillow 11.3 or newer"
    return "" if find_spec("pi_heif") else install_command("heif")


def _photo_kind(start: bytes) -> PhotoKind | None:
    if start[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(start[:4], "big"), len(start))
    brands = {start[place : place + 4] for place in range(8, end, 4)}
    return next((kind for kind, known in _BRANDS.items() if brands & known), None)


def _open_photo(kind: PhotoKind, header_only: bool, file: _Metered, take: _Take) -> ImageFile:
    if obstacle := obstacle_to(kind):
        raise InputError(f"{kind.upper()} cannot be read: {obstacle}", found=kind)
    from upperson_rt.extensions import load_service  # Here, for the reason in `version_of`.

    file.give()
    content = file.read(_MOST_PHOTO_BYTES + 1)
    if len(content) > _MOST_PHOTO_BYTES:
        raise _TooLargeError(f"its file has more than {_MOST_PHOTO_BYTES >> 20} MiB")
    with _BUDGET.share(_BUDGET.each):
        most_pixels = 0 if header_only else _BUDGET.each // _DECODED
        decoded: bytes = load_service("photo-decoder")(kind, content, most_pixels)
    if not decoded.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("its decoder wrote no picture")
    inner = _Metered(io.BytesIO(decoded))
    image = PngImageFile(inner)
    _check_exif(image.info.get("exif") or b"")
    shrink = int(image.info["shrink"])
    is_huge = image.width * image.height * shrink**2 > MOST_BYTES // _DECODED
    _settle(image, inner, take, len(decoded)).info["shrink"] = None if is_huge else shrink
    return image


_OTHER_KINDS = {
    b"%PDF": "a PDF",
    b"<": "HTML, SVG or other XML",
    b"PK\3\4": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"ftyp": "a video",
}
"""What people have instead. Messages show no byte of a file: it may be a link to a secret."""


def _opener(start: bytes, header_only: bool) -> Callable[[_Metered, _Take], ImageFile]:
    for beginnings, opener in _OPENERS.items():
        if start.startswith(beginnings):
            return opener
    if (photo := _photo_kind(start)) is not None:
        return partial(_open_photo, photo, header_only)
    marks = (mark for mark in _OTHER_KINDS if mark in (start[: len(mark)], start[4:8]))
    kind = _OTHER_KINDS.get(next(marks, b""), "another kind of file")
    found = kind if start else "an empty file"
    expected = "expected AVIF, BMP, GIF, HEIC, JPEG, PNG, PPM, TIFF or WebP"
    message = f"not an image of a known format: {expected}, found {found}"
    raise InputError(message, found=found)


def _count(file: _Metered, marker: bytes) -> int:
    file.give()
    file.seek(0)
    count, last = 0, b""
    while block := file.read(1 << 20):
        count += (last + block).count(marker)
        last = block[-1:]
    return count


# --- How much memory decoding a picture takes, from its header
#
# Pillow holds a picture (1, 2 or 4 bytes a pixel) while its decoder works, and while it is copied
# into an array of 3 bytes a pixel; a resize needs that array and another copy. The largest of these
# counts, with what decoders keep for themselves: libjpeg all coefficients of a progressive file,
# libtiff a whole strip or tile, libwebp the canvas twice.


def _needed(size: tuple[int, int], mode: str, decoder_bytes: int) -> int:
    """Return the most bytes in use at a time from decoding to the resized picture."""
    pixels = size[0] * size[1]
    held = pixels * (1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4)
    resized = _RESIZED * pixels + _RESIZE * (size[0] + size[1])
    return max(held + max(decoder_bytes, _ARRAY * pixels), resized)


def _webp_size(start: bytes) -> tuple[int, int]:
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


def _webp_needed(file: BinaryIO, size: tuple[int, int], file_bytes: int) -> int:
    """Return what `_needed` does, with the file and the tables of a lossless picture.

    It may bring five codes for each 4 x 4 pixels, 20 bits for each set of them.
    """
    tables = 0
    if _has_lossless_part(file, file_bytes):
        pieces = -(-size[0] // 4) * -(-size[1] // 4)
        tables = _WEBP_CODES * min(pieces, 65_536, 8 * file_bytes // 20)
    return _WEBP * size[0] * size[1] + 3 * file_bytes + tables


def _has_lossless_part(file: BinaryIO, file_bytes: int) -> bool:
    """Return whether a chunk of a WebP file, or of a frame in it, is lossless (its alpha is)."""
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


def _jpeg_coefficients(image: JpegImageFile, file: BinaryIO) -> int:
    """Return the bytes of coefficients that libjpeg keeps; 0 if one scan holds all components."""
    components = len(image.layer)
    end = file.tell()  # Of the header of the first scan.
    scan = b"\xff\xda" + struct.pack(">HB", 6 + 2 * components, components)
    length = 8 + 2 * components
    file.seek(max(0, end - length))
    if "progressive" not in image.info and file.read(length).startswith(scan):
        return 0
    width = -(-image.width // (8 * max(layer[1] for layer in image.layer)))
    height = -(-image.height // (8 * max(layer[2] for layer in image.layer)))
    return 128 * width * height * sum(layer[1] * layer[2] for layer in image.layer)


def _png_texts(file: BinaryIO) -> int:
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


def _tiff_pieces(file: BinaryIO) -> int:
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


def _tiff_decoder(tags: Mapping[int, Any], size: tuple[int, int], file_bytes: int) -> int:
    """Return the bytes that libtiff takes for a strip or tile and its mapped file."""
    bits, samples = tags.get(258, (1,)), tags.get(277, 1)
    is_tiled = 322 in tags and 323 in tags
    # Of a picture that lies on its side Pillow has swapped the two.
    width = tags[322] if is_tiled else max(size)
    height = tags[323] if is_tiled else tags.get(278) or max(size)
    numbers = (*bits, samples, width, height)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ValueError("its tags are damaged")
    piece: int = width * height if is_tiled else min(width * height, size[0] * size[1])
    # Colour differences are unpacked, and JPEG inside may be progressive.
    stored = -(-max(bits) * samples // 8) + (4 if tags.get(262) == 6 else 0)
    stored += 2 * samples if tags.get(259) in (6, 7) else 0
    read = min(file_bytes, 2 * stored * size[0] * size[1])
    return int(max(stored * piece + read, 4 * size[0] * size[1]))


def _is_slow(image: ImageFile) -> bool:
    """Return whether the decoder is written in Python, which takes a microsecond a pixel."""
    return any(tile[0] not in ("raw", "gif") for tile in image.tile)
