"""Opening picture files: of seven formats, told by content, in a bounded amount of memory.

Nothing else in the toolkit opens a picture. Pillow itself would try all of its readers, some of
which start programs, whatever a file is called; here a file's first bytes choose one of the seven
classes below.

A header is read from a file that gives out so many bytes and no more. From it follows what decoding
will take, before anything is decoded; a JPEG that would take more than `MOST_BYTES` is decoded at a
half, a quarter or an eighth of its size, any other picture is refused. All threads of a process
share `_BUDGET`: who would exceed it waits.
"""

import datetime
import errno
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import ExifTags, Image, TiffTags, features
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from upperson_rt import image_memory
from upperson_rt.arguments import LONGEST_PATH
from upperson_rt.errors import InputError
from upperson_rt.image_memory import MOST_BYTES
from upperson_rt.machine import keep_little, return_freed
from upperson_rt.printable import shown

__all__ = [
    "MOST_FILE_BYTES",
    "TimeSource",
    "capture_time",
    "free_pixels",
    "limit_memory",
    "naming_image",
    "open_image",
]

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
def open_image(path: str | os.PathLike[str], content: bytes | None = None) -> Iterator[ImageFile]:
    """Open a picture file; it is decoded when its pixels are asked for, in the calling thread.

    A JPEG may already be set to a smaller size. Waits while pictures of other threads take the
    memory; a thread that has one open does not wait for a second.

    Args:
        path: The file.
        content: What was read from it; without, it is opened.

    Raises:
        InputError: The file is missing, is no picture of a format of `IMAGE_SUFFIXES`, has a
            damaged header, or would take too much memory.
    """
    name = os.fspath(path)
    if len(name) > LONGEST_PATH:
        raise InputError(f"cannot read image {shown(name)}: {os.strerror(errno.ENAMETOOLONG)}")
    if os.path.exists(name) and not os.path.isfile(name):
        # Opening a pipe would wait for its other end forever.
        raise InputError(f"cannot read image {name}: not a regular file")
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
            image = _opener(file.peek(16)[:16])(file, take)
            stack.callback(image.close)
        yield image


