"""Makes the rows of a copy of a database those of a later state, by ids and the log of changes."""

import itertools
from typing import Any

from upperson_rt.gallery.sqlite.stored import (
    Transaction,
    add_rows,
    changed_since,
    remove_rows,
    rows_after,
    rows_with_ids,
)

_ROWS_AT_A_TIME = 4096


class UnrelatedError(Exception):
    """A copy is of no earlier state, or the log of changes does not reach back to it."""


def follow(now: Transaction, then: Transaction, embed_dim: int) -> tuple[int, int]:
    """Make the rows of an earlier state those of another; return how many it added and removed.

    Raises:
        UnrelatedError: It is no earlier state, or the log of changes does not reach back to it.
    """
    new, sums = now.sums, then.sums
    assert new is not None
    assert sums is not None
    _make_outbox(now, then)
    changed = changed_since(now, sums.seq) if new.seq >= sums.seq else None
    if changed is None or new.last_id < sums.last_id or _definitions(now) != _definitions(then):
        raise UnrelatedError
    removed, before_seq, before_id = 0, sums.seq, sums.last_id
    changed = changed[changed <= sums.last_id]
    parts = [
        changed[start : start + _ROWS_AT_A_TIME].tolist()
        for start in range(0, len(changed), _ROWS_AT_A_TIME)
    ]
    for part in parts:
        removed += remove_rows(then, part, embed_dim)
    added = 0
    for rows in itertools.chain(
        (rows_with_ids(now, part, embed_dim) for part in parts),
        rows_after(now, before_id, embed_dim),
    ):
        add_rows(then, rows)
        added += len(rows)
    if (sums.rows, sums.total) != (new.rows, new.total):
        raise UnrelatedError
    sums.seq, sums.last_id = new.seq, new.last_id
    then.execute("DELETE FROM changes WHERE seq > ?", (before_seq,))  # By triggers, just now.
    _copy_rows(now, then, "changes", f"WHERE seq > {before_seq}")
    (first,) = now.execute("SELECT ifnull(min(seq), 0) FROM changes").fetchone()
    then.execute("DELETE FROM changes WHERE seq < ?", (first,))
    for name in (*_other_tables(now), "sqlite_sequence"):
        then.execute(f"DELETE FROM {name}")
        _copy_rows(now, then, name)
    return added, removed


def _copy_rows(now: Transaction, then: Transaction, name: str, where: str = "") -> None:
    rows = now.execute(f"SELECT * FROM {name} {where}")
    places = ", ".join("?" * len(rows.description))
    then.connection.executemany(f"INSERT INTO {name} VALUES ({places})", rows)


def _make_outbox(now: Transaction, then: Transaction) -> None:
    """Make tables of the outbox that were made since: the first deletion or alert makes some."""
    there = {name for name, _ in _definitions(then)}
    for name, sql in _definitions(now):
        if name.startswith("outbox") and name not in there and sql is not None:
            then.execute(sql)


def _definitions(transaction: Transaction) -> list[tuple[Any, ...]]:
    return transaction.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()


def _other_tables(transaction: Transaction) -> list[str]:
    """Return the tables of the outbox, which have no checksums."""
    sql = "SELECT name FROM sqlite_master WHERE type = 'table' AND name GLOB 'outbox*'"
    return [name for (name,) in transaction.execute(sql)]
