"""Manipulates query logs at random, goes on writing, and looks at what `verify_log` says.

    python -m tests.helpers.log_manipulations --trials 500 --seed 0

Each trial writes a log, perhaps keeps it open, changes log or head, and writes more through the
real writer. Until the break is acknowledged the log must not verify, what was written before must
be in some file as it was, and each later line must be there. Anything else counts as `BAD`.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.helpers.trials import parse, report
from upperson_log.chain import head_of, verify_log
from upperson_log.query_log import QueryLog
from upperson_rt.errors import InputError

_LINES = 8


class Trial:
    """A log in a folder, with older copies of log and head after each line."""

    def __init__(self, folder: Path, random_: random.Random) -> None:
        """Write some lines and keep the log open."""
        self.path, self.random = folder / "log", random_
        self.logs: list[bytes] = [b""]
        self.heads: list[bytes] = [b""]
        self.log = QueryLog(self.path, user="ann")
        for number in range(self.random.randint(2, _LINES)):
            self.log.write(f"before {number}", [], k=1)
            self.logs.append(self.path.read_bytes())
            self.heads.append(head_of(self.path).read_bytes())

    @property
    def lines(self) -> list[bytes]:
        """The lines of the log before it is manipulated."""
        return self.logs[-1].splitlines(keepends=True)


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name("beside")
    beside.write_bytes(content)
    beside.replace(path)


def _write(trial: Trial, content: bytes) -> None:
    """Write over the log, or put another file in its place."""
    trial.random.choice([_replace, Path.write_bytes])(trial.path, content)


def _swap(trial: Trial) -> None:
    lines = trial.lines
    one, other = trial.random.sample(range(len(lines)), 2)
    lines[one], lines[other] = lines[other], lines[one]
    trial.path.write_bytes(b"".join(lines))


def _drop(trial: Trial) -> None:
    lines = trial.lines
    del lines[trial.random.randrange(len(lines))]
    trial.path.write_bytes(b"".join(lines))


def _one_bit_wrong(trial: Trial, content: bytes) -> bytes:
    changed = bytearray(content)
    changed[trial.random.randrange(len(changed))] ^= 1 << trial.random.randrange(7)
    return bytes(changed)


def _add(trial: Trial) -> None:
    with open(trial.path, "ab") as file:
        file.write(trial.random.choice([b"\n", b"garbage\n", trial.lines[0], trial.lines[-1]]))


def _head_newer(trial: Trial) -> None:
    size = len(trial.logs[-1]) + trial.random.randint(1, 300)
    chain = trial.heads[-1].split()[1].decode()
    head_of(trial.path).write_text(f"{size:020d} {chain}\n")


def _both_older(trial: Trial) -> None:
    number = trial.random.randrange(len(trial.logs) - 1)
    trial.path.write_bytes(trial.logs[number])
    head_of(trial.path).write_bytes(trial.heads[number])


def _both_removed(trial: Trial) -> None:
    trial.path.unlink()
    head_of(trial.path).unlink()


WAYS: dict[str, Callable[[Trial], object]] = {
    "cut": lambda t: t.path.write_bytes(t.logs[-1][: t.random.randrange(len(t.logs[-1]))]),
    "emptied": lambda t: t.path.write_bytes(b""),
    "removed": lambda t: t.path.unlink(),
    "older copy": lambda t: _write(t, t.random.choice(t.logs[:-1])),
    "lines swapped": _swap,
    "line dropped": _drop,
    "byte edited": lambda t: _write(t, _one_bit_wrong(t, t.logs[-1])),
    "line added": _add,
    # One line behind is what a crash leaves, and nothing is lost.
    "head older": lambda t: head_of(t.path).write_bytes(t.random.choice(t.heads[:-2])),
    "head newer": _head_newer,
    "head edited": lambda t: head_of(t.path).write_bytes(_one_bit_wrong(t, t.heads[-1])),
    "head removed": lambda t: head_of(t.path).unlink(),
}
ONLY_OPEN: dict[str, Callable[[Trial], object]] = {
    "both older": _both_older,
    "both removed": _both_removed,
}
"""Found by the process that has the log open alone."""


def problem_of(folder: Path, way: str, is_open: bool, random_: random.Random) -> str:
    """Manipulate a log in an empty folder; return what is wrong afterwards, empty if nothing is."""
    trial = Trial(folder, random_)
    if not is_open:
        trial.log.close()
    (WAYS | ONLY_OPEN)[way](trial)
    left = [path.read_bytes() for path in (trial.path,) if path.exists()]
    if way in WAYS and not _is_told(trial.path):
        return "sound before the next line"
    count = random_.randint(1, 3)
    for number in range(count):
        log = trial.log if is_open else QueryLog(trial.path, user="bob")
        log.write(f"after {number}", [], k=1)
        if not log.problem:
            return "the writer does not say so"
        if not is_open or random_.random() < 0.3:
            log.close()
            trial.log, is_open = log, False
        if not _is_told(trial.path):
            return "sound after the next line"
    trial.log.close()
    files = [path.read_bytes() for path in sorted(folder.glob("log*"))]
    if not all(content in files or not content for content in left):
        return "what was left is gone"
    after = trial.path.read_bytes()
    if not all(f"after {number}".encode() in after for number in range(count)):
        return "a later line is missing"
    with QueryLog(trial.path, user="eve") as log:
        log.acknowledge("checked")
        log.write("more", [], k=1)
        if log.problem:
            return "it is not acknowledged"
    report = verify_log(trial.path)
    return "not sound when acknowledged" if report.problems or report.lines != count + 3 else ""


def _is_told(path: Path) -> bool:
    try:
        return bool(verify_log(path).problems)
    except InputError:  # It is not there, and its head says nothing.
        return True


def main() -> int:
    options = parse(__doc__, trials=500, seed=0)
    random_, ends = random.Random(options.seed), Counter[str]()
    for _ in range(options.trials):
        is_open = random_.random() < 0.5
        way = random_.choice([*WAYS, *(ONLY_OPEN if is_open else ())])
        with tempfile.TemporaryDirectory() as folder:
            problem = problem_of(Path(folder), way, is_open, random_)
        said = f"BAD, {problem}" if problem else "ok"
        ends[f"{said}: {way}, {'open' if is_open else 'closed'}"] += 1
    return report(ends, ("BAD",))


if __name__ == "__main__":
    raise SystemExit(main())
