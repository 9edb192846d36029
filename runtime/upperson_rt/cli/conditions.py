"""The options that narrow a gallery down, as a filter."""

from typing import TYPE_CHECKING

from upperson_rt.cli.options import read_attributes
from upperson_rt.cli.output import print_warning

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter, Gallery

__all__ = ["read_filter", "warn_of_unknown_cameras"]


def read_filter(
    camera: list[str] | None,
    since: float | None,
    until: float | None,
    track: str | None,
    where: list[str] | None,
) -> "Filter":
    """Return the filter of --camera, --since, --until, --track and --where.

    Raises:
        UsageError: They contradict each other, or a pair of --where is malformed.
    """
    from upperson_rt.gallery import Filter

    return Filter(
        camera=camera or None,
        since=since,
        until=until,
        track=track,
        attributes=read_attributes(where, "--where"),
    )


def warn_of_unknown_cameras(store: "Gallery", where: "Filter") -> None:
    """Warn of cameras in a filter that no picture is from."""
    from upperson_rt.gallery import Filter

    unknown = [name for name in where.cameras or () if not store.count(Filter(camera=name))]
    if unknown:
        known = ", ".join(store.cameras()) or "none that has a name"
        for name in unknown:
            print_warning(f"no picture of the camera '{name}'; the gallery's cameras are: {known}")
