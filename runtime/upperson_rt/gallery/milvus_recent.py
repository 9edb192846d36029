"""What has been written a moment ago."""

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Known", "RecentWrites"]


@dataclass(frozen=True)
class Known:
    """What an item that is replaced passes on."""

    key: str
    camera: str
    added: int


class RecentWrites:
    """Rows written or deleted by this process in the last seconds.

    Before it replaces an item, a gallery has to read it. A read that sees all writes waits for the
    server's next clock tick, 0.2 s or more; one that may miss the last 5 s does not wait. This is
    what it may miss.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        self._seconds = seconds
        self._writes: OrderedDict[int, tuple[float, Known | None]] = OrderedDict()

    def record(self, rows: Mapping[int, Known | None]) -> None:
        """Remember rows; None for a row that was deleted."""
        now = time.monotonic()
        for id_, known in rows.items():
            self._writes[id_] = now, known
            self._writes.move_to_end(id_)
        while self._writes and next(iter(self._writes.values()))[0] < now - self._seconds:
            self._writes.popitem(last=False)

    def update(self, read: dict[int, Known], ids: Iterable[int]) -> None:
        """Correct what was read of these rows."""
        for id_ in ids:
            if id_ in self._writes:
                known = self._writes[id_][1]
                if known is None:
                    read.pop(id_, None)
                else:
                    read[id_] = known
