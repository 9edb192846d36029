"""Pictures from files: decoding, conversion to RGB and the resize that training uses.

Every picture becomes uint8 RGB the same way in training, calibration and at run time:

- EXIF orientation is applied.
- Transparency is laid over white.
- 16-bit pictures keep their upper 8 bits; 32-bit integers and floats are read as 0 to 255 unless
  their maximum shows 16-bit content.
- Grey, palette, CMYK and the other modes of Pillow are converted by Pillow.
- Of an animation or a file of several pages the first picture counts.
- A JPEG that would take too much memory is decoded at a half, a quarter or an eighth of its size;
  HEIC and AVIF above 25 megapixels are halved until they have fewer. Other pictures that would
  take too much are refused. See `image_file`.
"""

import datetime
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from upperson_rt.arguments import check_choice, check_count, check_list, check_path
from upperson_rt.errors import InputError
from upperson_rt.files import refuse_archive
from upperson_rt.image_file import (
    PhotoKind,
    free_pixels,
    naming_image,
    obstacle_to,
    open_image,
)
from upperson_rt.printable import get_logger, safe_repr

_LOG = get_logger(__name__)

T = TypeVar("T")

PixelArray: TypeAlias = "NDArray[np.integer[Any] | np.floating[Any]]"
"""Of uint8, which is checked at run time: OpenCV's types say no more of what its functions return
(``cv2.typing.MatLike``)."""

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | PixelArray"
"""A file, a Pillow image, or a uint8 array: grey [H, W] or [H, W, 1], colour [H, W, 3], or colour
and opacity [H, W, 4]."""

Channels: TypeAlias = Literal["rgb", "bgr"]
"""Order of the colours in arrays; ``bgr`` is OpenCV's. Files and Pillow images know theirs."""

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""What `iter_image_files` takes from a folder, in lower case; see `image_suffixes`."""

_PHOTO_SUFFIXES: dict[str, PhotoKind] = {".avif": "avif", ".heic": "heic", ".heif": "heic"}

_LARGEST_SIDE = 16_384

_BLOCK_PIXELS = 1 << 20
"""Converted at a time."""


def image_suffixes() -> frozenset[str]:
    """Return `IMAGE_SUFFIXES`, with those of HEIC and AVIF where they can be read."""
    kinds = _PHOTO_SUFFIXES.items()
    return IMAGE_SUFFIXES | {suffix for suffix, kind in kinds if not obstacle_to(kind)}


def load_image(source: ImageSource, channels: Channels = "rgb") -> NDArray[np.uint8]:
    """Read a picture as uint8 RGB [H, W, 3] of its own size, upright; raises InputError.

    Only a JPEG that would take too much memory, and HEIC and AVIF above 25 megapixels, come back
    smaller than they are. A Pillow image is left open.
    """
    return use_image(source, np.ascontiguousarray, channels)


def prepare_image(
    source: ImageSource, height_px: int, width_px: int, channels: Channels = "rgb"
) -> NDArray[np.uint8]:
    """Read a picture as `load_image` does and resize it to [height_px, width_px, 3]."""
    return use_image(source, lambda pixels: resize_image(pixels, height_px, width_px), channels)


def use_image(
    source: ImageSource,
    use: Callable[[NDArray[np.uint8]], T],
    channels: Channels = "rgb",
    content: bytes | None = None,
) -> T:
    """Call a function with a picture as uint8 RGB [H, W, 3], which it must not keep.

    Until it returns, the file's memory counts as taken and pictures of other threads wait. The
    share is enough for `resize_image`, or for one more copy of the picture. ``content`` is what was
    read.
    """
    check_choice(channels, "channels", get_args(Channels))
    # No name holds the picture here: its memory is free before the share is given back.
    if isinstance(source, np.ndarray):
        return use(_rgb_from_array(source, channels))
    if isinstance(source, Image.Image):
        return use(_decode(source, "the given image"))
    if isinstance(source, str | os.PathLike):
        with open_image(source, content) as image:
            return use(_decode_and_close(image, os.fspath(source)))
    message = "expected a picture: a file name, a Pillow image or a uint8 array, found "
    raise InputError(message + type(source).__name__, code="no_picture")


def use_scaled_image(
    file: Path, use: Callable[[NDArray[np.uint8], int | None], T], content: bytes | None = None
) -> T:
    """Call a function with a picture file as `use_image` does, and by what its sides were divided.

    That is 1, 2, 4 or 8; None if the place of a box in it is unknown, see `open_image`.
    """
    with open_image(file, content) as image:
        shrink = image.info["shrink"]
        return use(_decode_and_close(image, os.fspath(file)), shrink)


def resize_image(image: PixelArray, height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Resize to the input of the image tower; the aspect ratio is not kept, as in training.

    Takes and returns uint8 RGB [H, W, 3]: Pillow's bilinear filter, antialiased.
    """
    height_px = check_count(height_px, "height_px", most=_LARGEST_SIDE)
    width_px = check_count(width_px, "width_px", most=_LARGEST_SIDE)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        message = f"expected a picture uint8 [H, W, 3], found {safe_repr(image)}"
        raise InputError(message, code="array_unfit")
    if not image.size:
        message = f"expected a picture with pixels, found an array of shape {image.shape}"
        raise InputError(message, code="array_unfit")
    if image.shape[:2] == (height_px, width_px):
        return np.ascontiguousarray(image)
    resized = _as_image(image).resize((width_px, height_px), Image.Resampling.BILINEAR)
    return np.array(resized, dtype=np.uint8)


