"""Items, vectors and filters as rows and conditions of the table `items`, and the log of changes.

Shapes: N rows, D dimensions.
"""

import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, UppersonError
from upperson_rt.gallery.crops import crop_path, old_files, read_crop
from upperson_rt.gallery.records import (
    MAX_NORM_ERROR,
    Filter,
    Item,
    attributes_as_json,
    length_problem,
)
from upperson_rt.gallery.sqlite import schema
from upperson_rt.gallery.sqlite.database import CHANGES_PROBLEM, Transaction
from upperson_rt.gallery.sqlite.schema import COLUMNS, ROW, DamageError, Sums
from upperson_rt.printable import shortened

STORED = np.dtype("<f2")
"""How vectors are stored; every score is computed from these."""
ADD = f"INSERT INTO items ({ROW}, vector, checksum) VALUES ({', '.join('?' * 12)})"
REPLACE = f"""
    UPDATE items SET ({COLUMNS}, variant, vector, checksum) = ({", ".join("?" * 11)}) WHERE id = ?
"""
_Row: TypeAlias = tuple[Any, ...]


class Block(NamedTuple):
    """Some rows."""

    ids: NDArray[np.int64]
    """(N,)"""
    vectors: NDArray[np.float16]
    """(N, D)"""
    checksums: NDArray[np.int64]
    """(N,), 0 where a gallery keeps none."""
    cameras: NDArray[np.object_] | None = None
    """(N,) names or None; where asked for."""
    times: NDArray[np.float64] | None = None
    """(N,) unix seconds, NaN for none; where asked for."""

    def only(self, chosen: NDArray[np.bool_]) -> "Block":
        """Return some of the rows."""
        if chosen.all():
            return self
        return Block._make(None if column is None else column[chosen] for column in self)

    @classmethod
    def joined(cls, blocks: Sequence["Block"], embed_dim: int) -> "Block":
        """Return blocks, of the same columns, one behind the other."""
        if not blocks:
            return cls(
                np.empty(0, np.int64), np.empty((0, embed_dim), STORED), np.empty(0, np.int64)
            )
        columns = zip(*blocks, strict=True)
        return cls._make(None if part[0] is None else np.concatenate(part) for part in columns)


_PLAIN_KEY = re.compile(r"[A-Za-z0-9_ .:-]+", re.ASCII)
"""Keys that need no escapes in a JSON path; all others are compared in Python, never as SQL."""
_BLOCK_ROWS = 8192
_CAMERA, _TIME = 3, 4
MAX_ID = 2**63 - 1
"""SQLite knows no larger number."""
_LOG_ENTRIES = 1_000_000


def passing(transaction: Transaction, where: Filter) -> tuple[str, list[object]]:
    """Return table and condition, as SQL with placeholders, and their values.

    Checks before what decides which rows pass: SQLite's indexes, and attributes.
    """
    condition, values = condition_of(where)
    source = "items NOT INDEXED"
    if (where.camera, where.since, where.until, where.track) != (None,) * 4:
        transaction.check_table()
        source = "items"
    if where.attributes:
        transaction.check_items()
    return f"{source} WHERE {condition}", values


def has_key(transaction: Transaction, keys: Iterable[str]) -> tuple[str, list[object]]:
    """Return table and condition of the rows with these keys, see `passing`."""
    transaction.check_table()
    return "items WHERE key IN (SELECT value FROM json_each(?))", [json.dumps(list(keys))]


