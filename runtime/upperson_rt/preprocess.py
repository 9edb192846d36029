"""Pictures from files: decoding, conversion to RGB and the resize that training uses.

Every picture becomes uint8 RGB the same way in training, calibration and at run time:

- EXIF orientation is applied.
- Transparency is laid over white.
- 16-bit pictures keep their upper 8 bits; 32-bit integers and floats are read as 0 to 255 unless
  their maximum shows 16-bit content.
- Grey, palette, CMYK and the other modes of Pillow are converted by Pillow.
- Of an animation or a file of several pages the first picture counts.
- A JPEG above Pillow's limit of 89 million pixels is decoded at a half, a quarter or an eighth of
  its size, which needs little memory; other pictures of that size are refused.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from upperson_rt.errors import InputError, UsageError

__all__ = [
    "IMAGE_SUFFIXES",
    "Channels",
    "ImageSource",
    "iter_image_files",
    "load_image",
    "resize_image",
]

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]"
"""A file, a Pillow image, or a uint8 array: grey [H, W] or [H, W, 1], colour [H, W, 3], or colour
and opacity [H, W, 4]."""

Channels: TypeAlias = Literal["rgb", "bgr"]
"""Order of the colours in arrays; ``bgr`` is OpenCV's. Files and Pillow images know theirs."""

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""What `iter_image_files` takes from a folder, in lower case."""

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def load_image(source: ImageSource, channels: Channels = "rgb") -> NDArray[np.uint8]:
    """Read a picture as uint8 RGB [H, W, 3] of its own size, upright.

    Only a JPEG above Pillow's limit of pixels comes back smaller than it is.

    Args:
        source: A file, a Pillow image (left open) or a uint8 array.
        channels: Order of the colours if the source is an array.

    Raises:
        InputError: The picture is missing, unreadable, truncated or too large, or it is an array
            of another type or shape, or no picture at all.
        UsageError: There is no such order of channels.
    """
    if channels not in ("rgb", "bgr"):
        raise UsageError(f"channels must be 'rgb' or 'bgr', got {channels!r}")
    if isinstance(source, np.ndarray):
        return _rgb_from_array(source, channels)
    if isinstance(source, Image.Image):
        return _decode(source, "the given image")
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"expected a picture: a file name, a Pillow image or a uint8 array, found "
            f"{type(source).__name__}"
        )
    path = os.fspath(source)
    if os.path.exists(path) and not os.path.isfile(path):
        # Opening a pipe would wait for its other end forever.
        raise InputError(f"cannot read image {path}: not a regular file")
    try:
        with open(path, "rb") as file, _open(file, path) as image:
            return _decode(image, path)
    except InputError:
        raise
    except Exception as error:  # A damaged file may lead Pillow's many readers to any error.
        raise InputError(f"cannot read image {path}: {_reason(error)}") from error


def resize_image(image: NDArray[np.uint8], height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Resize to the input of the image tower; the aspect ratio is not kept, as in training.

    Args:
        image: uint8 RGB [H, W, 3].
        height_px: Height of the result.
        width_px: Width of the result.

    Returns:
        uint8 RGB [height_px, width_px, 3]: Pillow's bilinear filter, antialiased.
    """
    if image.shape[:2] == (height_px, width_px):
        return image
    resized = Image.fromarray(image).resize((width_px, height_px), Image.Resampling.BILINEAR)
    return np.array(resized, dtype=np.uint8)


def iter_image_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """Yield picture files: files as given, folders recursively in sorted order, nothing twice.

    A file that is named directly is yielded whatever its suffix; inside folders only
    `IMAGE_SUFFIXES` count, and hidden files and folders are left out.

    Raises:
        InputError: A path does not exist, or a folder cannot be read or holds no picture.
    """
    seen: set[Path] = set()
    for given in paths:
        path = Path(given)
        if path.is_dir():
            files = list(_folder_images(path))
            if not files:
                raise InputError(
                    f"no images in folder {path}: expected files ending in "
                    f"{', '.join(sorted(IMAGE_SUFFIXES))}, there or in its sub-folders"
                )
        elif path.exists():
            files = [path]
        else:
            raise InputError(f"no such file or folder: {path}")
        for file in files:
            absolute = file.absolute()
            if absolute not in seen:
                seen.add(absolute)
                yield file


def _folder_images(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read folder {error.filename}: {error.strerror}") from error

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(root, name)


def _open(file: BinaryIO, path: str) -> Image.Image:
    """Read the header, and see to it that decoding needs a bounded amount of memory."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(file)
        if limit is None or image.width * image.height <= limit:
            return image
        size = f"{image.width}x{image.height} pixels"
    except _BOMBS as error:  # Pillow raises it from twice the limit on.
        size = str(error)
    too_large = InputError(f"image {path} is too large to be a person's picture: {size}")
    file.seek(0)
    if limit is None or file.read(2) != b"\xff\xd8":
        raise too_large
    file.seek(0)
    jpeg = JpegImageFile(file)
    # All of a progressive file has to be in memory before it can be reduced.
    if "progressive" in jpeg.info:
        raise too_large
    width, height = jpeg.size
    shrink = next((n for n in (2, 4, 8) if width * height <= limit * n * n), 8)
    jpeg.draft(None, (width // shrink, height // shrink))
    if jpeg.width * jpeg.height > limit:
        raise too_large
    return jpeg


def _rgb_from_array(array: NDArray[np.uint8], channels: Channels) -> NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise InputError(f"an image array must be uint8 with values 0 to 255, got {array.dtype}")
    if 0 in array.shape:
        raise InputError(f"an image array must not be empty, got shape {array.shape}")
    bgr = channels == "bgr"
    match array.shape:
        case (_, _, 3):
            return np.ascontiguousarray(array[..., ::-1] if bgr else array)
        case (_, _, 4):
            array = array[..., [2, 1, 0, 3]] if bgr else array
        case (_, _, 1):
            array = array[..., 0]
        case (_, _):
            pass
        case _:
            raise InputError(
                "an image array must be [H, W, 3] or [H, W], one picture at a time, got shape "
                f"{array.shape}"
            )
    return _decode(Image.fromarray(np.ascontiguousarray(array)), "the given array")


def _decode(image: Image.Image, name: str) -> NDArray[np.uint8]:
    try:
        image.load()
        return np.array(_rgb_from_image(ImageOps.exif_transpose(image)), dtype=np.uint8)
    except _BOMBS as error:
        raise InputError(f"image {name} is too large to be a person's picture: {error}") from error
    except Exception as error:  # See `load_image`.
        raise InputError(f"cannot read image {name}: {_reason(error)}") from error


def _rgb_from_image(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _grey_from_wide(image).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey_from_wide(image: Image.Image) -> Image.Image:
    """Reduce 16-bit, 32-bit and float grey to 8 bits; Pillow's own conversion only clips."""
    wide = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode.startswith("I;16") or wide.max() > 255:
        wide = wide // 256
    return Image.fromarray(np.clip(wide, 0, 255).astype(np.uint8))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    return str(error) or type(error).__name__
