"""What the trials of a gallery run in processes of their own: work until a kill, and answers."""

import json
import pickle
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.month_data import number_of
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Gallery, Hit
from upperson_rt.gallery.sqlite import database, index, list_files
from upperson_rt.gallery.sqlite.rows import version_of
from upperson_rt.gallery.sqlite.store import SqliteGallery

K = 10
BATCH = 512
PRUNED = 700
DELETED = 20


def set_sizes(rows: int) -> None:
    """Make parts of the index small, so that work on it is frequent.

    A gallery of less than a million rows gets the index of a larger one.
    """
    list_files.SEAL_ROWS = 2048
    index._EVERY_S = 0.5
    if rows < index.APPROXIMATE_FROM:
        index.APPROXIMATE_FROM = database.LARGE_ROWS = rows // 2
        list_files.PART_ROWS = rows // 2


def work(folder: str, drawn_file: str, *numbers: int) -> None:
    """Change a gallery without end, and print what begins, and that it is done.

    Args:
        folder: The gallery's.
        drawn_file: The pickled `Month`.
        numbers: Of rows that the gallery was made with; of the first row to add; of the row from
            which on rows are to be pruned; seed of the order; whether to delete as well, 0 or 1.
    """
    rows, first, oldest, seed, deletes = numbers
    drawn, rng = pickle.loads(Path(drawn_file).read_bytes()), np.random.default_rng(seed)
    set_sizes(rows)

    def do(name: str, numbers: list[Any], change: Callable[[], object]) -> None:
        print(json.dumps([name, *numbers]), flush=True)
        change()
        print(json.dumps(["done"]), flush=True)

    with Gallery.open(folder) as gallery:
        do("ready", [], lambda: gallery.search(drawn.queries(1, rows), 1))
        while True:
            kind = rng.choice(4, p=(0.6, 0.15, 0.05, 0.2) if deletes else (0.8, 0, 0, 0.2))
            if kind == 0:
                part, first = (first, first + BATCH), first + BATCH
                items, vectors = drawn.items(*part), drawn.vectors(*part)
                do("add", [*part], partial(gallery.add, items, vectors))
            elif kind == 1:
                oldest += PRUNED
                until = drawn.items(oldest, oldest + 1)[0].time
                do("prune", [until], partial(gallery.prune, older_than=until))
            elif kind == 2:
                chosen = rng.integers(oldest + 10_000, first, DELETED).tolist()
                keys = [drawn.items(number, number + 1)[0].key for number in chosen]
                do("delete", chosen, partial(gallery.delete, keys))
            else:
                gallery.search(drawn.queries(1, rows), 1)


def first_answers(
    folder: str,
    queries: str,
    where: dict[str, Any],
    rows: int,
    out: str | None,
    check: bool,
    since: int = 0,
) -> dict[str, Any]:
    """Open a gallery, search it, and say how long that took.

    Args:
        folder: The gallery's.
        queries: A .npy file of (Q, D).
        where: Arguments of a `Filter`.
        rows: That the gallery was made with.
        out: Where to save the numbers of rows; None for nowhere.
        check: Whether to check the whole file before.
        since: Rows with higher ids are saved.
    """
    set_sizes(rows)
    vectors, began = np.load(queries), time.perf_counter()
    with Gallery.open(folder) as gallery:
        assert isinstance(gallery, SqliteGallery)
        opened = time.perf_counter()
        gallery.search(vectors[:1], K)
        result: dict[str, Any] = {
            "open_s": opened - began,
            "first_answer_s": time.perf_counter() - began,
            "hits": _shown(gallery.search(vectors, K)),
            "filtered": _shown(gallery.search(vectors, K, Filter(**where))),
        }
        if out is not None:
            began = time.perf_counter()
            if check:
                gallery.finish_erasures()
                result["check_s"] = time.perf_counter() - began
            with gallery.database.reading() as transaction:
                sql = "SELECT key FROM items NOT INDEXED WHERE id > ?"
                keys = transaction.execute(sql, (since,))
                np.save(out, np.fromiter((number_of(key) for (key,) in keys), np.int64))
                result |= {"count": transaction.count(), "last_id": version_of(transaction)[1]}
    return result


def prune(folder: str, until: float) -> tuple[int, float]:
    """Delete all rows before a time; return how many, and the seconds that took."""
    began = time.monotonic()
    with Gallery.open(folder) as gallery:
        return gallery.prune(older_than=until), time.monotonic() - began


def _shown(found: list[list[Hit]]) -> list[list[tuple[int, float]]]:
    return [[(number_of(hit.item.key), hit.score) for hit in hits] for hits in found]


def answers(folder: Path, queries: Any, where: dict[str, Any], check: bool) -> dict[str, str]:
    """Return what reading a gallery in several ways says, by name: an answer, or how it failed.

    ``check`` also checks the whole file, of which the answer is empty.
    """
    track = Filter(track=where["track"])
    there = {name: value for name, value in where.items() if name != "track"}
    calls: dict[str, Callable[[Gallery], Any]] = {
        "search": lambda gallery: _shown(gallery.search(queries, K)),
        "search, filter": lambda gallery: _shown(gallery.search(queries, K, Filter(**there))),
        "search, track": lambda gallery: _shown(gallery.search(queries, K, track)),
        "search by track": lambda gallery: [
            [(hit.item.key, hit.score, repr(hit.span)) for hit in hits]
            for hits in gallery.search(queries[:2], K, by_track=True)
        ],
        "count": lambda gallery: (gallery.count(), gallery.count(Filter(**there))),
        "items": lambda gallery: [repr(item) for item in gallery.items(Filter(**there))],
    }
    if check:
        calls["check"] = lambda gallery: gallery.check()
    try:
        with Gallery.open(folder) as gallery:
            return {name: _outcome(partial(call, gallery)) for name, call in calls.items()}
    except IntegrityError as error:
        return dict.fromkeys(calls, f"refused: {error.code}")


def _outcome(call: Callable[[], Any]) -> str:
    try:
        return json.dumps(call())
    except IntegrityError as error:
        return f"refused: {error.code}"
    except InputError as error:
        return f"input: {error.code}"
    except Exception as error:
        return f"raw: {error!r}"


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