def condition_of(where: Filter) -> tuple[str, list[object]]:
    """Return a condition with placeholders, and their values; "1" where everything passes."""
    conditions: list[str] = []
    values: list[object] = []
    if where.cameras is not None:
        conditions.append(f"camera IN ({', '.join('?' * len(where.cameras))})")
        values += where.cameras
    for sql, value in {
        "time >= ?": where.since,
        "time < ?": where.until,
        "track = ?": where.track,
    }.items():
        if value is not None:
            conditions.append(sql)
            values.append(value)
    for key, value in where.attributes.items():
        if _PLAIN_KEY.fullmatch(key):
            path = f'$."{key}"'
            kinds = "('integer', 'real')"
            if isinstance(value, bool):
                kinds = f"('{json.dumps(value)}')"
            elif isinstance(value, str):
                kinds = "('text')"
            conditions.append(
                "CASE WHEN json_valid(attributes) THEN json_type(attributes, ?) IN "
                f"{kinds} AND json_extract(attributes, ?) = ? ELSE 0 END"
            )
            values += (path, path, value)
        else:
            conditions.append("attribute_equals(attributes, ?, ?)")
            values += (key, json.dumps(value))
    return " AND ".join(conditions) or "1", values


def row_from_item(item: Item) -> tuple[object, ...]:
    """Return the values of `COLUMNS`."""
    box = None if item.box is None else ",".join(str(int(edge)) for edge in item.box)
    time = None if item.time is None else float(item.time) + 0.0  # SQLite knows no -0.0.
    attributes = attributes_as_json(item)
    return (item.key, item.source, item.camera, time, item.track, box, item.crop, attributes)


def item_from_row(columns: Sequence[Any]) -> Item:
    """Read the values of `COLUMNS`."""
    key, source, camera, time, track, box, crop, attributes = columns
    for text in (box, attributes):  # Items check the others.
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{type(text).__name__} where a text is expected")
    edges = None if box is None else tuple(map(int, box.split(",")))
    if edges is not None and len(edges) != 4:
        raise ValueError(f"box '{box}' has {len(edges)} edges")
    return Item(
        key=key,
        source=source,
        camera=camera,
        time=time,
        track=track,
        box=edges,
        crop=crop,
        attributes={} if attributes == "{}" else json.loads(attributes),
    )


def checked(transaction: Transaction, rows: list[_Row], embed_dim: int) -> list[_Row]:
    """Return rows that are as they were written: the values of `ROW`, the vector, the checksum."""
    if transaction.sums is not None:
        schema.check_rows(rows)
    else:
        for row in rows:
            _check_vector_itself(row[0], row[-2], embed_dim)
    return rows


def rows_with_ids(transaction: Transaction, ids: Sequence[int], embed_dim: int) -> list[_Row]:
    """Return those that are there, by id, see `checked`."""
    sql = (
        f"SELECT {ROW}, vector, {transaction.checksum} FROM items NOT INDEXED "
        "WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id"
    )
    rows = transaction.execute(sql, (json.dumps([*ids]),)).fetchall()
    return checked(transaction, rows, embed_dim)


def _check_vector_itself(id_: int, vector: object, embed_dim: int) -> None:
    if problem := _vector_problem(vector, embed_dim):
        raise DamageError(f"the picture with id {id_} has a {problem}", "vector_altered", id=id_)


def _vector_problem(vector: object, embed_dim: int) -> str | None:
    """Say what is wrong with the type, size or length of a stored vector, or return None."""
    size = embed_dim * STORED.itemsize
    if not isinstance(vector, bytes):
        return f"{type(vector).__name__} where a vector is expected"
    if len(vector) != size:
        return f"vector of {len(vector)} bytes, expected {size}"
    return length_problem(np.frombuffer(vector, STORED).astype(np.float32))


def ids_where(
    transaction: Transaction, where: Filter | None = None, most: int = -1
) -> NDArray[np.int64]:
    """Return the ids of items that pass, ascending; not all of them if there are more than most."""
    source, values = passing(transaction, where or Filter())
    # One text instead of a Python object for each row.
    (text,) = transaction.execute(
        f"SELECT group_concat(id) FROM (SELECT id FROM {source} LIMIT ?)", (*values, most)
    ).fetchone()
    return np.sort(np.fromstring(text or "", np.int64, sep=","))


