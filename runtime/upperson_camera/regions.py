"""Zones and masks of a camera: polygons in shares of the picture's width and height."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_camera.source import import_cv2
from upperson_rt.arguments import check_list, is_finite
from upperson_rt.errors import InputError
from upperson_rt.ingest.boxes import Boxes
from upperson_rt.printable import safe_repr

Point: TypeAlias = tuple[float, float]
Polygon: TypeAlias = Sequence[Sequence[float]]
"""Corners in order, x and y from 0 to 1; the last one is joined with the first."""

_MOST_POLYGONS = 50
_MOST_CORNERS = 100
_ROUNDING = 1e-12
"""Of areas in shares of the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Regions:
    """Where people count.

    A box counts if its foot point (the middle of its lower edge) or its centre lies in one of the
    zones, or if there are none. A box whose foot point lies in a mask is ignored. The edges of a
    polygon belong to it.

    Raises:
        InputError: On construction, if a polygon has under three corners or one outside the
            picture, or crosses or touches itself, or there are too many.
    """

    zones: Sequence[Polygon] = ()
    masks: Sequence[Polygon] = ()
    _contours: dict[str, list[NDArray[np.float32]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("zones", "masks"):
            polygons = _check_polygons(getattr(self, name), name)
            object.__setattr__(self, name, polygons)
            self._contours[name] = [np.array(corners, np.float32) for corners in polygons]

    def without_masked(self, boxes: Boxes, width: int, height: int) -> Boxes:
        """Return the boxes that are not ignored; the others are counted in ``dropped``."""
        if not self.masks or not len(boxes.edges):
            return boxes
        kept = ~self._hold("masks", _points(boxes.edges, width, height)[0])
        return Boxes(
            edges=boxes.edges[kept],
            scores=boxes.scores[kept],
            rows=boxes.rows[kept],
            dropped={**boxes.dropped, "masked": int((~kept).sum())},
        )

    def in_zone(self, boxes: Boxes, width: int, height: int) -> list[bool]:
        """Return for each box whether it lies in a zone; all do if there are none."""
        if not self.zones:
            return [True] * len(boxes.edges)
        feet, centres = _points(boxes.edges, width, height)
        inside: list[bool] = (self._hold("zones", feet) | self._hold("zones", centres)).tolist()
        return inside

    def _hold(self, name: str, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return for (N, 2) points whether one of the polygons holds them."""
        test = import_cv2().pointPolygonTest
        contours = self._contours[name]
        found = [any(test(each, point, False) >= 0 for each in contours) for point in points]
        return np.array(found, bool)


def _points(
    edges: NDArray[np.int64], width: int, height: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (N, 2) foot points, in the last row of pixels, and (N, 2) centres, in shares."""
    x0, y0, x1, y1 = edges.T / np.array([[width], [height], [width], [height]])
    middle = (x0 + x1) / 2
    return np.stack([middle, y1 - 0.5 / height], 1), np.stack([middle, (y0 + y1) / 2], 1)


# --- Checks of polygons


def _check_polygons(given: Any, name: str) -> tuple[tuple[Point, ...], ...]:
    polygons = check_list(given, name)
    if len(polygons) > _MOST_POLYGONS:
        raise _refused(name, f"at most {_MOST_POLYGONS} polygons", f"{len(polygons)}")
    return tuple(_check_polygon(each, f"{name}[{i}]") for i, each in enumerate(polygons))


def _check_polygon(given: Any, at: str) -> tuple[Point, ...]:
    corners = check_list(given, at)
    if not 3 <= len(corners) <= _MOST_CORNERS:
        raise _refused(at, f"a polygon of 3 to {_MOST_CORNERS} corners", f"{len(corners)}")
    points = tuple(_check_corner(each, f"{at}[{i}]") for i, each in enumerate(corners))
    for i, j in combinations(range(len(points)), 2):
        if points[i] == points[j]:
            found = f"corner {j + 1} that repeats corner {i + 1}"
            if i == 0 and j == len(points) - 1:
                found += ": leave it out, the polygon is closed without it"
            raise _refused(at, "corners that differ", found)
    sides = list(zip(points, (*points[1:], points[0]), strict=True))
    for (i, one), (j, other) in combinations(enumerate(sides), 2):
        if j - i == 1 or (i == 0 and j == len(sides) - 1):
            first, second = (one, other) if j - i == 1 else (other, one)
            meet = _turns_back(*first, second[1])
        else:
            meet = _cross(*one, *other)
        if meet:
            expected = "a polygon that neither crosses nor touches itself"
            raise _refused(at, expected, f"sides {i + 1} and {j + 1} that do")
    return points


def _check_corner(given: Any, at: str) -> Point:
    corner = check_list(given, at)
    if len(corner) != 2 or not all(
        is_finite(value) and type(value) is not bool and 0 <= value <= 1 for value in corner
    ):
        expected = "x and y from 0 to 1, in shares of the width and height"
        raise _refused(at, expected, safe_repr(given))
    return float(corner[0]), float(corner[1])


def _refused(at: str, expected: str, found: str) -> InputError:
    text = f"{at}: expected {expected}, found {found}"
    return InputError(text, code="polygon_malformed", at=at, expected=expected)


def _side(a: Point, b: Point, c: Point) -> float:
    """Return whether c lies to the left of a line (above 0), on it (0), or to the right."""
    area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    return 0.0 if abs(area) < _ROUNDING else area


def _turns_back(a: Point, b: Point, c: Point) -> bool:
    """Return whether the sides ab and bc share more than b."""
    ahead = (b[0] - a[0]) * (c[0] - b[0]) + (b[1] - a[1]) * (c[1] - b[1])
    return a == b or b == c or (_side(a, b, c) == 0 and ahead < 0)


def _cross(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Return whether the sides ab and cd share a point."""
    sides = _side(a, b, c), _side(a, b, d), _side(c, d, a), _side(c, d, b)
    if sides[0] * sides[1] < 0 and sides[2] * sides[3] < 0:
        return True
    ends = (c, a, b), (d, a, b), (a, c, d), (b, c, d)
    return any(side == 0 and _is_between(*end) for side, end in zip(sides, ends, strict=True))


def _is_between(point: Point, a: Point, b: Point) -> bool:
    return all(min(a[k], b[k]) <= point[k] <= max(a[k], b[k]) for k in (0, 1))
