"""Kills, power failures and damage of one large gallery; its backups, and a day pruned from it.

The gallery is made once. Trials change a copy of it, and put back what they damaged.
"""

import json
import mmap
import os
import pickle
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks import damage, trials_work
from benchmarks.flash import written_bytes
from benchmarks.month import fill
from benchmarks.month_data import START_S, DemoFolder, Month, number_of
from benchmarks.month_searches import query_each_second
from benchmarks.report import Column, Table, conditions, print_report, table
from benchmarks.trials_work import K, answers, first_answers, prune
from upperson_bench.processes import call_in_fresh_process, child_environment
from upperson_maintenance.backup import back_up, restore
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.cli.output import print_note
from upperson_rt.files import bytes_on_disk
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.sqlite import index
from upperson_rt.gallery.sqlite.index_file import UnusableIndexError
from upperson_rt.gallery.sqlite.list_files import INDEX_FILE, ListFiles
from upperson_rt.gallery.sqlite.schema import PAGE_BYTES
from upperson_rt.gallery.sqlite.store import SqliteGallery

app = new_app("Try what a large gallery survives.")
DATABASE, LOG = "gallery.sqlite", "gallery.sqlite-wal"
PARTS = ("kills", "damage", "times", "backup", "prune")
_LONGEST_S = 5.0
_QUERIES = 20
_DAMAGES = 4
_CROP = bytes.fromhex("ffd8ffe0") + bytes(2044)
_SPAN_S = 1800.0
_PRUNING_S = 120.0
"""Of searches beside."""
_ONE = {"OMP_NUM_THREADS": "1"}
_HEAD = struct.Struct("=4q")
_ROUNDING = 1e-5
TIMES = {
    "first answer s": Column("first_answer_s"),
    "of which opening s": Column("open_s"),
    "whole check s": Column("check_s", "{:.1f}"),
}


@app.command(cls=Command)
def trials(
    folder: Annotated[Path, typer.Option("--folder", help="Of the gallery and its copies.")],
    demo: DemoFolder = Path("demo"),
    rows: Annotated[int, typer.Option("--rows", min=20_000, help="Pictures.")] = 1_000_000,
    number: Annotated[
        int, typer.Option("--trials", min=1, help="Kills, and power failures; four times damages.")
    ] = 60,
    seed: Annotated[int, typer.Option("--seed", help="Of moments and places.")] = 0,
    parts: Annotated[
        list[str] | None, typer.Option("--part", help="Only these.", show_default=", ".join(PARTS))
    ] = None,
    debug: Debug = False,
) -> None:
    """Kill, damage, back up and prune a gallery of drawn pictures, and count what comes of it.

    Example: `python -m benchmarks.trials --folder trials --trials 10`
    """
    if "LD_PRELOAD" not in os.environ:  # Trials are forked: what they import is there.
        folder.mkdir(parents=True, exist_ok=True)
        one = {"OMP_NUM_THREADS": "1", "LD_PRELOAD": str(_built(folder / "unsynced"))}
        command = (sys.executable, "-m", "benchmarks.trials", *sys.argv[1:])
        os.execve(sys.executable, command, child_environment() | one)
    result = conditions("trials", "faiss-cpu", threads=1, batch_size=1, warmup=0)
    kept = folder / "month.pickle"
    drawn = pickle.loads(kept.read_bytes()) if kept.exists() else Month(demo)
    result |= {"rows": rows, "seed": seed}
    if not (folder / "gallery").exists():
        result["made"] = fill(drawn, folder / "gallery", rows)
    shutil.rmtree(folder / "work", ignore_errors=True)
    shutil.copytree(folder / "gallery", folder / "work")
    trial = _Trials(drawn, folder, rows, seed)
    shown = list[Table]()
    for part in parts or PARTS:
        print_note(f"{part}, at a load of {os.getloadavg()[0]:.1f}")
        result[part] = getattr(trial, part)(number)
        print_note(json.dumps(result[part]))
    if "kills" in result:
        shown.append(table("after a kill", result["kills"]["times"], TIMES))
    print_report(result, [json.dumps(result[part]) for part in parts or PARTS], shown)


