"""Damages galleries, and checks that what is refused is left as it was: bytes, names, times.

    TMPDIR=/dev/shm python -m tests.helpers.gallery_untouched --trials 1000 --seed 1

Each trial is one damage of a folder and some uses of it, each in a process of its own: a log of
another gallery, an older or a newer one, a log that is cut or has a wrong bit, a damaged file with
a sound log, a wrong list of free pages. A use that is refused (`IntegrityError`), and one that only
reads, must leave the folder as it was. A use that is not refused must be right, and leave a sound
gallery.
"""

import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.damage import damage, in_child, verdict_on
from tests.helpers.gallery_damage import OPERATIONS, _answer, _fill, _items, change_and_die
from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors
from tests.helpers.trials import parse, tabulate
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.sqlite.schema import PAGE_BYTES

FILE, LOG, MARK = "gallery.sqlite", "gallery.sqlite-wal", "gallery.sqlite-mark"
BAD = ("changed", "wrong", "unsound", "raw", "input", "crash")
Look: TypeAlias = dict[str, tuple[int, bytes]]
Damage: TypeAlias = Callable[[Path, np.random.Generator], None]


def look_of(folder: Path) -> Look:
    """Return names, times of change and contents of a folder, itself included."""
    found = {".": (folder.stat().st_mtime_ns, b"")}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[path.name] = (path.stat().st_mtime_ns, content)
    return found


