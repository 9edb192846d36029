"""Outbox: messages and JSON documents that are committed with the rows of a gallery, or not at all.

A message has a unique key, so a commit that is repeated cannot write it twice. Each destination
gets the messages in the order in which they were written, and keeps its own account of which it has
accepted.

Of a message whose picture is deleted permanently its visit and its label stay, which rates of false
alarms are counted from. It is neither listed nor delivered any more.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from upperson_rt.gallery import Gallery
from upperson_rt.gallery.sqlite.documents import (
    make_documents,
    parse_document,
    read_document,
    read_documents,
    write_document,
)
from upperson_rt.printable import count_of, get_logger

_LOG = get_logger(__name__)

State: TypeAlias = Literal["ready", "review"]
"""Whether a message is delivered, or only kept."""

_TABLES = (
    """
    CREATE TABLE IF NOT EXISTS outbox (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, topic TEXT NOT NULL,
        time REAL NOT NULL, state TEXT NOT NULL, label TEXT NOT NULL, body TEXT NOT NULL
    )
    """,
    "CREATE INDEX IF NOT EXISTS outbox_by_topic ON outbox (topic, time)",
    # Destinations ask several times a second, and most messages may be kept for review.
    "CREATE INDEX IF NOT EXISTS outbox_ready ON outbox (seq) WHERE state = 'ready'",
    # Only of messages that are not accepted, of those up to `done`.
    """
    CREATE TABLE IF NOT EXISTS outbox_deliveries (
        destination TEXT NOT NULL, seq INTEGER NOT NULL, state TEXT NOT NULL,
        attempts INTEGER NOT NULL, due REAL NOT NULL, error TEXT NOT NULL,
        PRIMARY KEY (destination, seq)
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS outbox_destinations (name TEXT PRIMARY KEY, done INTEGER NOT NULL)
    """,
    "CREATE INDEX IF NOT EXISTS outbox_failed ON outbox_deliveries (destination, due) "
    "WHERE state = 'failed'",
)
_FORGOTTEN = "/forgotten"
"""Ends the state of a message whose picture is deleted."""
_PICTURE = "CASE WHEN json_valid(body) THEN json_extract(body, '$.data.picture') END"
_MESSAGE = "o.seq, o.key, o.topic, o.time, o.state, o.label, o.body"


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message of the outbox."""

    key: str
    """Unique, for ever."""
    topic: str
    time: float
    """When it was written, in unix seconds of this machine."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """JSON."""
    state: State = "ready"
    label: str = ""
    """A mark of its owner."""
    seq: int = 0
    """Number in the order of writing, from 1; 0 before it is written."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A delivery that failed."""

    attempts: int
    """So far."""
    due: float
    """When it is tried again, in unix seconds."""
    error: str
    is_dead: bool = False
    """Whether it is not tried again, unless it is replayed."""


class Outbox:
    """The outbox in a transaction of its gallery; see `outbox_of`."""

    def __init__(self, connection: sqlite3.Connection, write: bool) -> None:
        self._connection = connection
        if write:
            make_documents(connection)
            for statement in _TABLES:
                connection.execute(statement)
        sql = "SELECT count(*) FROM sqlite_master WHERE name = 'outbox'"
        self._is_there = write or bool(connection.execute(sql).fetchone()[0])

    @property
    def last_id(self) -> int:
        """Highest `Hit.id` in the gallery; 0 if it is empty."""
        (found,) = self._connection.execute("SELECT ifnull(max(id), 0) FROM items").fetchone()
        return int(found)

    @property
    def last_seq(self) -> int:
        """The `Message.seq` of the newest message; 0 if there is none."""
        found = self._rows("SELECT ifnull(max(seq), 0) FROM outbox")
        return int(found[0][0]) if found else 0

    def put(self, message: Message) -> bool:
        """Write a message, unless there is one of its key; return whether it is new."""
        row = (message.key, message.topic, message.time, message.state, message.label)
        sql = (
            "INSERT OR IGNORE INTO outbox (key, topic, time, state, label, body) "
            "VALUES (?, ?, ?, ?, ?, ?)"
        )
        return self._changed(sql, *row, json.dumps(message.body)) > 0

    def messages(self, most: int | None = None, **where: object) -> list[Message]:
        """Return messages, newest first.

        Args:
            most: At most so many.
            where: ``key``, ``topic``, ``state`` and ``label`` that they have; ``since`` and
                ``until``, unix seconds.
        """
        condition, values = _condition(where)
        condition += f" AND o.state NOT GLOB '*{_FORGOTTEN}'"
        sql = f"SELECT {_MESSAGE} FROM outbox o WHERE {condition} ORDER BY o.seq DESC LIMIT ?"
        return [_message(row) for row in self._rows(sql, *values, -1 if most is None else most)]

    def count(self, **where: object) -> int:
        """Return how many messages there are, see `messages`, with those of deleted pictures.

        ``after`` is the `Message.seq` that theirs are above.
        """
        condition, values = _condition(where)
        rows = self._rows(f"SELECT count(*) FROM outbox o WHERE {condition}", *values)
        return int(rows[0][0]) if rows else 0

    def visits(self, **where: object) -> list[tuple[str, str]]:
        """Return the topic and the visit of each message of one, see `count`, in their order."""
        condition, values = _condition(where)
        sql = f"SELECT {_MESSAGE} FROM outbox o WHERE {condition} ORDER BY o.seq"
        found = [
            (row[2], _message(row).body["data"].get("visit")) for row in self._rows(sql, *values)
        ]
        return [(topic, visit) for topic, visit in found if visit is not None]

    def label(self, key: str, label: str) -> bool:
        """Set the label of a message; return whether it is there."""
        return self._changed("UPDATE outbox SET label = ? WHERE key = ?", label, key) > 0

    def remove(self, **where: object) -> int:
        """Remove messages, see `messages`; return how many."""
        condition, values = _condition(where)
        count = self._changed(f"DELETE FROM outbox AS o WHERE {condition}", *values)
        self._changed("DELETE FROM outbox_deliveries WHERE seq NOT IN (SELECT seq FROM outbox)")
        return count

    def by_picture(self) -> dict[int, list[int]]:
        """Return `Message.seq` of those that name a picture, by its `Hit.id`."""
        found: dict[int, list[int]] = {}
        sql = f"SELECT {_PICTURE}, seq FROM outbox WHERE {_PICTURE} IS NOT NULL"
        for picture, seq in self._rows(sql):
            found.setdefault(picture, []).append(seq)
        return found

    def of_deleted(self) -> list[int]:
        """Return `Message.seq` of those whose picture is neither in the gallery nor in its bin."""
        sql = "SELECT name FROM sqlite_master WHERE name IN ('items', 'bin')"
        absent = "".join(
            f" AND NOT EXISTS (SELECT 1 FROM {table} t WHERE t.id = {_PICTURE})"
            for (table,) in self._connection.execute(sql).fetchall()
        )
        sql = f"SELECT seq FROM outbox WHERE {_PICTURE} IS NOT NULL{absent}"
        return [seq for (seq,) in self._rows(sql)]

    def forget(self, seqs: Sequence[int]) -> None:
        """Keep of messages only what rates of false alarms are counted from."""
        which = "seq IN (SELECT value FROM json_each(?))"
        (waiting,) = self._rows(
            f"SELECT count(*) FROM outbox o WHERE o.{which} AND o.state = 'ready' AND (EXISTS "
            "(SELECT 1 FROM outbox_destinations d WHERE o.seq > d.done) OR EXISTS (SELECT 1 FROM "
            "outbox_deliveries l WHERE l.seq = o.seq))",
            json.dumps([*seqs]),
        )[0]
        if waiting:
            messages = count_of(waiting, "message")
            _LOG.warning("%s of alerts not delivered: their pictures are deleted", messages)
        self._changed(
            f"UPDATE outbox SET state = state || '{_FORGOTTEN}', body = json_object('type', "
            "json_extract(body, '$.type'), 'data', json_object('visit', json_extract(body, "
            f"'$.data.visit'))) WHERE {which}",
            json.dumps([*seqs]),
        )
        self._changed(f"DELETE FROM outbox_deliveries WHERE {which}", json.dumps([*seqs]))

    # --- Destinations

    def begin(self, destination: str) -> None:
        """Register a destination. The first one gets all messages, a later one those after now."""
        sql = (
            "INSERT OR IGNORE INTO outbox_destinations SELECT ?, CASE WHEN EXISTS (SELECT 1 FROM "
            "outbox_destinations) THEN ifnull((SELECT max(seq) FROM outbox), 0) ELSE 0 END"
        )
        self._changed(sql, destination)

    def end(self, destination: str) -> None:
        """Forget a destination, and what it has not accepted."""
        for table, column in (
            ("outbox_destinations", "name"),
            ("outbox_deliveries", "destination"),
        ):
            self._changed(f"DELETE FROM {table} WHERE {column} = ?", destination)

    def due(
        self, destination: str, now: float, longest_s: float, most: int
    ) -> list[tuple[Message, int]]:
        """Return messages to deliver now, in order, each with its attempts so far.

        One that is due later than ``longest_s`` from now waits for a clock that has jumped: it is
        returned.
        """
        fresh = f"""
            SELECT {_MESSAGE}, 0 FROM outbox o WHERE o.state = 'ready'
            AND o.seq > (SELECT done FROM outbox_destinations WHERE name = ?)
            ORDER BY o.seq LIMIT ?
        """
        # Two searches of an index, as most of those that failed may be due later.
        which = "SELECT seq, attempts FROM outbox_deliveries WHERE destination = ? AND state = "
        again = f"""
            SELECT {_MESSAGE}, d.attempts FROM ({which} 'failed' AND due <= ? UNION ALL
            {which} 'failed' AND due > ?) d
            JOIN outbox o USING (seq) WHERE o.state = 'ready' ORDER BY o.seq LIMIT ?
        """
        rows = self._rows(again, destination, now, destination, now + longest_s, most)
        rows += self._rows(fresh, destination, most)
        return [(_message(row), row[-1]) for row in rows[:most]]

    def settle(self, destination: str, outcomes: Mapping[int, Failure | None]) -> None:
        """Note by `Message.seq` what came of deliveries: None for those that were accepted.

        Those before the last of them that are not named are due again.
        """
        last = max(outcomes)
        self._changed(
            "INSERT OR IGNORE INTO outbox_deliveries SELECT name, seq, 'failed', 0, 0, '' FROM "
            "outbox, outbox_destinations WHERE name = ? AND outbox.state = 'ready' AND seq > done "
            "AND seq <= ?",
            destination,
            last,
        )
        for seq, failure in outcomes.items():
            if failure is None:
                sql = "DELETE FROM outbox_deliveries WHERE destination = ? AND seq = ?"
                self._changed(sql, destination, seq)
            else:
                state = "dead" if failure.is_dead else "failed"
                # Its picture may have been deleted meanwhile.
                sql = (
                    "INSERT OR REPLACE INTO outbox_deliveries SELECT ?, seq, ?, ?, ?, ? FROM "
                    "outbox WHERE seq = ? AND state = 'ready'"
                )
                row = (state, failure.attempts, failure.due, failure.error)
                self._changed(sql, destination, *row, seq)
        sql = "UPDATE outbox_destinations SET done = max(done, ?) WHERE name = ?"
        self._changed(sql, last, destination)

    def dead(self) -> list[tuple[str, Message, Failure]]:
        """Return what is not tried again, with its destination, oldest first."""
        sql = f"""
            SELECT {_MESSAGE}, d.destination, d.attempts, d.due, d.error FROM outbox_deliveries d
            JOIN outbox o USING (seq) WHERE d.state = 'dead' ORDER BY o.seq
        """
        return [
            (
                row[7],
                _message(row),
                Failure(attempts=row[8], due=row[9], error=row[10], is_dead=True),
            )
            for row in self._rows(sql)
        ]

    def replay(self, key: str | None = None) -> int:
        """Try what is dead again, or the message of that key alone; return how many."""
        sql = (
            "UPDATE outbox_deliveries SET state = 'failed', attempts = 0, due = 0 WHERE state = "
            "'dead' AND (? IS NULL OR seq = (SELECT seq FROM outbox WHERE key = ?))"
        )
        return self._changed(sql, key, key)

    def waiting(self) -> dict[str, int]:
        """Return how many messages each destination has neither accepted nor given up."""
        sql = """
            SELECT name, (SELECT count(*) FROM outbox WHERE state = 'ready' AND seq > done)
            + (SELECT count(*) FROM outbox_deliveries WHERE destination = name AND state = 'failed')
            FROM outbox_destinations
        """
        return dict(self._rows(sql))

    # --- Documents

    def documents(self, prefix: str) -> dict[str, Any]:
        """Return the JSON documents whose name begins so, by the rest of their names."""
        return read_documents(self._connection, prefix)

    def document(self, name: str) -> Any:
        """Return the JSON document of a name, or None."""
        return read_document(self._connection, name)

    def write(self, name: str, value: Any) -> None:
        """Write a JSON document; None removes it."""
        write_document(self._connection, name, value)

    def _rows(self, sql: str, *values: object) -> list[Any]:
        return self._connection.execute(sql, values).fetchall() if self._is_there else []

    def _changed(self, sql: str, *values: object) -> int:
        return self._connection.execute(sql, values).rowcount


def outbox_of(gallery: Gallery, write: bool = False) -> AbstractContextManager[Outbox]:
    """Give the outbox of a gallery, see `Gallery.outbox`."""
    return gallery.outbox(write)


_CONDITIONS = {
    "key": "o.key = ?",
    "topic": "o.topic = ?",
    "state": f"replace(o.state, '{_FORGOTTEN}', '') = ?",
    "label": "o.label = ?",
    "since": "o.time >= ?",
    "until": "o.time < ?",
    "after": "o.seq > ?",
}


def _condition(where: Mapping[str, object]) -> tuple[str, list[object]]:
    given = {name: value for name, value in where.items() if value is not None}
    return " AND ".join(_CONDITIONS[name] for name in given) or "1", [*given.values()]


def _message(row: Sequence[Any]) -> Message:
    seq, key, topic, time, state, label, body = row[:7]
    parsed = parse_document(key, body)
    return Message(key=key, topic=topic, time=time, body=parsed, state=state, label=label, seq=seq)
