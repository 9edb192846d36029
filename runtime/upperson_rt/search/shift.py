"""Whether a gallery's pictures look like those that its scores were calibrated on.

The mean embedding of each camera's latest pictures, by day and by night, is compared with that of
the calibration's pictures along the principal axes of these.

Shapes: N pictures, D dimensions.
"""

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery import CameraInfo, Filter, Gallery, Item
from upperson_rt.score_calibration import Reference

LEAST = 200
"""Pictures from which a group is compared."""
FEWEST = 20
"""Pictures from which a gallery has likelihoods at all."""
_MOST, _MOST_READ, _MOST_OF_CAMERA = 250, 4000, 1000
_HOUR_S, _DAY_S = 3_600.0, 86_400.0
_DAYLIGHT = range(6, 20)
"""Hours of the local day that count as day."""
_KEPT_S = 600.0
_Vectors: TypeAlias = list[NDArray[np.float32]]
_Key: TypeAlias = tuple[str | None, bool]
"""Camera, and whether by night."""
_Picture: TypeAlias = tuple[Item, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Pictures of one camera by day or by night, compared with the reference."""

    camera: str | None
    """None for pictures without a camera."""
    is_night: bool
    pictures: int
    distance: float
    """Squared; the reference's threshold is the limit."""


class NotCompared(NamedTuple):
    """Pictures that were searched and are not compared, as their camera has too few."""

    cameras: list[str]
    of_cameras: int
    """Pictures of these."""
    without_camera: int
    """Pictures without a camera."""
    searched: int
    """All pictures that were searched."""

    @property
    def pictures(self) -> int:
        """How many are not compared."""
        return self.of_cameras + self.without_camera

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of a notice or a reason; JSON values."""
        return {"cameras": self.cameras, "pictures": self.pictures, "wanted": LEAST}


class ShiftCheck:
    """Compares one gallery with a reference, again after ten minutes. Safe for several threads."""

    def __init__(self, gallery: Gallery, reference: Reference) -> None:
        self._gallery = gallery
        self._reference = reference
        self._lock = threading.Lock()
        self._checked: tuple[float, int] | None = None
        self._groups: list[Group] = []
        self._cameras: list[str] = []

    def groups(self) -> list[Group]:
        """Return the groups with enough pictures, farthest first."""
        return self._refreshed()[0]

    def _refreshed(self) -> tuple[list[Group], list[str]]:
        """Return the groups with enough pictures, and the names of all cameras."""
        with self._lock:
            count = self._gallery.count()
            if self._checked is not None:
                at, before = self._checked
                if time.monotonic() - at < _KEPT_S and 0.9 * before <= count <= 1.1 * before:
                    return self._groups, self._cameras
            cameras = self._gallery.by_camera()
            self._groups = compare(self._gallery, self._reference, cameras)
            self._cameras = sorted(cameras)
            self._checked = time.monotonic(), count
            return self._groups, self._cameras

    def not_compared(self, where: Filter | None, searched: int) -> "NotCompared":
        """Return which of the ``searched`` pictures that pass are of no camera in `groups`."""
        where = Filter() if where is None else where
        groups, cameras = self._refreshed()
        compared = {group.camera for group in groups}

        def count(of: Iterable[str]) -> int:
            names = tuple(name for name in of if where.cameras is None or name in where.cameras)
            return self._gallery.count(replace(where, camera=names)) if names else 0

        few = [name for name in cameras if name not in compared and count([name])]
        without = 0 if None in compared else max(0, searched - count(cameras))
        return NotCompared(few, count(few), without, searched)

    def shifted(self, cameras: "tuple[str, ...] | None") -> list[Group]:
        """Return the groups of these cameras, by default of all, that are unlike the reference."""
        return [
            group
            for group in self.groups()
            if group.distance > self._reference.threshold
            and (cameras is None or group.camera in cameras)
        ]


def compare(
    gallery: Gallery, reference: Reference, cameras: Mapping[str, CameraInfo] | None = None
) -> list[Group]:
    """Compare each camera's latest pictures with the reference, by day and by night.

    ``cameras`` is `Gallery.by_camera`, read if left out.
    """
    cameras = gallery.by_camera() if cameras is None else cameras
    by_group = _grouped(
        picture for window in _windows(cameras.values()) for picture in _read(gallery, window)
    )
    # From all over the gallery where the last hours do not have enough, the newest first.
    sampled = _grouped(_sampled(gallery))
    by_group |= _more(sampled, by_group)
    # Of many cameras, a sample has few of each, or none by night.
    for name, info in cameras.items():
        both = [by_group.get((name, at_night), []) for at_night in (False, True)]
        if info.pictures >= LEAST and min(map(len, both)) < LEAST:
            latest = _grouped(_read(gallery, Filter(camera=name), _MOST_OF_CAMERA))
            by_group |= _more(latest, by_group)
    found = [
        Group(
            camera=camera,
            is_night=at_night,
            pictures=len(own),
            distance=reference.distance(np.stack(own[-_MOST:])),
        )
        for (camera, at_night), own in by_group.items()
        if len(own) >= LEAST
    ]
    return sorted(found, key=lambda group: -group.distance)


def _more(found: Mapping[_Key, _Vectors], there: Mapping[_Key, _Vectors]) -> dict[_Key, _Vectors]:
    """Return the groups of which too few are there."""
    return {
        group: own
        for group, own in found.items()
        if len(there.get(group, ())) < min(LEAST, len(own))
    }


def _grouped(pictures: Iterable[_Picture]) -> dict[_Key, _Vectors]:
    """Return vectors by camera, and whether they were taken at night."""
    found: dict[_Key, _Vectors] = {}
    for item, vector_D in pictures:
        found.setdefault((item.camera, is_night(item)), []).append(vector_D)
    return found


def _windows(infos: Iterable[CameraInfo]) -> list[Filter]:
    """Return the last hour, and an hour half a day before; none without times."""
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


def _read(gallery: Gallery, where: Filter, most: int = _MOST_READ) -> list[_Picture]:
    items, vectors_ND = next(
        gallery.vectors(where, most), ([], np.empty((0, gallery.embed_dim), np.float32))
    )
    return list(zip(items, vectors_ND, strict=True))


def _sampled(gallery: Gallery) -> list[_Picture]:
    """Return pictures from all over the gallery, by id."""
    if not gallery.count():
        return []
    ids = gallery.ids([item.key for item in gallery.sample(_MOST_READ)])
    found = gallery.get(sorted(ids.values()))
    return [found[id_] for id_ in sorted(found)]


def is_night(item: Item) -> bool:
    """Whether a picture was taken at night, by the local hour; one without a time was not."""
    return item.time is not None and time.localtime(item.time).tm_hour not in _DAYLIGHT