class _Trials:
    """A copy of the gallery, and what has to be in it."""

    def __init__(self, drawn: Month, folder: Path, rows: int, seed: int) -> None:
        self._drawn, self._folder, self._rows = drawn, folder, rows
        self._work, self._rng = folder / "work", np.random.default_rng(seed)
        if not (folder / "month.pickle").exists():
            (folder / "month.pickle").write_bytes(pickle.dumps(drawn))
        trials_work.set_sizes(rows)
        self._queries = drawn.queries(_QUERIES, rows)
        np.save(folder / "queries.npy", self._queries)
        self._oldest = self._last_id = self._looked_at = 0
        # By number of a row: scores of the queries, camera, time, and whether it has to be there.
        self._scores = np.empty((0, _QUERIES), np.float32)
        self._cameras, self._times = np.empty(0, np.object_), np.empty(0)
        self._present = np.empty(0, np.bool_)
        with closing(sqlite3.connect(self._work / DATABASE)) as database:
            found = database.execute("SELECT camera, time FROM items NOT INDEXED ORDER BY id")
            self._follow(None, found.fetchall())

    def _score_all(self) -> None:
        """Score the rows that the gallery was made with."""
        with closing(sqlite3.connect(self._work / DATABASE)) as database:
            stored = database.execute("SELECT key, vector FROM items NOT INDEXED ORDER BY id")
            while part := stored.fetchmany(65_536):
                assert number_of(part[0][0]) == len(self._scores)
                vectors = np.frombuffer(b"".join(row[1] for row in part), "<f2")
                self._follow(vectors.reshape(len(part), -1), [])

    def _follow(self, vectors: NDArray[np.float16] | None, rows: list[tuple[Any, ...]]) -> None:
        if vectors is not None:
            scores = vectors.astype(np.float32) @ self._queries.T
            self._scores = np.concatenate([self._scores, scores])
        self._cameras = np.append(self._cameras, [camera for camera, _ in rows])
        self._times = np.append(self._times, [at for _, at in rows])
        self._present = np.append(self._present, np.ones(len(rows), np.bool_))

    # --- Kills

    def kills(self, number: int) -> dict[str, Any]:
        """Kill a process that changes the gallery; each second time the power fails as well.

        In the last third of the trials it also deletes.
        """
        outcomes, found = Counter[str](), defaultdict[str, list[float]](list)
        self._score_all()
        for count in range(number):
            power, deletes = bool(count % 2), count >= 2 * number // 3
            doubtful, interrupted = self._killed(power, deletes)
            if power:
                lost = self._lose_unsynced()
                outcomes["unsynced bytes lost"] += lost
                outcomes["power failed: trials"] += 1
                outcomes["power failed: trials that lost unsynced writes"] += lost > 0
            outcomes[f"killed during {interrupted}"] += 1
            since = 0 if deletes or count == number - 1 else self._last_id
            look = self._look(check=deletes, rows=True, since=since)
            if "count" not in look:
                raise AssertionError(f"after a kill there is no answer: {look}")
            for problem in self._problems(look, doubtful, interrupted, since, found["recall"]):
                outcomes[f"wrong: {problem}"] += 1
                print_note(f"{count}: {problem}")
            for name in ("open_s", "first_answer_s", "check_s"):
                found[name] += [look[name]] if name in look else []
            print_note(f"{count + 1} kills: {json.dumps([outcomes, look['first_answer_s']])}")
        with Gallery.open(self._work) as gallery:
            outcomes["wrong: verify finds something"] += len(gallery.verify())
        recall = found.pop("recall")
        reductions: dict[str, Callable[..., Any]] = {"median": np.median, "longest": np.max}
        return {
            "trials": number,
            "outcomes": dict(outcomes),
            "rows": int(np.count_nonzero(self._present)),
            "recall": [float(np.mean(recall)), min(recall)],
            "times": {
                name: {key: float(reduce(values)) for key, values in found.items() if values}
                for name, reduce in reductions.items()
            },
        }

    def _killed(self, power: bool, deletes: bool) -> tuple[NDArray[np.int64], str]:
        """Return the numbers of rows that may be there or not, and what was interrupted."""
        seed = int(self._rng.integers(2**31))
        numbers = (self._rows, len(self._times), self._oldest, seed, int(deletes))
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.dup2(write, 1)
            if power:
                os.environ["UNSYNCED"] = str(self._folder / "unsynced")
            try:
                trials_work.work(str(self._work), str(self._folder / "month.pickle"), *numbers)
            finally:
                os._exit(1)
        os.close(write)
        with os.fdopen(read) as output:
            lines = [output.readline(), output.readline()]
            time.sleep(self._rng.uniform(0, _LONGEST_S))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines += output.readlines()
        begun, added = ["ready"], list[tuple[list[Item], NDArray[np.float32]]]()
        doubtful, gone = np.empty(0, np.int64), list[NDArray[np.int64]]()
        for line in filter(lambda line: line.endswith("\n"), lines):
            name, *values = json.loads(line)
            if name == "done":
                if begun[0] in ("prune", "delete"):
                    gone.append(doubtful)
                begun, doubtful = ["searched"], doubtful[:0]
                continue
            begun = [name]
            if name == "add":
                items, vectors = self._drawn.items(*values), self._drawn.vectors(*values)
                added.append((items, vectors))
                doubtful = np.arange(*values)
            elif name == "prune":
                self._oldest += trials_work.PRUNED
                # Rows of this trial are newer.
                doubtful = np.flatnonzero(self._present & (self._times < values[0]))
            elif name == "delete":
                doubtful = np.unique(np.array(values, np.int64))
        if added:
            rows: list[Any] = [(item.camera, item.time) for items, _ in added for item in items]
            self._follow(np.concatenate([v for _, v in added]).astype(np.float16), rows)
        every = np.concatenate([doubtful[:0], *gone])
        self._present[every] = False
        return np.setdiff1d(doubtful, every), begun[0]

    def _look(
        self, check: bool = False, rows: bool = False, since: int = 0, fresh: bool = False
    ) -> dict[str, Any]:
        newest = float(self._times.max())
        self._where: dict[str, Any] = {
            "camera": "camera-3",
            "since": newest - _SPAN_S,
            "until": newest + 1,
        }
        where = (str(self._work), str(self._folder / "queries.npy"), self._where, self._rows)
        what = (str(self._folder / "rows.npy") if rows else None, check, since)
        if fresh:
            return dict(call_in_fresh_process(first_answers, *where, *what, environment=_ONE))
        return damage.in_child(partial(_caught, partial(first_answers, *where, *what)))

    def _problems(
        self,
        look: dict[str, Any],
        doubtful: NDArray[np.int64],
        begun: str,
        since: int,
        recall: list[float],
    ) -> Iterator[str]:
        """Yield what is wrong; then take what is there for what has to be there."""
        numbers = np.load(self._folder / "rows.npy")
        there = np.zeros(len(self._times), np.bool_)
        there[: self._looked_at] = self._present[: self._looked_at] & (since > 0)
        there[numbers] = True
        if np.count_nonzero(there) != look["count"]:
            yield "rows are missing, or there twice"
        certain = np.ones(len(there), np.bool_)
        certain[doubtful] = False
        if (self._present & certain & ~there).any():
            yield "acknowledged rows are lost"
        if (there & certain & ~self._present).any():
            yield "deleted rows came back"
        if begun == "add" and np.count_nonzero(there[doubtful]) not in (0, len(doubtful)):
            yield "a commit is there in part"
        self._present, self._looked_at, self._last_id = there, len(there), look["last_id"]
        where = self._where
        passing = there & (self._cameras == where["camera"]) & (self._times >= where["since"])
        for name, among, found in (("", there, "hits"), ("filtered", passing, "filtered")):
            best, shares = self._best(among), []
            for query, hits in enumerate(look[found]):
                rows = [row for row, _ in hits]
                scores = self._scores[rows, query]
                if not there[rows].all():
                    yield f"{name} a hit is none of the rows"
                if (np.abs(scores - [score for _, score in hits]) > _ROUNDING).any():
                    yield f"{name} a score is wrong"
                wanted = {*best[query]}
                shares.append(len({*rows} & wanted) / len(wanted) if wanted else float(not rows))
            if name:
                if min(shares) < 1:
                    yield "a filtered search misses the best"
            else:
                recall.append(float(np.mean(shares)))

    def _best(self, among: NDArray[np.bool_]) -> list[list[int]]:
        rows = np.flatnonzero(among)
        scores = self._scores[rows].T
        count = min(K, len(rows))
        best = np.argpartition(scores, len(rows) - count, axis=1)[:, len(rows) - count :]
        return [rows[part].tolist() for part in best]

    def _lose_unsynced(self) -> int:
        """Take back what was not synced: all of it, or each write as likely as not.

        Files of the index are not among that: those have tests at each of their calls. Returns how
        many bytes were taken back.
        """
        lost, all_of_it = 0, self._rng.random() < 0.5
        for name in (DATABASE, LOG):
            place, undo = self._work / name, self._folder / "unsynced" / name
            content, at = undo.read_bytes() if undo.exists() else b"", 0
            writes = []
            while at + _HEAD.size <= len(content):
                start, length, size, there = _HEAD.unpack_from(content, at)
                at += _HEAD.size + there
                writes.append((start, length, size, content[at - there : at]))
            undo.unlink(missing_ok=True)
            if not place.exists():
                continue
            with open(place, "r+b") as file:
                for start, length, size, old in reversed(writes):
                    if all_of_it or self._rng.random() < 0.5:
                        file.seek(start)
                        file.write(old + bytes(length - len(old)))
                        lost += length
                    if all_of_it:
                        file.truncate(size)
        (self._work / f"{DATABASE}-shm").unlink(missing_ok=True)
        if self._rng.random() < 0.5:  # It is not synced.
            (self._work / f"{DATABASE}-mark").unlink(missing_ok=True)
        return lost

    # --- Damage

    def damage(self, number: int) -> dict[str, dict[str, int]]:
        """Damage one place of a file, and compare what reading it says; by file and kind."""
        found = defaultdict[str, Counter[str]](Counter)
        index._EVERY_S = 600.0  # No work beside.
        for state in ("closed", "killed"):
            if state == "killed":
                _, _ = self._killed(False, False)
                self._look(fresh=True)
            else:
                self._look()
            where = self._where | {"track": f"{len(self._times) // 5 - 400:08d}"}
            search = partial(answers, self._work, self._queries[:4], where)
            expected = damage.in_child(partial(search, False)) | {"check": "null"}
            bad = [one for one in expected.values() if one.partition(":")[0] in damage.OUTCOMES]
            assert not bad, bad
            windows = self._windows(json.loads(expected["search"]))
            print_note(
                f"{state}: {[text[:60] for text in expected.values()]}, "
                f"{len(windows['rows of answers'])} rows of answers found"
            )
            for count in range(_DAMAGES * number // 2):
                name = str(self._rng.choice([*windows]))
                window = damage.Window(*windows[name][int(self._rng.integers(len(windows[name])))])
                kinds = damage.KINDS[: 6 if len(window) < 4096 else 8]
                kind = str(self._rng.choice(kinds))
                damage.damage(window, kind, self._rng)
                window.keep_time()
                texts = damage.in_child(partial(search, count % 64 == 63))
                verdicts = {
                    key: damage.verdict_on(key, text, expected[key]) for key, text in texts.items()
                }
                if (wrong := {*verdicts.values()} - {"right", "refused"}) and "check" not in texts:
                    texts |= damage.in_child(partial(search, True))
                window.put_back()
                for key in [key for key, verdict in verdicts.items() if verdict in wrong]:
                    print_note(f"{count} {name} {kind}, check {texts.get('check')}: {key}: "
                               f"{texts[key][:300]} instead of {expected[key][:300]}")  # fmt: skip
                worst = next(one for one in damage.OUTCOMES if one in verdicts.values())
                found[f"{state}: {name}"][worst] += 1
                found[f"kind: {kind}"][worst] += 1
                for key, verdict in verdicts.items():
                    found[f"operation: {key}"][verdict] += 1
                print_note(f"{count} {state} {name} {kind}: {worst}")
        found |= self._index_damage(number)
        return {name: dict(counts) for name, counts in found.items()}

    def _windows(self, hits: list[list[tuple[int, float]]]) -> dict[str, list[tuple[Any, ...]]]:
        """Return places to damage, by name: arguments of `damage.Window`."""
        path, log = self._work / DATABASE, self._work / LOG
        rows, page = [], PAGE_BYTES
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as all_:
            for number, _ in [*chain(*hits)][::4]:
                # Pages are in the order of ids, roughly. Key and source of a row follow each other.
                near, wide = len(all_) * number // len(self._times), len(all_) // 30
                at = all_.find(f"#{number}rtsp".encode(), max(0, near - wide), near + wide)
                if at > 0:
                    rows.append((path, at // page * page, at // page * page + 2 * page))
        windows: dict[str, list[tuple[Any, ...]]] = {
            "database": [(path,)],
            "its first pages": [(path, 0, 32 * page)],
            "rows of answers": rows,
            "mark": [(self._work / f"{DATABASE}-mark",)],
            "log": [(log,)],
        }
        return {
            name: places
            for name, places in windows.items()
            if places and all(place[0].exists() and place[0].stat().st_size for place in places)
        }

    def _index_damage(self, number: int) -> dict[str, Counter[str]]:
        """Damage files of the index, and see whether reading notices."""
        found = defaultdict[str, Counter[str]](Counter)
        with Gallery.open(self._work) as gallery:
            assert isinstance(gallery, SqliteGallery)
            files = ListFiles(self._work, gallery.database.meta)

        def read_index() -> dict[str, str]:
            try:
                return {"read": "refused" if files.read().missing else "right"}
            except (UnusableIndexError, OSError):
                return {"read": "refused"}
            except Exception as error:  # In a forked process it must not go further up.
                return {"read": "raw", "error": repr(error)}

        for path in self._index_files():
            for kind in damage.KINDS[:8]:
                for _ in range(max(1, number // 20)):
                    window = damage.Window(path)
                    damage.damage(window, kind, self._rng)
                    verdict = damage.in_child(read_index).get("read", "crash")
                    if verdict == "right" and window.is_changed:
                        verdict = "wrong"
                    window.put_back()
                    name = "manifest" if path.name == INDEX_FILE else "part"
                    found[f"index: {name}"][verdict] += 1
                    found[f"index kind: {kind}"][verdict] += 1
        return found

    def _index_files(self) -> list[Path]:
        return [
            path for path in self._work.glob(f"{INDEX_FILE}*") if not path.name.endswith("-lock")
        ]

    # --- Times

    def times(self, number: int) -> dict[str, Any]:
        """Time opening, a damaged part of the index, and checks of the whole."""
        found: dict[str, Any] = {}
        found["closed"] = [self._look(fresh=True)["first_answer_s"] for _ in range(3)]
        os.sync()
        for path in self._work.glob("gallery.*"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found["closed, files not in memory"] = self._look(fresh=True)["first_answer_s"]
        print_note(json.dumps(found))
        largest = max(self._index_files(), key=lambda path: path.stat().st_size)
        queries = str(self._folder / "queries.npy")
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(
                partial(call_in_fresh_process, query_each_second, environment=_ONE),
                *(str(self._work), queries, 90.0),
            )
            time.sleep(10)
            # As a disk that returns something else: what is open goes on with the old file.
            shutil.copyfile(largest, self._folder / "part")
            damage.damage(damage.Window(self._folder / "part"), "byte", self._rng)
            (self._folder / "part").replace(largest)
            look = self._look(fresh=True)
            found["a part damaged"] = look["first_answer_s"]
            found["then again"] = self._look(fresh=True)["first_answer_s"]
            searches = [took for _, took in beside.result()]
        found["searches beside, p50 and longest ms"] = [
            1e3 * float(np.median(searches)), 1e3 * max(searches)
        ]  # fmt: skip
        print_note(json.dumps(found))
        with Gallery.open(self._work) as gallery:
            for name, check in (("check", gallery.check), ("verify", gallery.verify)):
                began, cpu = time.perf_counter(), time.process_time()
                found[f"{name}: problems"] = len(check() or ())
                found[f"{name}: s"] = time.perf_counter() - began
                found[f"{name}: processor s"] = time.process_time() - cpu
        return found

    # --- Backups, and a day less

    def backup(self, number: int) -> dict[str, Any]:
        """Back up, once more after 10,000 rows, and restore."""
        copy, restored = self._folder / "backup", self._folder / "restored"
        for place in (copy, restored):
            shutil.rmtree(place, ignore_errors=True)
        found = {"first": _measured(partial(back_up, self._work, copy))}
        self._add(10_000)
        found["increment"] = _measured(partial(back_up, self._work, copy))
        found["restore"] = _measured(partial(restore, copy, restored))
        with Gallery.open(restored) as gallery, Gallery.open(self._work) as source:
            assert gallery.count() == source.count()
        for place in (copy, restored):
            shutil.rmtree(place)
        return found

    def _add(self, count: int, until_s: float | None = None) -> None:
        """Add rows; with a time they end before it, and have crops."""
        with Gallery.open(self._work) as gallery:
            assert gallery.crops_dir is not None
            for start in range(len(self._times), len(self._times) + count, 4096):
                stop = min(start + 4096, len(self._times) + count)
                items = self._drawn.items(start, stop)
                if until_s is not None:
                    items = [
                        replace(item, time=until_s - number, crop=_crop_of(item.camera, number))
                        for number, item in enumerate(items, start)
                    ]
                    for item in items:
                        path = gallery.crops_dir / str(item.crop)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(_CROP)
                gallery.add(items, self._drawn.vectors(start, stop))
        self._times = np.append(self._times, np.full(count, np.nan))

    def prune(self, number: int) -> dict[str, Any]:
        """Prune 300,000 rows with crops while another process searches and a third one adds."""
        count, queries = 3 * self._rows // 10, str(self._folder / "queries.npy")
        self._add(count, START_S)
        before, commits = _used(self._work), list[float]()
        with ThreadPoolExecutor(2) as pool, Gallery.open(self._work) as gallery:
            searching = pool.submit(
                call_in_fresh_process, query_each_second, str(self._work), queries, _PRUNING_S
            )
            time.sleep(10)
            start = len(self._times)
            pruning = pool.submit(call_in_fresh_process, prune, str(self._work), START_S)
            while not pruning.done():
                part = (start, start + 10)
                items, vectors = self._drawn.items(*part), self._drawn.vectors(*part)
                began = time.monotonic()
                gallery.add(items, vectors)
                commits.append(time.monotonic() - began)
                start += 10
                time.sleep(0.1)
            deleted, took = pruning.result()
            searches = [s for at, s in searching.result() if 10 <= at <= 10 + took]
        return {
            "rows": deleted,
            "seconds": took,
            "longest ms of searches and commits beside": [1e3 * max(searches), 1e3 * max(commits)],
            "p50 ms": [1e3 * float(np.median(part)) for part in (searches, commits)],
            "bytes before and after": [before, _used(self._work)],
            "files left": sum(len(files) for _, _, files in os.walk(self._work / "crops")),
        }


def _caught(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return function()
    except Exception as error:  # In a forked process it must not go further up.
        return {"error": repr(error)}


def _built(folder: Path) -> Path:
    """Build the library that notes what was not synced, into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    source, library = Path(__file__).with_name("unsynced.c"), folder / "unsynced.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    return library


def _measured(change: Callable[[], object]) -> dict[str, float]:
    """Return what a change of files takes."""
    began, cpu, written = time.perf_counter(), time.process_time(), written_bytes()
    change()
    return {
        "seconds": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu,
        "written_bytes": written_bytes() - written,
    }


def _used(folder: Path) -> int:
    """Return the bytes that a folder takes on its disk."""
    return sum(
        bytes_on_disk((Path(place) / name).lstat())
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )


def _crop_of(camera: str | None, number: int) -> str:
    digits = f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" * 2
    return f"{camera}/2026-09-21/{number // 20:06d}-123-{digits[:12]}.sha256-{digits}.jpg"


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.trials")
