"""Times of pictures: which can be used, and a clock that only goes forward."""

import time

from upperson_rt.errors import InputError

__all__ = ["SteadyClock", "check_unix_time"]

_LATEST_S = 1e11
"""The year 5138; unix times in milliseconds are beyond."""


def check_unix_time(given: float | None) -> None:
    """Check the time of a picture; None is no time.

    Raises:
        InputError: It is no time in unix seconds.
    """
    if given is not None and not 0 <= given < _LATEST_S:
        raise InputError(
            f"a time must be finite and in unix seconds, not milliseconds, such as "
            f"{time.time():.0f}; found {given}"
        )


class SteadyClock:
    """Seconds since the first frame of a camera; never decrease.

    Wall clocks are set back by time servers, and files can have broken time stamps. Where the given
    time does not go forward, the time that really passed is taken instead.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._given: float | None = None
        self._arrived = 0.0

    def advance(self, given: float, arrived: float | None = None) -> float:
        """Return the steady time of a frame.

        Args:
            given: Its time on whatever clock, in seconds.
            arrived: When it came, on `time.monotonic`; now, if left out.
        """
        arrived = time.monotonic() if arrived is None else arrived
        if self._given is not None:
            step = given - self._given
            self._seconds += step if step > 0 else max(0.0, arrived - self._arrived)
        self._given, self._arrived = given, arrived
        return self._seconds