def iter_image_files(
    paths: Iterable[str | os.PathLike[str]], others: Counter[str] | None = None
) -> Iterator[Path]:
    """Yield picture files: files as given, folders recursively in sorted order, nothing twice.

    A file that is named directly is yielded whatever its suffix; inside folders only those of
    `image_suffixes` count, and hidden files and folders are left out. Other files are counted in
    ``others`` by their kind, see `describe_others`; without it a warning is logged if some of them
    hold pictures, such as HEIC or zip files.
    """
    return (file for _, file in iter_named_images(paths, others))


def iter_named_images(
    paths: Iterable[str | os.PathLike[str]], others: Counter[str] | None = None
) -> Iterator[tuple[str, Path]]:
    """Yield what `iter_image_files` does, each with a name that is the same on every machine.

    That is its POSIX path below the given folder, or the name of a file that was given itself.
    """
    given = [Path(check_path(one, "a picture")) for one in check_list(paths, "paths")]
    seen: set[Path] | None = set() if len(given) > 1 else None
    for path in given:
        in_folder: Counter[str] = Counter()
        if path.is_dir():
            files = _folder_images(path, in_folder)
        elif path.exists():
            refuse_archive(path, "a picture or a folder of pictures")
            files = iter([path])
        else:
            raise InputError(f"no such file or folder: {path}", code="path_missing", path=str(path))
        found = False
        for file in files:
            found = True
            if seen is not None:
                absolute = file.absolute()
                if absolute in seen:
                    continue
                seen.add(absolute)
            yield (file.name if file == path else file.relative_to(path).as_posix()), file
        if others is not None:
            others.update(in_folder)
        elif found and in_folder.keys() & _WITH_PICTURES:
            _LOG.warning("%s: left out %s", path, describe_others(in_folder))
        if not found:
            suffixes = ", ".join(sorted(image_suffixes()))
            message = f"no images in folder {path}: expected files ending in {suffixes}, there or"
            message += " in its sub-folders"
            if in_folder:
                message += f", found {describe_others(in_folder)}"
            raise InputError(message, code="no_images", path=str(path), others=dict(in_folder))


def describe_others(others: Mapping[str, int]) -> str:
    """Return counted kinds as a text, with advice for those that hold pictures."""
    most_first = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count} {kind}{_advice_for(kind)}" for kind, count in most_first)


def _advice_for(kind: str) -> str:
    photo = _PHOTO_SUFFIXES.get(f".{kind}")
    return f" ({obstacle_to(photo)})" if photo is not None else _ADVICE.get(kind, "")


_KIND = re.compile(r"\.([a-z0-9]{1,8})")
_ADVICE = {
    "jxl": " (convert them to JPEG)",
    **dict.fromkeys(("7z", "gz", "rar", "tar", "tgz", "zip"), " (unpack it)"),
}
_WITH_PICTURES = {"avif", "heic", "heif", *_ADVICE}


