"""A log of queries and their users: one line of JSON a query, written before its results are shown.

Lines are chained by checksums, see `chain`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from upperson_log.writer import ChainedLog, begin_entry
from upperson_rt.arguments import check_text
from upperson_rt.errors import InputError
from upperson_rt.gallery.protocol import check_filter
from upperson_rt.gallery.records import check_hits
from upperson_rt.printable import safe_repr

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter, Hit


class QueryLog(ChainedLog):
    """The log of queries; every line is flushed to disk before the query returns."""

    what = "query log"
    refuses = "no query is answered without it"
    most_bytes = 64 << 20

    def write(
        self,
        query: str | Mapping[str, str],
        hits: "Sequence[Hit]",
        *,
        k: int,
        where: "Filter | None" = None,
        by_track: bool = False,
        gallery: str = "",
        action: str = "query",
        user: str | None = None,
        details: Mapping[str, Any] | None = None,
        context: Mapping[str, str] | None = None,
    ) -> None:
        """Append a line and flush it to disk.

        Args:
            query: The sentence, or `describe_picture`.
            hits: What is about to be shown; their ids and keys are logged.
            k: Number of hits.
            where: Conditions of the query; those that are None are left out.
            by_track: Whether a track counted as one hit.
            gallery: Where the pictures are.
            action: ``query``, or what else was done with the hits, such as ``delete``.
            user: Who asks, where one log serves several people; by default the log's.
            details: What else belongs to it, such as a reason, as JSON.
            context: Further members of the line, such as the client's address or a purpose.

        Raises:
            InputError: The line cannot be written, or made of these values.
            UsageError: ``where`` is no filter.
        """
        if not isinstance(query, str | Mapping):
            raise InputError(f"expected a sentence or describe_picture(), found {safe_repr(query)}")
        asking = self.user if user is None else check_text(user, "the user of a query log")
        entry: dict[str, Any] = {
            **(context or {}),
            **begin_entry(asking, action),
            **({"sentence": query} if isinstance(query, str) else {"picture": dict(query)}),
            "filter": check_filter(where).conditions,
            "k": k,
            "by_track": by_track,
            "gallery": gallery,
            "ids": [hit.id for hit in check_hits(hits)],
            "keys": [hit.item.key for hit in hits],
            **({} if details is None else {"details": dict(details)}),
        }
        with self._current():
            self._append({**entry, **self._open_break()})