@contextmanager
def naming_image(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an InputError that names the picture."""
    try:
        yield
    except (_TooLargeError, Image.DecompressionBombError) as error:
        raise InputError(f"image {name} is too large to be a person's picture: {error}") from error
    except Exception as error:  # A damaged file may lead Pillow's readers to any error.
        raise InputError(f"cannot read image {name}: {_reason(error)}") from error


def free_pixels(image: Image.Image) -> None:
    """Close a picture early: what it took is free for copies of it, in the same share."""
    size_bytes = image_memory.needed(image.size, image.mode, 0)
    image.close()
    if size_bytes > _WORTH_RETURNING:
        return_freed()


def _reason(error: BaseException) -> str:
    """Return in a few words what is wrong with a picture."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Budget:
    """Bytes that threads share."""

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
            keep_little(_LARGEST_IN_HEAP)
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
                return_freed()
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
    """Let all threads of this process share so many bytes for pictures, and one take half of them.

    A JPEG that would take more is decoded smaller, any other picture is refused. The default is
    ``2 * MOST_BYTES``.
    """
    _BUDGET.limit(size_bytes)


class _Metered(io.BufferedReader):
    """A file that gives out `_HEADER_BYTES`, or what it is told to, then fails until `open_up`.

    The directories in it may name the same bytes again and again: what counts is what is read. It
    fails after `_MOST_READS`, too.
    """

    def __init__(self, raw: io.FileIO | io.BytesIO) -> None:
        super().__init__(raw)
        self._bytes_left: float = _HEADER_BYTES
        self._reads_left = _MOST_READS
        self._exif = b""

    def give(self, size_bytes: float) -> None:
        self._bytes_left = size_bytes

    def open_up(self) -> None:
        self.give(float("inf"))

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
    """Read the directories of an EXIF block once, so that reading them again is known to be safe.

    Raises:
        _TooLargeError: They add up to more than a header may.
    """
    exif = Image.Exif()
    try:
        exif.load_from_fp(_Metered(io.BytesIO(block.removeprefix(b"Exif\0\0"))))
        exif.get_ifd(ExifTags.IFD.Exif)
    except _TooLargeError:
        raise
    except Exception:  # Damaged: whoever needs what is in it will be told.
        return


_Take: TypeAlias = Callable[[int], None]
"""Sets memory aside; may wait."""


def _settle(image: ImageFile, file: _Metered, take: _Take, decoder_bytes: int) -> ImageFile:
    """Set aside what an opened picture needs, and let it be decoded."""
    take(_checked(image_memory.needed(image.size, image.mode, decoder_bytes), image.size))
    file.open_up()
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
    stored = image_memory.jpeg_coefficients(image, file)
    if stored and _count(file, b"\xff\xda") > _MOST_SCANS:
        raise _TooLargeError(f"it has more than {_MOST_SCANS} scans")
    width, height = image.size
    for shrink in (1, 2, 4, 8):
        smaller = -(-width // shrink), -(-height // shrink)
        needed_bytes = image_memory.needed(smaller, image.mode, stored)
        if needed_bytes <= _BUDGET.each:
            break
    take(_checked(needed_bytes, image.size))
    if shrink > 1:
        image.draft(None, (width // shrink, height // shrink))
    file.open_up()
    return image


def _open_png(file: _Metered, take: _Take) -> ImageFile:
    image = PngImageFile(file)
    exif = image.info.get("exif")
    text = image.info.get("Raw profile type exif")
    if exif is None and text:
        exif = bytes.fromhex("".join(text.split("\n")[3:]))
    _check_exif(exif or b"")
    return _settle(image, file, take, image_memory.png_texts(file))


def _open_webp(file: _Metered, take: _Take) -> ImageFile:
    if not features.check("webp"):
        raise InputError("this installation of Pillow was built without WebP")
    # The decoder allocates and reads everything when it is made.
    file.seek(0)
    start = file.read(30)
    if start[8:12] == b"AVI ":  # The other kind of RIFF file that people have.
        raise InputError("it is a video, not a picture:  upperson-rt watch  takes videos")
    size, file_bytes = image_memory.webp_size(start), file.seek(0, os.SEEK_END)
    take(_checked(image_memory.webp_needed(file, size, file_bytes), size))
    file.seek(0)
    file.open_up()
    image = WebPImageFile(file)
    _check_exif(image.info.get("exif", b""))
    return image


def _open_tiff(file: _Metered, take: _Take) -> ImageFile:
    # Of an uncompressed file Pillow makes objects for each of them.
    pieces = image_memory.tiff_pieces(file)
    if pieces > image_memory.MOST_TIFF_PIECES:
        raise _TooLargeError(f"it is cut into {pieces:,} pieces")
    file.seek(0)
    image = TiffImageFile(file)
    exif = image.getexif()
    for tag in TiffTags.TAGS_V2_GROUPS:  # Loaded with the pixels, if not before.
        if tag in exif:
            exif.get_ifd(tag)
    return _settle(
        image,
        file,
        take,
        image_memory.tiff_decoder(image.tag_v2, image.size, file.seek(0, os.SEEK_END)),
    )


def _open_other(reader: Callable[[Any], ImageFile]) -> Callable[[_Metered, _Take], ImageFile]:
    def open_it(file: _Metered, take: _Take) -> ImageFile:
        file.give(_SMALL_HEADER_BYTES)
        image = reader(file)
        if image_memory.is_slow(image) and image.width * image.height > _MOST_SLOW_PIXELS:
            raise _TooLargeError(
                f"{image.width}x{image.height} pixels as text, in runs or of an odd depth, the "
                f"limit of which is {_MOST_SLOW_PIXELS:,}: make it smaller, or a plain PNG of it"
            )
        return _settle(image, file, take, image_memory.simple_decoder(image))

    return open_it


_TIFF = (b"II*\0", b"II\0*", b"II+\0", b"MM\0*", b"MM*\0", b"MM\0+")
_OPENERS: dict[tuple[bytes, ...], Callable[[_Metered, _Take], ImageFile]] = {
    (b"BM",): _open_other(BmpImageFile),
    (b"GIF87a", b"GIF89a"): _open_other(GifImageFile),
    (b"\xff\xd8\xff",): _open_jpeg,
    (b"\x89PNG\r\n\x1a\n",): _open_png,
    (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"): _open_other(PpmImageFile),
    _TIFF: _open_tiff,
    (b"RIFF",): _open_webp,
}
"""By how a file begins."""


_OTHER_KINDS = {
    b"%PDF": "a PDF",
    b"<": "HTML, SVG or other XML",
    b"PK\3\4": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"ftyp": "HEIC, AVIF or a video",
}
"""What people have instead. Messages show no byte of a file: it may be a link to a secret."""


def _opener(start: bytes) -> Callable[[_Metered, _Take], ImageFile]:
    for beginnings, opener in _OPENERS.items():
        if start.startswith(beginnings):
            return opener
    kinds = (
        kind for mark, kind in _OTHER_KINDS.items() if mark in (start[: len(mark)], start[4:8])
    )
    found = next(kinds, "another kind of file") if start else "an empty file"
    raise InputError(
        f"not an image of a known format: expected BMP, GIF, JPEG, PNG, PPM, TIFF or WebP, found "
        f"{found}"
    )


def _count(file: _Metered, marker: bytes) -> int:
    """Count two bytes in a whole file."""
    file.open_up()
    file.seek(0)
    count, last = 0, b""
    while block := file.read(1 << 20):
        count += (last + block).count(marker)
        last = block[-1:]
    return count


# --- When a picture was taken, as far as its file tells

TimeSource: TypeAlias = Literal["exif", "mtime", "name", "none"]
"""``exif``: the camera's clock in the file; ``mtime``: when the file was last written; ``name``: a
date and time in the file's name; ``none``: no time at all."""

_ORIGINAL, _OFFSET, _FRACTION = 0x9003, 0x9011, 0x9291
"""DateTimeOriginal, OffsetTimeOriginal and SubSecTimeOriginal of EXIF."""

_IN_NAME = re.compile(
    r"(?<!\d)(20\d\d)[-_.]?(\d\d)[-_.]?(\d\d)"  # 20261124 or 2026-11-24
    r"(?:[T_. -]{0,2})(\d\d)[-_.:h]?(\d\d)[-_.:m]?(\d\d)"  # 140000 or 14-00-00
    r"(?:[._-]?(\d{3}))?(?!\d)(Z)?"
)
_UNIX_IN_NAME = re.compile(r"(?<!\d)(1\d{9})(\d{3})?(?!\d)")


def capture_time(path: str | os.PathLike[str], source: TimeSource = "exif") -> float | None:
    """Return when a picture was taken in unix seconds, or None if the file does not tell.

    Times without an offset from UTC are local times of this machine.

    Args:
        path: The picture. One that cannot be read has no time here; decoding it says why.
        source: Where to look, see `TimeSource`; nowhere else.
    """
    match source:
        case "exif":
            return _from_exif(path)
        case "mtime":
            try:
                return os.stat(path).st_mtime
            except OSError:
                return None
        case "name":
            return _from_name(Path(path).stem)
        case "none":
            return None


def _from_exif(path: str | os.PathLike[str]) -> float | None:
    try:
        with open_image(path) as image:
            tags: dict[int, Any] = dict(image.getexif().get_ifd(ExifTags.IFD.Exif))
    except InputError:
        return None
    except Exception:  # Pillow's readers may raise anything; decoding the picture says why.
        return None
    moment, offset, fraction = (
        str(tags.get(tag, "")).strip("\0 ") for tag in (_ORIGINAL, _OFFSET, _FRACTION)
    )
    # 2026:11:24 14:00:00, by the standard; some cameras write other separators.
    numbers = re.fullmatch(r"(\d{4})\D(\d\d)\D(\d\d)\D(\d\d)\D(\d\d)\D(\d\d)", moment)
    if numbers is None:
        return None
    return _seconds(numbers.groups(), fraction, offset)


def _from_name(stem: str) -> float | None:
    found = _IN_NAME.search(stem)
    if found is not None:
        *numbers, fraction, utc = found.groups()
        return _seconds(numbers, fraction or "", "+00:00" if utc else "")
    found = _UNIX_IN_NAME.search(stem)
    return None if found is None else int(found[1]) + int(found[2] or 0) / 1000


def _seconds(numbers: Any, fraction: str, offset: str) -> float | None:
    year, month, day, hour, minute, second = map(int, numbers)
    try:
        moment = datetime.datetime(year, month, day, hour, minute, second)
        if re.fullmatch(r"[+-]\d\d:\d\d", offset):
            zone = datetime.datetime.strptime(offset, "%z").tzinfo
            moment = moment.replace(tzinfo=zone)
        seconds = moment.timestamp()
    except (ValueError, OverflowError, OSError):
        return None  # 0000:00:00 is what a camera without a clock writes.
    return seconds + (float(f"0.{fraction}") if fraction.isdecimal() else 0.0)
