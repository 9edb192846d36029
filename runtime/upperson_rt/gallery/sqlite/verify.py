"""Reads a whole gallery: to say what is wrong with it, or to give it checksums."""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from upperson_rt.errors import InputError, UppersonError
from upperson_rt.gallery.crops import crop_path, old_files, read_crop
from upperson_rt.gallery.sqlite.checksums import (
    FACETS,
    ROW,
    DamageError,
    Sums,
    check_metadata,
    check_total,
    check_vector,
    checksum_of,
    prove_facet,
)
from upperson_rt.gallery.sqlite.database import Transaction, structural_problems
from upperson_rt.gallery.sqlite.rows import (
    item_from_row,
    unnamed_crops,
    vector_problem,
    version_of,
)
from upperson_rt.gallery.sqlite.schema import upgrade
from upperson_rt.printable import shortened

__all__ = ["add_checksums", "problems_of", "stray_crops"]

_FILES_AT_A_TIME = 10_000
_ROWS_AT_A_TIME = 4096


def problems_of(transaction: Transaction, embed_dim: int, crops_dir: Path) -> Iterator[str]:
    """Yield what is wrong, a line each; errors are SQLite's own where it cannot be read."""
    yield from structural_problems(transaction.connection, "integrity_check")
    with _any_text(transaction.connection):
        yield from _problems_of_rows(transaction, embed_dim, crops_dir)
        if transaction.sums is not None:
            yield from _problems_of_indexes(transaction, transaction.sums)
    try:
        strays = list(stray_crops(transaction, crops_dir))
    except DamageError:  # Of the index of crops, and has been told.
        strays = []
    if strays:
        yield (
            f"{len(strays)} files in {crops_dir} belong to no item, such as {strays[0]}: "
            "upperson-rt gallery prune --older-than removes old ones"
        )


def stray_crops(
    transaction: Transaction, folder: Path, before: float = float("inf")
) -> Iterator[str]:
    """Yield files in the folder that no item names, see `old_files`."""
    files = old_files(folder, before)
    while part := list(islice(files, _FILES_AT_A_TIME)):
        yield from unnamed_crops(transaction, part)


def add_checksums(transaction: Transaction, embed_dim: int) -> Sums:
    """Check a gallery that was made before there were checksums, and give it those.

    Raises:
        DamageError: Something is wrong with it.
    """
    for problem in structural_problems(transaction.connection, "integrity_check"):
        raise DamageError(problem)
    seq, last_id = version_of(transaction)
    upgrade(transaction.connection)
    sums, done = Sums(seq=seq, last_id=last_id), 0
    sql = f"SELECT {ROW}, vector FROM items NOT INDEXED WHERE id > ? ORDER BY id LIMIT ?"
    while rows := transaction.execute(sql, (done, _ROWS_AT_A_TIME)).fetchall():
        taken = []
        for *row, vector in rows:
            wrong = vector_problem(vector, embed_dim) or _malformed(row)
            if wrong is not None:
                raise DamageError(f"the picture with id {row[0]}: {wrong}")
            taken.append((*row, checksum_of(row, vector)))
        sums.add(taken)
        transaction.connection.executemany(
            "UPDATE items SET checksum = ? WHERE id = ?", ((row[-1], row[0]) for row in taken)
        )
        done = rows[-1][0]
    sums.last_id = max(sums.last_id, done)
    return sums


def _problems_of_rows(transaction: Transaction, embed_dim: int, crops_dir: Path) -> Iterator[str]:
    columns = f"{ROW}, vector, {transaction.checksum}"
    count, total = 0, 0
    rows = transaction.execute(f"SELECT {columns} FROM items NOT INDEXED ORDER BY id")
    for *row, vector, checksum in rows:
        name = f"item {str(row[1]).encode('utf-8', 'replace').decode()}"
        problems = [
            vector_problem(vector, embed_dim),
            _malformed(row) or _problem_of_crop(row, crops_dir),
        ]
        if transaction.sums is not None:
            altered = _altered(row, vector, checksum)
            problems = [problem or other for problem, other in zip(problems, altered, strict=True)]
            count += 1
            total += checksum if isinstance(checksum, int) else 0
        yield from (f"{name}: {problem}" for problem in problems if problem is not None)
    sums = transaction.sums
    if sums is not None and (problem := _problem(check_total, count, total, sums)) is not None:
        yield problem


def _altered(row: Sequence[Any], vector: object, checksum: object) -> list[str | None]:
    """Say whether vector and metadata differ from their checksums."""
    found: list[str | None] = [None, None]
    try:
        check_vector(row[0], vector, checksum)
    except DamageError:
        found[0] = "its vector was altered"
    try:
        check_metadata(row, checksum)
    except DamageError:
        found[1] = "its metadata was altered"
    return found


def _problems_of_indexes(transaction: Transaction, sums: Sums) -> Iterator[str]:
    found = (_problem(prove_facet, transaction.connection, facet, sums) for facet in FACETS)
    yield from (problem for problem in found if problem is not None)
    count, first, last = transaction.execute(
        "SELECT count(*), min(seq), max(seq) FROM changes NOT INDEXED"
    ).fetchone()
    if (last or 0) != sums.seq or (count and count != last - first + 1):
        yield "the log of changes is not what it should be"
    elif (problem := transaction.changes_problem()) is not None:
        yield problem


def _problem(check: Callable[..., None], *arguments: object) -> str | None:
    """Say what a check finds damaged, or return None."""
    try:
        check(*arguments)
    except DamageError as error:
        return str(error)
    return None


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


def _problem_of_crop(row: Sequence[Any], crops_dir: Path) -> str | None:
    crop = row[7]
    if crop is None:
        return None
    path = crop_path(crops_dir, crop)
    if path is None or not os.path.isfile(path):
        return f"its crop {shortened(crop)} is missing"
    try:
        read_crop(path)
    except UppersonError as error:
        return str(error)
    return None


@contextmanager
def _any_text(connection: sqlite3.Connection) -> Iterator[None]:
    """Read texts that are not UTF-8, too, as what cannot be encoded again."""
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    try:
        yield
    finally:
        connection.text_factory = str