def _folder_images(folder: Path, others: Counter[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read folder {error.filename}: {error.strerror}") from error

    suffixes = image_suffixes()
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in suffixes:
                yield Path(root, name)
            else:
                kind = _KIND.fullmatch(suffix)
                others["other" if kind is None else kind[1]] += 1


def _as_image(pixels: PixelArray) -> Image.Image:
    """Return a Pillow image; Pillow itself would first copy a part of a larger array."""
    height, width = pixels.shape[:2]
    blocks = list(_blocks(width, height))
    if len(blocks) == 1:
        return Image.fromarray(pixels)
    image = Image.new("RGB", (width, height))
    for x0, y0, x1, y1 in blocks:
        image.paste(Image.fromarray(pixels[y0:y1, x0:x1]), (x0, y0))
    return image


def _rgb_from_array(given: PixelArray, channels: Channels) -> NDArray[np.uint8]:
    if given.dtype != np.uint8:
        message = f"an image array must be uint8 with values 0 to 255, got {given.dtype}"
        raise InputError(message, code="array_unfit")
    array: NDArray[np.uint8] = given.astype(np.uint8, copy=False)
    if 0 in array.shape:
        message = f"an image array must not be empty, got shape {array.shape}"
        raise InputError(message, code="array_unfit")
    bgr = channels == "bgr"
    match array.shape:
        case (_, _, 3):
            return array[..., ::-1] if bgr else array
        case (_, _, 4):
            array = array[..., [2, 1, 0, 3]] if bgr else array
        case (_, _, 1):
            array = array[..., 0]
        case (_, _):
            pass
        case shape:
            message = "an image array must be [H, W, 3] or [H, W], one picture at a time"
            raise InputError(f"{message}, got shape {shape}", code="array_unfit")
    return _decode(Image.fromarray(np.ascontiguousarray(array)), "the given array")


def _decode(image: Image.Image, name: str) -> NDArray[np.uint8]:
    if 0 in image.size:
        raise InputError(f"cannot read image {name}: it has no pixels")
    with naming_image(name):
        image.load()
        return _upright_rgb(image)


def _decode_and_close(image: Image.Image, name: str) -> NDArray[np.uint8]:
    try:
        return _decode(image, name)
    finally:
        free_pixels(image)


def _upright_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert block by block into the array that is returned: little else is in memory."""
    width, height = image.size
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    shape = (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    upright = np.empty((*shape, 3), dtype=np.uint8)
    turned = _AS_STORED.get(orientation)
    as_stored = upright if turned is None else turned(upright)
    blocks = list(_blocks(width, height))
    shift = _is_wide(image) and _holds_16_bits(image, blocks)
    for x0, y0, x1, y1 in blocks:
        block = image if len(blocks) == 1 else image.crop((x0, y0, x1, y1))
        as_stored[y0:y1, x0:x1] = np.asarray(_rgb_from_image(block, shift))
    return upright


_AS_STORED: dict[Any, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: np.rot90,
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: np.rot90(upright, -1),
}
"""By orientation: a view of an upright picture whose rows are those of its file."""


def _blocks(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    columns = min(width, _BLOCK_PIXELS)
    rows = max(1, _BLOCK_PIXELS // columns)
    for y in range(0, height, rows):
        for x in range(0, width, columns):
            yield x, y, min(x + columns, width), min(y + rows, height)


def _rgb_from_image(image: Image.Image, shift: bool) -> Image.Image:
    if image.mode == "RGB":
        return image
    if _is_wide(image):
        return _grey_from_wide(image, shift).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _is_wide(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def _holds_16_bits(image: Image.Image, blocks: Iterable[tuple[int, int, int, int]]) -> bool:
    if image.mode.startswith("I;16"):
        return True
    # NaN counts as 0, as in `_grey_from_wide`.
    return any(bool((np.asarray(image.crop(block)) > 255).any()) for block in blocks)


def _grey_from_wide(image: Image.Image, shift: bool) -> Image.Image:
    """Reduce 16-bit, 32-bit and float grey to 8 bits; Pillow's own conversion only clips."""
    wide = np.asarray(image)
    if wide.dtype.kind == "f":
        wide = np.nan_to_num(wide)
    if shift:
        wide = wide // wide.dtype.type(256)
    return Image.fromarray(np.clip(wide, 0, 255).astype(np.uint8))


# --- When a picture was taken, as far as its file says

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
    """Return when a picture was taken in unix seconds, or None; without a zone in local time."""
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
        with open_image(path, header_only=True) as image:
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
