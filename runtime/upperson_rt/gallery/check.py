"""A whole SQLite gallery read through and checked, apart from its search index."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upperson_rt.errors import InputError
from upperson_rt.gallery.crops import crop_path, stray_crops
from upperson_rt.gallery.rows import COLUMNS, item_from_row
from upperson_rt.gallery.vectors import vector_problem

__all__ = ["problems_of"]


def problems_of(connection: sqlite3.Connection, embed_dim: int, crops_dir: Path) -> Iterator[str]:
    """Yield what is wrong, a line each; errors are SQLite's own where it cannot be read."""
    for (line,) in connection.execute("PRAGMA integrity_check"):
        if line != "ok":
            yield f"SQLite: {line}"
    with _any_text(connection):
        rows = connection.execute(f"SELECT {COLUMNS}, vector FROM items ORDER BY id")
        for *columns, blob in rows:
            yield from _problems_of_row(columns, blob, embed_dim, crops_dir)
    strays = list(stray_crops(connection, crops_dir))
    if strays:
        yield (
            f"{len(strays)} files in {crops_dir} belong to no item, such as {strays[0]}: "
            "upperson-rt gallery prune --older-than removes old ones"
        )


def _problems_of_row(
    columns: Sequence[Any], blob: bytes, embed_dim: int, crops_dir: Path
) -> Iterator[str]:
    name = f"item {str(columns[0]).encode('utf-8', 'replace').decode()}"
    problem = vector_problem(blob, embed_dim)
    if problem is not None:
        yield f"{name}: {problem}"
    try:
        for text in columns:
            if isinstance(text, str):
                text.encode("utf-8")
        item = item_from_row(columns)
    except UnicodeEncodeError:
        yield f"{name}: malformed metadata: not UTF-8"
    except (ValueError, TypeError, InputError) as error:
        yield f"{name}: malformed metadata: {error}"
    else:
        if item.crop is not None:
            path = crop_path(crops_dir, item.crop)
            if path is None or not path.is_file():
                yield f"{name}: its crop {item.crop} is missing"


@contextmanager
def _any_text(connection: sqlite3.Connection) -> Iterator[None]:
    """Read texts that are not UTF-8, too, as what cannot be encoded again."""
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    try:
        yield
    finally:
        connection.text_factory = str
