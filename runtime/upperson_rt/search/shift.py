"""Whether a gallery's pictures look like those that its scores were calibrated on.

The mean embedding of each camera's latest pictures, by day and by night, is compared with that of
the calibration's pictures along the principal axes of these.

Shapes: N pictures, D dimensions.
"""

import threading
import time
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.score_calibration import Reference

LEAST = 200
"""Pictures from which a group is compared."""
FEWEST = 20
"""Pictures from which a gallery has likelihoods at all."""
_MOST, _MOST_READ = 250, 4000
_HOUR_S, _DAY_S = 3_600.0, 86_400.0
_DAYLIGHT = range(6, 20)
"""Hours of the local day that count as day."""
_KEPT_S = 600.0
_Pictures: TypeAlias = list[tuple[Item, NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Pictures of one camera by day or by night, compared with the reference."""

    camera: str | None
    """None for pictures without a camera."""
    is_night: bool
    pictures: int
    distance: float
    """Squared; the reference's threshold is the limit."""


class ShiftCheck:
    """Compares one gallery with a reference, again after ten minutes. Safe for several threads."""

    def __init__(self, gallery: Gallery, reference: Reference) -> None:
        self._gallery = gallery
        self._reference = reference
        self._lock = threading.Lock()
        self._checked: tuple[float, int, list[Group]] | None = None

    def groups(self) -> list[Group]:
        """Return the groups with enough pictures, farthest first."""
        with self._lock:
            count = self._gallery.count()
            if self._checked is not None:
                at, before, groups = self._checked
                if time.monotonic() - at < _KEPT_S and 0.9 * before <= count <= 1.1 * before:
                    return groups
            groups = compare(self._gallery, self._reference)
            self._checked = time.monotonic(), count, groups
            return groups

    def shifted(self, cameras: "tuple[str, ...] | None") -> list[Group]:
        """Return the groups of these cameras, by default of all, that are unlike the reference."""
        return [
            group
            for group in self.groups()
            if group.distance > self._reference.threshold
            and (cameras is None or group.camera in cameras)
        ]


def compare(gallery: Gallery, reference: Reference) -> list[Group]:
    """Compare each camera's latest pictures with the reference, by day and by night."""
    by_group: dict[tuple[str | None, bool], list[NDArray[np.float32]]] = {}
    for window in _windows(gallery):
        for item, vector_D in _read(gallery, window):
            by_group.setdefault((item.camera, is_night(item)), []).append(vector_D)
    few = {group for group, own in by_group.items() if len(own) < LEAST}
    # From all over the gallery where the last hours do not have enough, the newest first.
    sampled: dict[tuple[str | None, bool], list[NDArray[np.float32]]] = {}
    for item, vector_D in _sampled(gallery):
        group = (item.camera, is_night(item))
        if group in few or group not in by_group:
            sampled.setdefault(group, []).append(vector_D)
    found = [
        Group(
            camera=camera,
            is_night=at_night,
            pictures=len(own),
            distance=reference.distance(np.stack(own[-_MOST:])),
        )
        for (camera, at_night), own in (by_group | sampled).items()
        if len(own) >= LEAST
    ]
    return sorted(found, key=lambda group: -group.distance)


def _windows(gallery: Gallery) -> list[Filter]:
    """Return the last hour, and an hour half a day before; none without times."""
    infos = gallery.by_camera().values()
    times = [info.last_time for info in infos if info.last_time is not None]
    if not times:
        return []
    # A clock in the future must not hide the others.
    last = min(max(times), max((one for one in times if one <= time.time()), default=max(times)))
    before = last - _DAY_S / 2
    return [
        Filter(since=last - _HOUR_S, until=last + _HOUR_S),
        Filter(since=before - _HOUR_S / 2, until=before + _HOUR_S / 2),
    ]


def _read(gallery: Gallery, where: Filter) -> _Pictures:
    items, vectors_ND = next(
        gallery.vectors(where, _MOST_READ), ([], np.empty((0, gallery.embed_dim), np.float32))
    )
    return list(zip(items, vectors_ND, strict=True))


def _sampled(gallery: Gallery) -> _Pictures:
    """Return pictures from all over the gallery, by id."""
    if not gallery.count():
        return []
    ids = gallery.ids([item.key for item in gallery.sample(_MOST_READ)])
    found = gallery.get(sorted(ids.values()))
    return [found[id_] for id_ in sorted(found)]


def is_night(item: Item) -> bool:
    """Whether a picture was taken at night, by the local hour; one without a time was not."""
    return item.time is not None and time.localtime(item.time).tm_hour not in _DAYLIGHT
