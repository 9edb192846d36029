"""Scores of earlier visits, against which a new visit is compared.

A visit is a track of a camera; a picture without a track is one of its own. For each alert only the
upper tail of the scores is kept, and the number of all visits.

Shapes: N pictures, V visits, S alerts, K scores of a tail, D dimensions.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_alerts.promise import (
    allowed_p,
    most_by_chance,
    required_visits,
    visits_per_day,
)
from upperson_rt.gallery import Gallery, Item

WINDOW_ROWS = 300_000
"""Pictures that are looked at, newest first."""
STEP_ROWS = 4096
"""Pictures that are read at a time."""
_TAIL = 1024
"""Scores that are kept of each alert: a laxer promise is kept with room to spare."""
_FEW = 16
"""Visits that are counted in one by one: more are quicker together."""
_MOST_OPEN = 1024
"""Visits whose next pictures are averaged with those before: the ones with the latest."""
_NOTABLE_P = 0.05
"""While an alert collects, what beats all visits is kept for review from so many visits on."""
_WIDER, _WEEK = 10, 7
"""A change shows earlier among visits that score a little lower, and a small one in some days."""
_USUAL_TIMES = 2.0
_MOST_SEEN = 400_000
_MOST_HOURS = 100_000
Cameras: TypeAlias = tuple[str, ...] | None
"""Of an alert; None for all."""
Score: TypeAlias = Callable[
    [NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]
]
"""From pictures (N, D), means and counts to scores (N, S) for S alerts, see `Scorer.scores`."""


def scope_of(cameras: Cameras) -> str:
    """Return a name for cameras."""
    return json.dumps(cameras)


def visit_id(item: Item) -> int:
    """Return 64 bits of the name of a picture's visit."""
    name = f"{item.camera}\0{item.track}" if item.track is not None else f"picture\0{item.key}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