def make_galleries(folder: Path, rows: int) -> None:
    """Make galleries: of pictures ``closed`` and ``killed``, and those to take files from."""

    def put(gallery: Gallery, *numbers: int) -> None:
        for number in numbers:
            _fill(gallery, number * rows, number * rows + 20)

    def put_and_die(name: str, *numbers: int) -> None:
        def change(gallery: Gallery) -> None:
            put(gallery, numbers[0])
            gallery.delete([f"picture-{numbers[0] * rows + 3:06d}"])  # Empties the log.
            put(gallery, *numbers[1:])

        change_and_die(folder / name, change)

    for name in ("older", "other"):
        with Gallery.open(folder / name, FINGERPRINT, DIM, create=True) as gallery:
            _fill(gallery, 0, rows)
            gallery.prune(keep_newest=rows - rows // 3)
        put_and_die(name, 2, 3)
    shutil.copytree(folder / "older", folder / "closed")
    with Gallery.open(folder / "closed") as gallery:
        put(gallery, 4, 5, 6, 7)
        gallery.prune(keep_newest=gallery.count() - 30)
    shutil.copytree(folder / "closed", folder / "killed")
    put_and_die("killed", 8, 9, 10)
    # Of the same gallery, later: its log goes on from a file that is not there.
    shutil.copytree(folder / "killed", folder / "newer")
    with Gallery.open(folder / "newer") as gallery:
        put(gallery, 11)
    put_and_die("newer", 12, 13)


def _log_of(name: str) -> Damage:
    def put(folder: Path, rng: np.random.Generator) -> None:
        shutil.copy(folder.parent / name / LOG, folder / LOG)
        if rng.random() < 0.5:
            (folder / MARK).unlink(missing_ok=True)
        if rng.random() < 0.5:
            (folder / f"{FILE}-shm").unlink(missing_ok=True)

    return put


def _damaged(name: str, kinds: tuple[str, ...], most: int = 3) -> Damage:
    def put(folder: Path, rng: np.random.Generator) -> None:
        content = bytearray((folder / name).read_bytes())
        for _ in range(int(rng.integers(1, most + 1))):
            content = damage(content, str(rng.choice(kinds)), rng)
        (folder / name).write_bytes(content)

    return put


def _free_list(folder: Path, rng: np.random.Generator) -> None:
    """Change a bit of the list of free pages, or of its header."""
    content = bytearray((folder / FILE).read_bytes())
    trunk, count = struct.unpack_from(">II", content, 32)
    places = [(trunk - 1) * PAGE_BYTES + 4 * place for place in range(1 + min(count, 1000))]
    at = int(rng.choice([28, 32, 36, *places, *places])) + int(rng.integers(4))
    content[at] ^= 1 << int(rng.integers(8))
    (folder / FILE).write_bytes(content)


def _journal(folder: Path, rng: np.random.Generator) -> None:
    """Put a journal of another database beside it, which SQLite would play back."""
    content = (folder.parent / "other" / FILE).read_bytes()
    magic = bytes.fromhex("d9d505f920a163d7")
    header = magic + struct.pack(">IIIII", 1, 7, len(content) // PAGE_BYTES, 512, PAGE_BYTES)
    page = content[PAGE_BYTES : 2 * PAGE_BYTES]
    total = (7 + sum(page[at] for at in range(PAGE_BYTES - 200, 0, -200))) & 0xFFFFFFFF
    body = struct.pack(">I", 2) + page + struct.pack(">I", total)
    (folder / f"{FILE}-journal").write_bytes(header.ljust(512, b"\0") + body)


_ANY = ("bit", "byte", "16 bytes", "sector of zeros", "page of zeros", "cut", "swap", "misplaced")
DAMAGES: dict[str, tuple[str, Damage]] = {
    "log of another, closed": ("closed", _log_of("other")),
    "log of another, killed": ("killed", _log_of("other")),
    "older log, closed": ("closed", _log_of("older")),
    "older log, killed": ("killed", _log_of("older")),
    "newer log, closed": ("closed", _log_of("newer")),
    "newer log, killed": ("killed", _log_of("newer")),
    "log cut": ("killed", _damaged(LOG, ("cut",), 1)),
    "log damaged": ("killed", _damaged(LOG, _ANY[:5])),
    "file damaged, sound log": ("killed", _damaged(FILE, _ANY)),
    "sectors of file zero, sound log": ("killed", _damaged(FILE, ("sector of zeros",))),
    "file damaged, closed": ("closed", _damaged(FILE, _ANY)),
    "list of free pages": ("closed", _free_list),
    "journal of another, closed": ("closed", _journal),
}
_READS = {
    **{name: use for name, use in OPERATIONS.items() if name not in ("rebuild", "change")},
    "sample": lambda gallery: [repr(item) for item in gallery.sample(20)],
    "cameras": lambda gallery: gallery.cameras(),
    "check": lambda gallery: [gallery.check()],
}
_WRITES: dict[str, Callable[[Gallery], Any]] = {
    "add": lambda gallery: gallery.add([Item(key="new")], some_vectors(1)),
    "add many": lambda gallery: _fill(gallery, 9000, 9400),
    "replace": lambda gallery: gallery.add(_items(250, 260), some_vectors(10, 4)),
    "delete": lambda gallery: gallery.delete([item.key for item in _items(260, 270)]),
    "prune": lambda gallery: gallery.prune(keep_newest=150),
    "prune by time": lambda gallery: gallery.prune(older_than=1.7e9 + 900),
    "rebuild": OPERATIONS["rebuild"],
}
USES = _READS | _WRITES


def _use(folder: Path, name: str) -> dict[str, str]:
    """Return what a use says in a process of its own."""
    return in_child(lambda: {name: _answer(folder, lambda gallery: [USES[name](gallery)])})


def _verdict(
    folder: Path, name: str, before: Look, expected: str, was_sound: bool
) -> tuple[str, str]:
    answer = "".join(_use(folder, name).values())
    verdict, after = verdict_on(name, answer, expected), look_of(folder)
    if after != before and (verdict == "refused" or name in _READS):
        return "changed", f"{[one for one in before | after if before.get(one) != after.get(one)]}"
    if verdict != "right":
        return verdict, answer
    if name in _WRITES and name != "rebuild" and was_sound:
        problems = "".join(_use(folder, "verify").values())
        if problems != "[[]]":
            return "unsound", problems
    return "right", answer


def trials(folder: Path, count: int, seed: int, uses: int) -> Iterator[tuple[str, str]]:
    """Yield the damage of each use, and what came of it."""
    sound: dict[tuple[str, str], str] = {}

    def expected(base: str, name: str) -> str:
        if (base, name) not in sound:
            shutil.copytree(folder / base, folder / "copy")
            sound[base, name] = "".join(_use(folder / "copy", name).values())
            shutil.rmtree(folder / "copy")
            if not sound[base, name].startswith("["):
                raise AssertionError(f"the sound gallery fails: {name}: {sound[base, name]}")
        return sound[base, name]

    for number in range(count):
        rng = np.random.default_rng((seed, number))
        kind = [*DAMAGES][number % len(DAMAGES)]
        base, put = DAMAGES[kind]
        shutil.copytree(folder / base, folder / "damaged")
        put(folder / "damaged", rng)
        # A list of free pages is damage that reads need not notice, and no change may keep.
        was_sound = kind == "list of free pages"
        for name in rng.choice([*USES], uses, replace=False).tolist():
            right = expected(base, name)
            shutil.copytree(folder / "damaged", folder / "copy")
            before = look_of(folder / "copy")
            verdict, details = _verdict(folder / "copy", name, before, right, was_sound)
            shutil.rmtree(folder / "copy")
            if verdict in BAD:
                print(f"{number} {kind}: {name}: {verdict}: {details[-700:]}", flush=True)
            yield kind, verdict
        shutil.rmtree(folder / "damaged")


def main() -> int:
    options = parse(__doc__, trials=1000, seed=0, rows=400, uses=4)
    os.environ["OMP_NUM_THREADS"] = "1"  # Threads of faiss would be missing in forked processes.
    with tempfile.TemporaryDirectory() as name:
        make_galleries(Path(name), options.rows)
        return tabulate(trials(Path(name), options.trials, options.seed, options.uses), BAD)


if __name__ == "__main__":
    sys.exit(main())