def stored_vectors(
    transaction: Transaction,
    embed_dim: int,
    since: int | None,
    also: NDArray[np.int64] | None = None,
    *,
    until: int = MAX_ID,
    with_columns: bool = False,
) -> Iterator[Block]:
    """Yield blocks: of those of the items named that are there, then of those newer than an id.

    ``until`` is the last of those. ``with_columns`` adds camera and time, and checks all of a row.
    """
    columns = f"{ROW}, vector" if with_columns else "id, vector"
    sql = f"SELECT {columns}, {transaction.checksum} FROM items NOT INDEXED WHERE"
    queries: list[tuple[str, tuple[object, ...]]] = []
    if also is not None:
        for start in range(0, len(also), _BLOCK_ROWS):
            ids = json.dumps(also[start : start + _BLOCK_ROWS].tolist())
            queries.append((f"{sql} id IN (SELECT value FROM json_each(?)) ORDER BY id", (ids,)))
    if since is not None:
        queries.append((f"{sql} id > ? AND id <= ? ORDER BY id", (since, until)))
    for query, values in queries:
        cursor, last = transaction.execute(query, values), -1
        while rows := cursor.fetchmany(_BLOCK_ROWS):
            block = _block(rows, embed_dim, transaction.sums is not None)
            if block.ids[0] <= last or (np.diff(block.ids) <= 0).any():
                raise DamageError("the pictures are not in the order of their ids")
            last = int(block.ids[-1])
            yield block


def vectors_with_ids(transaction: Transaction, ids: NDArray[np.int64], embed_dim: int) -> Block:
    """Return those of some items (ascending) that are there."""
    return Block.joined([*stored_vectors(transaction, embed_dim, None, ids)], embed_dim)


def block_of(rows: Sequence[_Row], embed_dim: int) -> Block:
    """Return rows that end with vector and checksum, which were checked, without other columns."""
    if not rows:
        return Block.joined([], embed_dim)
    size = embed_dim * STORED.itemsize
    for row in rows:
        if not isinstance(row[-2], bytes) or len(row[-2]) != size:
            _check_vector_itself(row[0], row[-2], embed_dim)
    return Block(
        ids=np.fromiter((row[0] for row in rows), np.int64, len(rows)),
        vectors=np.frombuffer(b"".join(row[-2] for row in rows), STORED).reshape(-1, embed_dim),
        checksums=np.fromiter((row[-1] or 0 for row in rows), np.int64, len(rows)),
    )


def _block(rows: list[tuple[Any, ...]], embed_dim: int, has_checksums: bool) -> Block:
    has_columns = len(rows[0]) > 3
    if has_checksums and has_columns:
        schema.check_rows(rows)
    elif has_checksums:
        for row in rows:
            schema.check_vector(row[0], row[-2], row[-1])
    block = block_of(rows, embed_dim)
    if not has_checksums:
        lengths = np.linalg.norm(block.vectors.astype(np.float32), axis=1)
        for place in np.flatnonzero(~(np.abs(lengths - 1) <= MAX_NORM_ERROR)):  # NaN, too.
            _check_vector_itself(rows[place][0], rows[place][-2], embed_dim)
    if not has_columns:
        return block
    cameras = np.empty(len(rows), np.object_)
    cameras[:] = [row[_CAMERA] for row in rows]
    times = np.array([row[_TIME] for row in rows], np.float64)  # None becomes NaN.
    return block._replace(cameras=cameras, times=times)


def has_bin(transaction: Transaction) -> bool:
    """Whether there is a table ``bin``: from the first item on that was moved there."""
    return bool(transaction.execute("SELECT 1 FROM sqlite_master WHERE name = 'bin'").fetchone())


def unnamed_crops(
    transaction: Transaction, crops: Sequence[str], *, by_bin: bool = False
) -> list[str]:
    """Return those that no item names; with ``by_bin`` also none in the bin."""
    transaction.check_table()
    named: set[str] = set()
    for source in ("items", "bin") if by_bin and has_bin(transaction) else ("items",):
        sql = f"SELECT crop FROM {source} WHERE crop IN (SELECT value FROM json_each(?))"
        named.update(crop for (crop,) in transaction.execute(sql, (json.dumps(crops),)))
    return [crop for crop in crops if crop not in named]


