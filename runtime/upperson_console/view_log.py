"""What each account was shown in the last hour: which views the query log covers, and a quota."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

from upperson_console.problems import ProblemError

PERIOD_S = 3600.0
"""A line of the log covers further views of what it names for so long; the quota counts as long."""
USUAL_QUOTA = 5000
MOST_QUOTA = 100_000
_MOST_KEPT = 2 * MOST_QUOTA
"""Views kept of one account and part. The next view of a forgotten one is logged again."""

Part: TypeAlias = Literal["picture", "frame", "clip", "thumbnail", "snapshot"]
"""What is shown. ``picture`` includes an item's fields. A ``thumbnail`` is a small picture that the
server chose for the live page, and a ``snapshot`` the newest frame of a camera: the quota counts
neither."""
_COUNTED = frozenset({"picture", "frame", "clip"})


class QuotaExceededError(ProblemError):
    """An account would see more items than its quota."""

    def __init__(self, user: str, quota: int, retry_after_s: float, is_first: bool) -> None:
        wait_s = max(1, round(retry_after_s))
        super().__init__(
            429,
            f"{user} may see {quota:,} different pictures an hour: try again in {wait_s} s, or ask "
            "an administrator for a larger  --view-quota",
            {"Retry-After": str(wait_s)},
            code="view_quota_exceeded",
        )
        self.is_first = is_first
        """Whether it is the first refusal of the account within an hour."""


class _Views:
    """The views of one account."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shown: dict[Part, dict[object, float]] = {part: {} for part in get_args(Part)}
        """When each was last logged, the oldest first."""
        self.refusals = 0
        self.refused: tuple[float, float] | None = None
        """When the quota was last exceeded: by the clock, and in unix seconds."""

    def forget(self, until: float) -> None:
        for views in self.shown.values():
            while views:
                oldest = next(iter(views))
                if views[oldest] > until and len(views) <= _MOST_KEPT:
                    break
                del views[oldest]

    def add(self, part: Part, things: Iterable[object], now: float) -> None:
        for name in {part, "picture"} if part in _COUNTED else {part}:
            for thing in things:
                self.shown[name].pop(thing, None)
                self.shown[name][thing] = now


class ViewLog:
    """Knows which views the query log covers. Safe for several threads."""

    def __init__(self, quota: int = USUAL_QUOTA) -> None:
        """Allow each account ``quota`` different items an hour; any number for 0."""
        self.quota = quota
        self.clock: Callable[[], float] = time.monotonic
        self._accounts: dict[str, _Views] = {}

    @property
    def refusals(self) -> int:
        """Number of requests that the quota refused."""
        return sum(views.refusals for views in [*self._accounts.values()])

    @property
    def exceeded(self) -> dict[str, float]:
        """When each account last exceeded its quota, in unix seconds, by name."""
        refused = {user: views.refused for user, views in [*self._accounts.items()]}
        return {user: times[1] for user, times in refused.items() if times is not None}

    def uncovered(self, user: str, part: Part, things: Iterable[object]) -> list[object]:
        """Return those that no line of the last hour names for an account."""
        views = self._of(user)
        with views.lock:
            views.forget(self.clock() - PERIOD_S)
            known = [views.shown[part], views.shown["picture" if part == "thumbnail" else part]]
            return [thing for thing in things if not any(thing in one for one in known)]

    @contextmanager
    def logging(self, user: str, part: Part, things: Iterable[object]) -> Iterator[None]:
        """Check the quota of an account, let the caller write a line that names things, note them.

        Raises:
            QuotaExceededError: It would see too many.
        """
        views, named = self._of(user), {*things}
        with views.lock:  # Until the line is on disk: no other request relies on it before.
            now = self.clock()
            views.forget(now - PERIOD_S)
            if self.quota and part in _COUNTED:
                self._check(user, views, len(named - views.shown["picture"].keys()), now)
            yield
            views.add(part, named, now)

    def _check(self, user: str, views: _Views, new: int, now: float) -> None:
        shown = views.shown["picture"]
        excess = len(shown) + new - self.quota
        if not new or excess <= 0:
            return
        is_first = views.refused is None or now - views.refused[0] > PERIOD_S
        views.refusals += 1
        views.refused = now, time.time()
        times = [*shown.values()]
        free_at = times[min(excess, len(times)) - 1] + PERIOD_S if times else now + PERIOD_S
        raise QuotaExceededError(user, self.quota, free_at - now, is_first)

    def _of(self, user: str) -> _Views:
        return self._accounts.setdefault(user, _Views())