class RunningMeans:
    """Means of the pictures of each visit so far, for the visits with the latest pictures.

    The score of a visit is the best of those of its running means: it depends on the order of its
    pictures, and not on how they were divided into commits.
    """

    def __init__(self) -> None:
        self._sums: OrderedDict[int, tuple[int, NDArray[np.float32]]] = OrderedDict()

    def of(
        self, items: Sequence[Item], images_ND: NDArray[np.float32], *, keep: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return for each picture the mean up to it (N, D), of unit length, and of how many (N,).

        ``keep`` adds the pictures to their visits.
        """
        sums = self._sums if keep else OrderedDict(self._sums)
        means_ND, counts_N = images_ND.copy(), np.ones(len(items), np.int64)
        for row, item in enumerate(items):
            if item.track is None:
                continue
            visit = visit_id(item)
            count, sum_D = sums.get(visit, (0, np.zeros(images_ND.shape[1], np.float32)))
            counts_N[row], means_ND[row] = count + 1, sum_D + images_ND[row]
            sums[visit] = count + 1, means_ND[row].copy()
            sums.move_to_end(visit)
            if len(sums) > _MOST_OPEN:
                sums.popitem(last=False)
        means_ND /= np.maximum(np.linalg.norm(means_ND, axis=1, keepdims=True), 1e-12)
        return means_ND, counts_N


@dataclass(frozen=True, kw_only=True)
class Visits:
    """The visits of some pictures, and their scores."""

    ids: list[int]
    scores_VS: NDArray[np.float32]
    """The best of its pictures', see `RunningMeans`."""
    firsts: list[int]
    """The first picture of each."""
    of_N: NDArray[np.intp]
    """The visit of each picture."""
    scores_NS: NDArray[np.float32]

    @classmethod
    def of(cls, items: Sequence[Item], scores_NS: NDArray[np.float32]) -> "Visits":
        """Group pictures by visit."""
        rows: dict[int, int] = {}
        firsts: list[int] = []
        of_N = np.empty(len(items), np.intp)
        for number, item in enumerate(items):
            visit = visit_id(item)
            if visit not in rows:
                rows[visit] = len(rows)
                firsts.append(number)
            of_N[number] = rows[visit]
        scores_VS = np.full((len(rows), scores_NS.shape[1]), -np.inf, np.float32)
        np.maximum.at(scores_VS, of_N, scores_NS)
        return cls(ids=[*rows], scores_VS=scores_VS, firsts=firsts, of_N=of_N, scores_NS=scores_NS)

    def best_picture(self, row: int, column: int) -> int:
        """Return the picture of a visit that scores highest for an alert."""
        rows = np.flatnonzero(self.of_N == row)
        return int(rows[self.scores_NS[rows, column].argmax()])


def read_visits(
    gallery: Gallery,
    after: int,
    until: int,
    score: Score,
    means: RunningMeans | None = None,
    compared: tuple[list[str], NDArray[np.float32]] | None = None,
) -> tuple[list[int], list[Item], Visits]:
    """Read the pictures after an id up to another one; return their ids, items and visits.

    ``means`` of the pictures before them go on with these. Pictures with the keys of ``compared``
    have its scores (N, S).
    """
    found = gallery.get(range(after + 1, until + 1)) if after < until else {}
    items = [item for item, _ in found.values()]
    if not items:
        return [], [], Visits.of([], np.empty((0, 1), np.float32))
    images_ND = np.stack([vector for _, vector in found.values()])
    averaged = (means or RunningMeans()).of(items, images_ND, keep=True)
    if compared is not None and compared[0] == [item.key for item in items]:
        scores_NS = compared[1]
    else:
        scores_NS = score(images_ND, *averaged)
    return [*found], items, Visits.of(items, scores_NS)


class Tails:
    """The highest scores of visits, for each of S alerts."""

    def __init__(self, alerts: int, most: int = _TAIL) -> None:
        self._scores_SK = np.full((alerts, most), -np.inf, np.float32)
        self._visits_SK = np.zeros((alerts, most), np.uint64)
        self._dropped = [dict[int, np.float32]() for _ in range(alerts)]

    def floors(self) -> NDArray[np.float32]:
        """Return (S,) scores up to which not all are kept."""
        floors_S: NDArray[np.float32] = self._scores_SK.min(axis=1)
        return floors_S

    def add(self, visits: Sequence[int], scores_VS: NDArray[np.float32]) -> None:
        """Count visits in, each once; of one that is there the higher score stays."""
        new_SV = np.array(scores_VS.T, order="C")
        for column in np.flatnonzero((new_SV > self.floors()[:, None]).any(axis=0)).tolist():
            there_SK = self._visits_SK == np.uint64(visits[column])
            if there_SK.any():
                rows_S, places = np.nonzero(there_SK)
                raised = np.maximum(self._scores_SK[rows_S, places], new_SV[rows_S, column])
                self._scores_SK[rows_S, places] = raised
                new_SV[rows_S, column] = -np.inf
        columns = np.flatnonzero((new_SV > self.floors()[:, None]).any(axis=0))
        if len(columns) <= _FEW:
            for column in columns.tolist():
                self._replace(visits[column], new_SV[:, column])
            return
        for first in range(0, len(columns), self._scores_SK.shape[1]):
            self._merge(visits, new_SV, columns[first : first + self._scores_SK.shape[1]])

    def _replace(self, visit: int, new_S: NDArray[np.float32]) -> None:
        lowest_S = self._scores_SK.argmin(axis=1)
        rows = np.flatnonzero(new_S > self._scores_SK[np.arange(len(new_S)), lowest_S])
        self._scores_SK[rows, lowest_S[rows]] = new_S[rows]
        self._visits_SK[rows, lowest_S[rows]] = visit

    def _merge(
        self, visits: Sequence[int], new_SV: NDArray[np.float32], columns: NDArray[np.intp]
    ) -> None:
        scores = np.concatenate([self._scores_SK, new_SV[:, columns]], axis=1)
        ids = np.array([visits[column] for column in columns], np.uint64)
        all_ids = np.concatenate(
            [self._visits_SK, np.broadcast_to(ids, (len(scores), len(ids)))], axis=1
        )
        keep = np.argpartition(scores, len(columns), axis=1)[:, len(columns) :]
        self._scores_SK = np.take_along_axis(scores, keep, axis=1)
        self._visits_SK = np.take_along_axis(all_ids, keep, axis=1)

    def drop(self, alert: int, visits: Iterable[int]) -> None:
        """Leave visits out of the tail of one alert."""
        gone_K = np.isin(self._visits_SK[alert], np.array([*visits], np.uint64))
        gone_K &= self._scores_SK[alert] > -np.inf
        own = zip(
            self._visits_SK[alert, gone_K].tolist(), self._scores_SK[alert, gone_K], strict=True
        )
        self._dropped[alert] |= dict(own)
        self._scores_SK[alert, gone_K] = -np.inf

    def restore(self, alert: int, visits: Iterable[int]) -> None:
        """Take back visits that were left out. Of those that never were in it nothing is known."""
        for visit in visits:
            score = self._dropped[alert].pop(visit, None)
            if score is not None:
                new_S = np.full(len(self._scores_SK), -np.inf, np.float32)
                new_S[alert] = score
                self._replace(visit, new_S)

    def own(self, visit: int) -> NDArray[np.float32]:
        """Return the (S,) scores of a visit; -inf where it is not kept."""
        own_SK = np.where(self._visits_SK == np.uint64(visit), self._scores_SK, -np.inf)
        found_S: NDArray[np.float32] = own_SK.max(axis=1).astype(np.float32)
        return found_S

    def at_least(self, scores_S: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return how many visits score as high; exact for scores above the floors."""
        return np.asarray((self._scores_SK >= scores_S[:, None]).sum(axis=1), np.int64)


@dataclass
class Counts:
    """How many visits there are of some cameras, and in which hours."""

    visits: int = 0
    untimed: int = 0
    hours: dict[int, int] = field(default_factory=dict)
    """Visits by hour since 1970."""

    def add(self, time: float | None) -> None:
        """Count a visit."""
        self.visits += 1
        if time is None:
            self.untimed += 1
            return
        hour = int(time // 3600)
        self.hours[hour] = self.hours.get(hour, 0) + 1
        if len(self.hours) > _MOST_HOURS:
            del self.hours[next(iter(self.hours))]

    @property
    def per_day(self) -> float | None:
        """Visits of a typical day, see `visits_per_day`."""
        return visits_per_day(self.hours, self.untimed)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where an alert stands: how many visits its promise needs, and how many there are."""

    visits: int
    per_day: float | None
    """Visits a day; None where no picture has a time."""
    allowed_p: float | None
    required: int | None

    @property
    def is_ready(self) -> bool:
        """Whether the promise can be kept."""
        return self.required is not None and self.visits >= self.required

    @classmethod
    def of(cls, visits: int, per_day: float | None, rate: float) -> "Standing":
        """Return the standing of an alert with a rate a day."""
        p = None if per_day is None else allowed_p(rate, per_day)
        required = None if p is None else required_visits(p)
        return cls(visits=max(0, visits), per_day=per_day, allowed_p=p, required=required)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What the background needs to know of an alert."""

    rate: float
    cameras: Cameras
    confirmed: frozenset[int] = frozenset()
    """Visits that an operator confirmed: they are no background."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Visits compared with the background."""

    visits: Visits
    scores_VS: NDArray[np.float32]
    """The best so far of each visit; -inf where an alert does not look at it."""
    above_VS: NDArray[np.int64]
    """How many others score as high."""
    p_VS: NDArray[np.float64]
    """1 where the score is too low to be compared."""


@dataclass
class _High:
    """Visits of one alert that score high, with how many were compared before them."""

    allowed: dict[int, int] = field(default_factory=dict)
    """As high as is raised."""
    wider: dict[int, int] = field(default_factory=dict)


class Surplus:
    """Whether visits score high more often than chance lets alerts allow: their pictures changed.

    Counted are the latest visits, as many as a typical day has, and a week: what differs by the
    hour is no change. It is over when both have at most twice as many as on average, after a day.
    """

    def __init__(self, alerts: int) -> None:
        self.is_over_S = np.zeros(alerts, np.bool_)
        self._visits_S = np.zeros(alerts, np.int64)
        self._since_S = np.zeros(alerts, np.int64)
        self._high = [_High() for _ in range(alerts)]

    def count(
        self, compared: "Comparison", is_new_V: NDArray[np.bool_], standings: Sequence[Standing]
    ) -> None:
        """Count visits that were compared; those that are not new may score higher by now."""
        looked_VS = np.isfinite(compared.scores_VS)
        self._visits_S += (looked_VS & is_new_V[:, None]).sum(axis=0)
        levels_LS = np.array([_levels(one) for one in standings]).T
        is_high_S = (compared.p_VS <= levels_LS.max(axis=0)).any(axis=0)
        for column in np.flatnonzero(is_high_S | self.is_over_S).tolist():
            standing = standings[column]
            if not standing.is_ready or standing.per_day is None:
                continue
            high, now = self._high[column], int(self._visits_S[column])
            day = max(1, round(standing.per_day))
            is_over, is_usual = False, now - self._since_S[column] >= day
            allowed, wider = levels_LS[:, column].tolist()
            for own, level, length in (
                (high.allowed, allowed, day),
                (high.allowed, allowed, _WEEK * day),
                (high.wider, wider, day),
            ):
                for row in np.flatnonzero(compared.p_VS[:, column] <= level).tolist():
                    own.setdefault(compared.visits.ids[row], now)
                for visit in [visit for visit, at in own.items() if at <= now - _WEEK * day]:
                    del own[visit]
                count = sum(at > now - length for at in own.values())
                is_over |= count > most_by_chance(level * length)
                is_usual &= count <= _USUAL_TIMES * level * length
            if is_over and not self.is_over_S[column]:
                self.begin(column)
            elif is_usual and not is_over:
                self.is_over_S[column] = False

    def begin(self, alert: int) -> None:
        """Take an alert's pictures for changed, for a day at least."""
        self.is_over_S[alert], self._since_S[alert] = True, self._visits_S[alert]

    def forget(self, alert: int) -> None:
        """Take an alert's pictures for unchanged, and count anew."""
        self.is_over_S[alert], self._high[alert] = False, _High()

    def drop(self, alert: int, visits: Iterable[int]) -> None:
        """Leave visits out of those of one alert."""
        for visit in visits:
            self._high[alert].allowed.pop(visit, None)
            self._high[alert].wider.pop(visit, None)


def _levels(standing: Standing) -> tuple[float, float]:
    """Return the p-values at which visits are counted; 0 where nothing can be said yet."""
    if not standing.is_ready or standing.allowed_p is None:
        return 0.0, 0.0
    # Of many visits only p-values below the tail's share are known.
    wider = min(_WIDER * standing.allowed_p, _NOTABLE_P, _TAIL / (standing.visits + 1))
    return standing.allowed_p, max(wider, standing.allowed_p)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is done with visits that were compared."""

    raised_VS: NDArray[np.bool_]
    best_VS: NDArray[np.bool_]
    """Kept for review, as an alert collects."""
    uncalibrated_S: NDArray[np.bool_]
    """Alerts whose visits changed: what they raise is kept for review."""


class Background:
    """The background of alerts that were added together."""

    def __init__(self, alerts: Mapping[str, Watched], score: Score, last_id: int) -> None:
        """Begin without visits; `step` reads those up to ``last_id``."""
        self.alerts = dict(alerts)
        """By id; the columns of scores are in this order."""
        self._columns = {id_: column for column, id_ in enumerate(self.alerts)}
        self.last_id = last_id
        """Pictures up to this one were counted, or are by `step`."""
        self._tails = Tails(len(self.alerts))
        self._score = score
        self._next_id = last_id
        self._first_id = max(0, last_id - WINDOW_ROWS)
        self._means = RunningMeans()
        self._compared: tuple[list[str], NDArray[np.float32]] | None = None
        self._surplus = Surplus(len(self.alerts))
        self._counts: dict[Cameras, Counts] = {one.cameras: Counts() for one in alerts.values()}
        self._seen: dict[int, None] = {}

    def counted(self) -> dict[str, tuple[int, float | None]]:
        """Return the number of visits and those of a day, by `scope_of` their cameras."""
        counts = self._counts.items()
        return {scope_of(cameras): (one.visits, one.per_day) for cameras, one in counts}

    def standings(self) -> dict[str, Standing]:
        """Return the standing of each alert."""
        per_day = {cameras: counts.per_day for cameras, counts in self._counts.items()}
        return {
            id_: Standing.of(
                self._counts[one.cameras].visits - len(one.confirmed),
                per_day[one.cameras],
                one.rate,
            )
            for id_, one in self.alerts.items()
        }

    def confirm(self, alert: str, visits: frozenset[int]) -> None:
        """Leave these visits out of the background of an alert."""
        one = self.alerts[alert]
        if visits != one.confirmed:
            self.alerts[alert] = Watched(rate=one.rate, cameras=one.cameras, confirmed=visits)
            self._tails.restore(self._columns[alert], one.confirmed - visits)
            self._tails.drop(self._columns[alert], visits)
            self._surplus.drop(self._columns[alert], visits)

    def set_uncalibrated(self, alert: str, is_so: bool) -> None:
        """Follow what was noted or resumed elsewhere."""
        column = self._columns[alert]
        if is_so and not self._surplus.is_over_S[column]:
            self._surplus.begin(column)
        elif not is_so and self._surplus.is_over_S[column]:
            self._surplus.forget(column)

    def compare(self, items: Sequence[Item], images_ND: NDArray[np.float32]) -> Comparison:
        """Compare pictures with the background, without counting them in."""
        means = self._means.of(items, images_ND, keep=False)
        visits = Visits.of(items, self._score(images_ND, *means))
        self._compared = [item.key for item in items], visits.scores_NS
        scores_VS = self._looked_at(items, visits)
        above_VS = np.zeros(scores_VS.shape, np.int64)
        p_VS = np.ones(scores_VS.shape)
        counts_S = np.array(
            [self._counts[one.cameras].visits - len(one.confirmed) for one in self.alerts.values()]
        )
        floors_S = self._tails.floors()
        for row, visit in enumerate(visits.ids):
            if not (scores_VS[row] > floors_S).any():
                continue
            own_S = self._tails.own(visit)
            is_seen = visit in self._seen
            looked_S = np.isfinite(scores_VS[row])
            best_S = np.where(looked_S, np.maximum(scores_VS[row], own_S), -np.inf)
            scores_VS[row] = best_S
            above_VS[row] = self._tails.at_least(scores_VS[row]) - (own_S >= scores_VS[row])
            p_S = (1 + above_VS[row]) / (np.maximum(0, counts_S - is_seen) + 1)
            p_VS[row] = np.where(scores_VS[row] > floors_S, p_S, 1.0)
        return Comparison(visits=visits, scores_VS=scores_VS, above_VS=above_VS, p_VS=p_VS)

    def decide(self, compared: Comparison) -> Decision:
        """Decide about visits that were compared, once."""
        standings = [*self.standings().values()]
        is_new_V = np.array([visit not in self._seen for visit in compared.visits.ids], np.bool_)
        self._surplus.count(compared, is_new_V, standings)
        allowed_S = np.array([one.allowed_p if one.is_ready else 0.0 for one in standings])
        collecting_S = np.array([not one.is_ready for one in standings])
        return Decision(
            raised_VS=compared.p_VS <= allowed_S,
            best_VS=collecting_S & (compared.above_VS == 0) & (compared.p_VS <= _NOTABLE_P),
            uncalibrated_S=self._surplus.is_over_S.copy(),
        )

    def new_of(self, items: Sequence[Item]) -> list[str | None]:
        """Return the camera of each visit among pictures that were not counted yet."""
        cameras = {visit_id(item): item.camera for item in items}
        return [camera for visit, camera in cameras.items() if visit not in self._seen]

    def step(self, gallery: Gallery) -> bool:
        """Read some of the pictures that were there before; return whether there are more."""
        first = max(self._first_id, self._next_id - STEP_ROWS)
        self._read(gallery, first, self._next_id)
        self._next_id = first
        return first > self._first_id

    def follow(self, gallery: Gallery, last_id: int) -> None:
        """Read some of the pictures that were added since."""
        until = min(last_id, self.last_id + STEP_ROWS)
        self._read(gallery, self.last_id, until)
        self.last_id = max(self.last_id, until)

    def _read(self, gallery: Gallery, after: int, until: int) -> None:
        # Of older pictures, which are read last, no more will come.
        means = self._means if until >= self.last_id else None
        _, items, visits = read_visits(gallery, after, until, self._score, means, self._compared)
        if not items:
            return
        for visit, first in zip(visits.ids, visits.firsts, strict=True):
            if visit not in self._seen:
                self._seen[visit] = None
                for cameras, counts in self._counts.items():
                    if cameras is None or items[first].camera in cameras:
                        counts.add(items[first].time)
        while len(self._seen) > _MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        self._tails.add(visits.ids, self._of_cameras(items, visits))
        for column, one in enumerate(self.alerts.values()):
            if confirmed := one.confirmed.intersection(visits.ids):
                self._tails.drop(column, confirmed)

    def _looked_at(self, items: Sequence[Item], visits: Visits) -> NDArray[np.float32]:
        """Return (V, S) scores, -inf for other cameras and for confirmed visits."""
        scores_VS = self._of_cameras(items, visits)
        for column, one in enumerate(self.alerts.values()):
            if one.confirmed:
                scores_VS[[visit in one.confirmed for visit in visits.ids], column] = -np.inf
        return scores_VS

    def _of_cameras(self, items: Sequence[Item], visits: Visits) -> NDArray[np.float32]:
        """Return (V, S) scores, -inf for other cameras."""
        scores_VS = visits.scores_VS.copy()
        cameras = [items[first].camera for first in visits.firsts]
        for column, one in enumerate(self.alerts.values()):
            if one.cameras is not None:
                scores_VS[[camera not in one.cameras for camera in cameras], column] = -np.inf
        return scores_VS
