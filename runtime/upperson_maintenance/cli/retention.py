"""Options of commands that delete what is too old or too much."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upperson_rt.cli.groups import OptionGroup, option
from upperson_rt.cli.options import age_seconds
from upperson_rt.errors import UsageError
from upperson_rt.printable import safe_repr

if TYPE_CHECKING:
    from upperson_maintenance.retention import Retention

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def byte_size(text: str) -> int:
    """Read bytes such as ``200G`` (10^9 each); UsageError with code ``size_malformed`` if not."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([KMGT]?)B?", text.strip())
    if match is None or not (size := int(float(match[1]) * _BYTES[match[2]])):
        raise UsageError(
            f"{safe_repr(text)} is no size: expected bytes, or a number and K, M, G or T, such as "
            "200G",
            code="size_malformed",
            found=text,
        )
    return size


def read_retention(ages: Sequence[str], keep_bytes: int | None) -> "Retention | None":
    """Read ages such as ``30d`` and ``gate=7d``; return None if there is no limit at all.

    Raises:
        UsageError: An age is malformed, or a camera has two.
    """
    from upperson_maintenance.retention import Retention

    limits: dict[str, float] = {}
    for text in ages:
        camera, _, age = text.rpartition("=")
        if camera in limits:
            name = f"camera {safe_repr(camera)} has" if camera else "there are"
            raise UsageError(f"{name} two ages: give one", code="age_given_twice", camera=camera)
        limits[camera] = age_seconds(age)
    keep_s = limits.pop("", None)
    if keep_s is None and not limits and keep_bytes is None:
        return None
    return Retention(keep_s=keep_s, by_camera=limits, keep_bytes=keep_bytes)


@dataclass(frozen=True)
class Keeping(OptionGroup, panel="Retention"):
    """How long, and how much, the gallery keeps."""

    keep: list[str] | None = option(
        None,
        "Delete pictures of this age, such as 30d; with CAMERA= in front those of one camera. "
        "Repeatable.",
        metavar="[CAMERA=]AGE",
        show_default="all stay",
    )
    keep_bytes: int | None = option(
        None,
        "Delete pictures, those in the bin first, then the oldest, while all files of the gallery "
        "take more, such as 200G.",
        parser=byte_size,
        metavar="SIZE",
    )

    def retention(self) -> "Retention | None":
        """Return the limits; None without one."""
        return read_retention(self.keep or (), self.keep_bytes)
