"""What a crop must have to be embedded."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from upperson_rt.arguments import (
    check_choice,
    check_fields,
)
from upperson_rt.errors import UsageError

__all__ = ["BorderRule", "QualityRules"]

BorderRule: TypeAlias = Literal["keep", "last", "drop"]
"""Views that touch the border: like others, only if there is no other, or never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRules:
    """What a view must have to be embedded.

    Raises:
        UsageError: On construction, if a number is negative or the border rule unknown.
    """

    min_height_px: int = 64
    min_width_px: int = 24
    min_sharpness: float = 20.0
    """Variance of the Laplacian of the grey view, scaled down to 128 pixels of height."""
    border: BorderRule = "last"

    def __post_init__(self) -> None:
        check_fields(self)
        if min(self.min_height_px, self.min_width_px, self.min_sharpness) < 0:
            raise UsageError("smallest height, width and sharpness must not be negative")
        check_choice(self.border, "border", get_args(BorderRule))

    def size_problem(self, height_px: int, width_px: int) -> str | None:
        """Return why a box is not looked at any further, or None."""
        small = height_px < self.min_height_px or width_px < self.min_width_px
        return "too_small" if small else None

    def problem(self, sharpness: float, at_border: bool) -> str | None:
        """Return why a view is not used, or None."""
        if at_border and self.border == "drop":
            return "at_border"
        return "blurred" if sharpness < self.min_sharpness else None
