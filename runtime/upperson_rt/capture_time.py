"""When a picture was taken, as far as its file tells."""

import datetime
import os
import re
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import ExifTags

from upperson_rt.errors import InputError
from upperson_rt.image_file import open_image

__all__ = ["TimeSource", "capture_time"]

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
