"""Damages files of a gallery at random, and compares every answer with those of the sound one.

    TMPDIR=/dev/shm python -m tests.helpers.gallery_damage --trials 1000 --rows 900 --index-from 300

Each trial is a process of its own; most of its time goes into syncs, hence a folder in memory. An
answer is right if it equals that of the undamaged gallery; a refusal is an `IntegrityError`;
anything else counts against the gallery, as does a `verify` that finds nothing where something else
was refused.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.damage import BAD, KINDS, OUTCOMES, damage, in_child, verdict_on
from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors
from tests.helpers.trials import parse, tabulate
from upperson_maintenance.export import export_gallery
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.sqlite import index
from upperson_rt.gallery.sqlite.list_files import INDEX_FILE

FILES = ("gallery.sqlite", "gallery.sqlite-wal", "gallery.index", "gallery.sqlite-mark")
EARLIER = "earlier"
"""The folder of the first gallery as it once was."""
_QUERIES = some_vectors(3, 77)


def make_galleries(folder: Path, rows: int) -> list[Path]:
    """Make a gallery that was closed, and one whose process was killed, each with an index."""
    closed, killed = folder / "closed", folder / "killed"
    with Gallery.open(closed, FINGERPRINT, DIM, create=True) as gallery:
        _fill(gallery, 0, rows)
    shutil.copytree(closed, folder / EARLIER)
    with Gallery.open(closed) as gallery:
        gallery.add(_items(30, 60), some_vectors(30, 6))  # Not what the older pages say.
        gallery.search(_QUERIES, 1)  # Makes the index and saves it.
        gallery.add(_items(5, 25), some_vectors(20, 5))  # Replaced, deleted and new ones beside it.
        kept = (closed / INDEX_FILE).read_bytes()
        gallery.delete([item.key for item in _items(100, 140)])
        (closed / INDEX_FILE).write_bytes(kept)  # As a process that made it meanwhile does.
        _fill(gallery, rows, rows + 50)
    shutil.copytree(closed, killed)

    def change(gallery: Gallery) -> None:
        kept = (killed / INDEX_FILE).read_bytes()
        gallery.delete([item.key for item in _items(200, 210)])  # Empties the log.
        (killed / INDEX_FILE).write_bytes(kept)
        for start in range(0, 60, 20):
            _fill(gallery, 2 * rows + start, 2 * rows + start + 20)

    change_and_die(killed, change)
    return [closed, killed]


def change_and_die(folder: Path, change: Callable[[Gallery], object]) -> None:
    """Change a gallery in a process that is killed with its log."""
    child = os.fork()
    if child == 0:
        change(Gallery.open(folder, FINGERPRINT, DIM))
        os.kill(os.getpid(), signal.SIGKILL)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        raise AssertionError("the writer was not killed")


def _items(start: int, stop: int) -> list[Item]:
    return [
        Item(
            key=f"picture-{number:06d}",
            source=f"rtsp://camera-{number % 7}#{number}",
            camera=None if number % 11 == 0 else f"camera-{number % 7}",
            time=None if number % 13 == 0 else 1.7e9 + 3.25 * number,
            track=None if number % 5 == 0 else f"t{number // 9}",
            box=(number % 50, 2, 60 + number % 90, 200),
            attributes={"floor": number % 4, "name": f"n{number % 3}"},
        )
        for number in range(start, stop)
    ]


def _fill(gallery: Gallery, start: int, stop: int) -> None:
    for first in range(start, stop, 1000):
        last = min(first + 1000, stop)
        gallery.add(_items(first, last), some_vectors(last - first, 1000 + first), "int8")


def _shown(found: Any) -> Any:
    return [[(hit.id, hit.score, repr(hit.item), repr(hit.span)) for hit in hits] for hits in found]


def _exported(gallery: Gallery, where: Filter | None) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        export_gallery(gallery, Path(folder, "out"), where)
        return [
            hashlib.sha256(Path(folder, "out", name).read_bytes()).hexdigest()
            for name in ("vectors.npy", "items.csv")
        ]


def _rebuilt(gallery: Gallery) -> Any:
    gallery.rebuild()
    return _shown(gallery.search(_QUERIES, 10))


def _changed(gallery: Gallery) -> Any:
    """Replace, add and delete; say what is there then."""
    gallery.add([*_items(300, 303), Item(key="new")], some_vectors(4, 4))
    gallery.delete(["picture-000400", "picture-000401"])
    gallery.prune(keep_newest=gallery.count() - 5)
    return _shown(gallery.search(_QUERIES, 10)), gallery.count(), _exported(gallery, None)


def _vectors(found: Any) -> Any:
    return {id_: (repr(item), vector.tobytes().hex()) for id_, (item, vector) in found.items()}


def _info(gallery: Gallery) -> Any:
    found = gallery.info()
    return (
        found.items, found.cameras, found.variants, found.tracks, found.first_time,
        found.last_time, found.fingerprint,
    )  # fmt: skip


_CAMERA = Filter(camera="camera-3")
_BETWEEN = Filter(since=1.7e9 + 500, until=1.7e9 + 3000)
_FLOOR = Filter(attributes={"floor": 2})
OPERATIONS: dict[str, Callable[[Gallery], Any]] = {
    "search": lambda gallery: _shown(gallery.search(_QUERIES, 10)),
    "search, camera": lambda gallery: _shown(gallery.search(_QUERIES, 10, _CAMERA)),
    "search, time": lambda gallery: _shown(gallery.search(_QUERIES, 10, _BETWEEN)),
    "search, track": lambda gallery: _shown(gallery.search(_QUERIES, 9, Filter(track="t40"))),
    "search, attributes": lambda gallery: _shown(gallery.search(_QUERIES, 10, _FLOOR)),
    "search by track": lambda gallery: _shown(gallery.search(_QUERIES, 5, by_track=True)),
    "search by track, camera": lambda gallery: _shown(
        gallery.search(_QUERIES, 5, _CAMERA, by_track=True)
    ),
    "count": lambda gallery: (gallery.count(), gallery.count(_BETWEEN), gallery.cameras()),
    "info": _info,
    "ids": lambda gallery: gallery.ids([item.key for item in _items(90, 150)]),
    "vectors of hits": lambda gallery: sorted(
        (id_, vector.tolist())
        for id_, vector in gallery.vectors_of(gallery.search(_QUERIES[:1], 10)[0]).items()
    ),
    "get": lambda gallery: _vectors(gallery.get(list(range(20, 90)))),
    "by camera": lambda gallery: {name: repr(found) for name, found in gallery.by_camera().items()},
    "export": lambda gallery: _exported(gallery, None),
    "export, filtered": lambda gallery: _exported(gallery, _CAMERA),
    "verify": lambda gallery: gallery.verify(),
    "rebuild": _rebuilt,
    "change": _changed,
}
"""Each opens the gallery anew, as a command of its own does; the last one changes it."""


def answers(folder: Path) -> dict[str, str]:
    return {name: _answer(folder, operation) for name, operation in OPERATIONS.items()}


def _answer(folder: Path, operation: Callable[[Gallery], Any]) -> str:
    try:
        with Gallery.open(folder, FINGERPRINT, DIM) as gallery:
            return json.dumps(operation(gallery), default=str)
    except IntegrityError as error:
        return f"refused: {error}"
    except InputError as error:
        return f"input: {error}"
    except Exception:
        return f"raw: {traceback.format_exc()}"


def trials(galleries: list[Path], count: int, seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Damage copies of the galleries, each in one place; yield what was damaged, and verdicts."""
    folder = galleries[0].parent
    expected = {}
    for gallery in galleries:
        shutil.copytree(gallery, folder / "copy")
        expected[gallery] = answers(folder / "copy")  # Here: each child has what it imports.
        shutil.rmtree(folder / "copy")
        bad = {k: v for k, v in expected[gallery].items() if not v.startswith(("[", "{"))}
        if bad:
            raise AssertionError(f"the sound gallery does not answer: {bad}")
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        file = str(rng.choice(FILES, p=(0.68, 0.15, 0.15, 0.02)))
        log = file.endswith(("-wal", "-mark")) or rng.random() < 0.1
        gallery, kind = galleries[int(log)], KINDS[number % len(KINDS)]
        shutil.copytree(gallery, folder / "copy")
        path = folder / "copy" / file
        before = path.read_bytes()
        was = folder / EARLIER / file
        earlier = was.read_bytes() if was.exists() else b""
        after = bytes(damage(bytearray(before), kind, rng, earlier))
        path.write_bytes(after)
        found = in_child(lambda: answers(folder / "copy"))
        shutil.rmtree(folder / "copy")
        verdicts = {
            name: verdict_on(name, text, expected[gallery].get(name))
            for name, text in found.items()
        }
        if verdicts.get("verify") == "right" and "refused" in verdicts.values():
            verdicts["verify"] = "missed"
        trial = f"{gallery.name}/{file} {kind}"
        for name, verdict in verdicts.items():
            if verdict in BAD:
                print(f"{number} {trial}: {name}: {verdict}: ...{found[name][-700:]}", flush=True)
        yield trial, verdicts


def main() -> int:
    options = parse(__doc__, trials=1000, seed=0, rows=9000, index_from=index._SEAL_ROWS)
    os.environ["OMP_NUM_THREADS"] = "1"  # Threads of faiss would be missing in forked processes.
    index._SEAL_ROWS = options.index_from
    with tempfile.TemporaryDirectory() as folder:
        galleries = make_galleries(Path(folder), options.rows)
        found = list(trials(galleries, options.trials, options.seed))
    tabulate((use for _, verdicts in found for use in verdicts.items()), BAD)
    worst = (next(one for one in OUTCOMES if one in verdicts.values()) for _, verdicts in found)
    return tabulate(zip((trial for trial, _ in found), worst, strict=True), BAD)


if __name__ == "__main__":
    sys.exit(main())