# The log of changes: what indexes beside the table follow.


def version_of(transaction: Transaction) -> tuple[int, int]:
    """Return the last entry of the log of changes, and the highest id ever given."""
    if transaction.sums is not None:
        return transaction.sums.seq, transaction.sums.last_id
    rows = dict(transaction.execute("SELECT name, seq FROM sqlite_sequence"))
    return rows.get("changes", 0), rows.get("items", 0)


def changed_since(transaction: Transaction, seq: int) -> NDArray[np.int64] | None:
    """Return the ids in the log after an entry, ascending; None if the log begins later."""
    last = version_of(transaction)[0]
    rows = transaction.execute("SELECT id FROM changes WHERE seq > ?", (seq,))
    try:
        ids = np.fromiter((id_ for (id_,) in rows), np.int64)
    except (TypeError, ValueError):  # Damaged, which is as good as missing.
        return None
    return np.unique(ids) if len(ids) == last - seq else None


def trim_log(transaction: Transaction) -> None:
    """Keep the log bounded; an index that is older than it is made again."""
    first, last = transaction.execute(
        "SELECT (SELECT min(seq) FROM changes), (SELECT max(seq) FROM changes)"
    ).fetchone()
    if first is not None and last - first >= _LOG_ENTRIES:
        transaction.execute("DELETE FROM changes WHERE seq <= ?", (last - _LOG_ENTRIES // 2,))


# --- Reads a whole gallery: to list what is wrong with it, or to give it checksums

_FILES_AT_A_TIME = 10_000
_ROWS_AT_A_TIME = 4096


def problems_of(
    transaction: Transaction, embed_dim: int, crops_dir: Path, bin_crops_dir: Path
) -> Iterator[str]:
    """Yield what is wrong, a line each; errors are SQLite's own where it cannot be read."""
    yield from schema.structural_problems(transaction.connection)
    with _any_text(transaction.connection):
        yield from _problems_of_rows(transaction, embed_dim, (crops_dir, bin_crops_dir))
        if transaction.sums is not None:
            yield from _problems_of_changes(transaction, transaction.sums)
    try:
        strays = list(stray_crops(transaction, crops_dir))
    except DamageError:  # Of the indexes: listed above.
        strays = []
    if strays:
        yield (
            f"{len(strays)} files in {crops_dir} belong to no item, such as {strays[0]}: "
            "upperson-rt gallery prune --older-than removes old ones"
        )


def problems_of_bin(
    transaction: Transaction, embed_dim: int, crops_dir: Path, bin_crops_dir: Path
) -> Iterator[str]:
    """Yield what is wrong with the rows of the bin and their crops, a line each."""
    with _any_text(transaction.connection):
        for row in transaction.execute(f"SELECT {ROW}, vector, checksum FROM bin ORDER BY id"):
            places = bin_crops_dir, crops_dir
            for problem in _problems_of_row(row, embed_dim, places, has_sums=True):
                yield f"bin: {problem}"


def stray_crops(
    transaction: Transaction, folder: Path, before: float = float("inf")
) -> Iterator[str]:
    """Yield files in the folder that no item names, also none in the bin, see `old_files`."""
    files = old_files(folder, before)
    while part := list(islice(files, _FILES_AT_A_TIME)):
        yield from unnamed_crops(transaction, part, by_bin=True)


def add_checksums(transaction: Transaction, embed_dim: int) -> Sums:
    """Check a gallery that was made before there were checksums, and give it those."""
    for problem in schema.structural_problems(transaction.connection):
        raise DamageError(problem)
    seq, last_id = version_of(transaction)
    schema.upgrade(transaction.connection)
    sums, done = Sums(seq=seq, last_id=last_id), 0
    sql = f"SELECT {ROW}, vector FROM items NOT INDEXED WHERE id > ? ORDER BY id LIMIT ?"
    while rows := transaction.execute(sql, (done, _ROWS_AT_A_TIME)).fetchall():
        taken = []
        for *row, vector in rows:
            wrong = _vector_problem(vector, embed_dim) or _malformed(row)
            if wrong is not None:
                raise DamageError(
                    f"the picture with id {row[0]}: {wrong}", "row_altered", id=row[0]
                )
            taken.append((*row, schema.checksum_of(row, vector)))
        sums.add(taken)
        transaction.connection.executemany(
            "UPDATE items SET checksum = ? WHERE id = ?", ((row[-1], row[0]) for row in taken)
        )
        done = rows[-1][0]
    sums.last_id = max(sums.last_id, done)
    return sums


def _problems_of_rows(
    transaction: Transaction, embed_dim: int, places: Sequence[Path]
) -> Iterator[str]:
    columns = f"{ROW}, vector, {transaction.checksum}"
    count, total = 0, 0
    rows = transaction.execute(f"SELECT {columns} FROM items NOT INDEXED ORDER BY id")
    for row in rows:
        checksum, has_sums = row[-1], transaction.sums is not None
        yield from _problems_of_row(row, embed_dim, places, has_sums)
        count += 1
        total += checksum if isinstance(checksum, int) else 0
    if transaction.sums is not None and (
        problem := _problem_in(transaction.sums.check, count, total)
    ):
        yield problem


def _problems_of_row(
    row: Sequence[Any], embed_dim: int, places: Sequence[Path], has_sums: bool
) -> Iterator[str]:
    *about, vector, checksum = row
    name = f"item {str(row[1]).encode('utf-8', 'replace').decode()}"
    vector_altered = metadata_altered = None
    if has_sums:
        if _problem_in(schema.check_vector, row[0], vector, checksum):
            vector_altered = "its vector was altered"
        if _problem_in(schema.check_metadata, about, checksum):
            metadata_altered = "its metadata was altered"
    for problem in (
        _vector_problem(vector, embed_dim) or vector_altered,
        _malformed(about) or metadata_altered or _problem_of_crop(about, places),
    ):
        if problem is not None:
            yield f"{name}: {problem}"


def _problem_in(check: Callable[..., None], *arguments: object) -> str | None:
    """Call a check; return what it says of damage, or None."""
    try:
        check(*arguments)
    except DamageError as error:
        return str(error)
    return None


def _problems_of_changes(transaction: Transaction, sums: Sums) -> Iterator[str]:
    count, first, last = transaction.execute(
        "SELECT count(*), min(seq), max(seq) FROM changes NOT INDEXED"
    ).fetchone()
    is_whole = (last or 0) == sums.seq and (not count or count == last - first + 1)
    if not is_whole or _problem_in(transaction.check_changes):
        yield CHANGES_PROBLEM


def _malformed(row: Sequence[Any]) -> str | None:
    try:
        for text in row:
            if isinstance(text, str):
                text.encode("utf-8")
        item_from_row(row[1:-1])
    except UnicodeEncodeError:
        return "malformed metadata: not UTF-8"
    except (ValueError, TypeError, InputError) as error:
        return f"malformed metadata: {error}"
    return None


def _problem_of_crop(row: Sequence[Any], places: Sequence[Path]) -> str | None:
    """Say what is wrong with a crop in its folder, or in the one that it is moved from."""
    if (crop := row[7]) is None:
        return None
    for folder in (*places, places[0]):  # Again, as a move may end meanwhile.
        path = crop_path(folder, crop)
        if path is None or not os.path.isfile(path):
            continue
        try:
            read_crop(path)
        except UppersonError as error:
            if not os.path.isfile(path):
                continue
            return str(error)
        return None
    return f"its crop {shortened(crop)} is missing"


@contextmanager
def _any_text(connection: sqlite3.Connection) -> Iterator[None]:
    """Read texts that are not UTF-8, too, as what cannot be encoded again."""
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    try:
        yield
    finally:
        connection.text_factory = str
