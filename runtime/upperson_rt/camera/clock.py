"""Time that only goes forward, made from times that may jump."""

import time

__all__ = ["SteadyClock"]


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
            self._seconds += step if step >= 0 else max(0.0, arrived - self._arrived)
        self._given, self._arrived = given, arrived
        return self._seconds
