"""Logs of several files: parts, and the one that is written to."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.invoke import run_rt, run_rt_json
from tests.helpers.refused import refused
from upperson_console.log_view import LogFilter, passing_lines, read_page
from upperson_log.chain import head_of, open_log, parts_of, verify_log
from upperson_log.query_log import QueryLog
from upperson_log.writer import ChainedLog
from upperson_rt.errors import InputError

LINES = 14


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(QueryLog, "most_bytes", 1000)
    return tmp_path / "log"


@pytest.fixture
def log(path):
    """A log with at least three parts, and at least two lines in the file after them."""
    write(path, range(LINES))
    assert len(parts_of(path)) >= 3
    assert verify_log(path).problems == []
    return path


def write(path, numbers, user="ann"):
    with QueryLog(path, user=user) as log:
        for number in numbers:
            log.write(f"sentence {number}", [], k=1)


def lines_of(path):
    with open_log(path) as log:
        return [json.loads(line) for file, _ in log.opened() for line in file]


def sentences_of(path):
    return [line["sentence"] for line in lines_of(path) if "sentence" in line]


def is_sound(path):
    try:
        return not verify_log(path).problems
    except InputError:  # None of it is there.
        return False


def test_a_full_log_goes_on_in_a_new_file_that_is_chained_to_it(log):
    parts, lines = parts_of(log), lines_of(log)
    assert sentences_of(log) == [f"sentence {number}" for number in range(LINES)]
    assert max(part.stat().st_size for part in parts) < 1500
    for before, after in zip(parts, [*parts[1:], log], strict=True):
        last = json.loads(before.read_bytes().splitlines()[-1])
        first = json.loads(after.read_bytes().splitlines()[0])
        assert (first["action"], first["previous"]) == ("rotate", last["chain"])
        assert first["details"] == {"part": before.name}
        assert stat.S_IMODE(before.stat().st_mode) == 0o600
        assert verify_log(before).problems == []  # With those before it.
    chains = [line["chain"] for line in lines]
    report = verify_log(log, chains)
    assert (report.files, report.lines, report.chain) == (len(parts) + 1, len(lines), chains[-1])
    assert report.expected == {chain: number for number, chain in enumerate(chains, 1)}
    assert report.absent == {}


def _swap(one, other):
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _swap_both(one, other):
    _swap(one, other)
    _swap(head_of(one), head_of(other))


def _copy_as(part, time):
    copy = part.with_name(f"log.part-{time}")
    copy.write_bytes(part.read_bytes())
    head_of(copy).write_bytes(head_of(part).read_bytes())


def _unlink_both(*paths):
    for path in paths:
        path.unlink()
        head_of(path).unlink()


def _edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def _edit_lines(path, change):
    _edit(path, lambda content: b"".join(change(content.splitlines(keepends=True))))


def _cut_with_head(path):
    _edit_lines(path, lambda lines: lines[:-1])
    content = path.read_bytes()
    chain = json.loads(content.splitlines()[-1])["chain"]
    head_of(path).write_text(f"{len(content):020d} {chain}\n")


def _link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


WAYS = {
    "cut": lambda part, other, log: _edit(part, lambda content: content[:-300]),
    "cut by a line": lambda part, other, log: _edit_lines(part, lambda lines: lines[:-1]),
    "cut with its head": lambda part, other, log: _cut_with_head(part),
    "emptied": lambda part, other, log: part.write_bytes(b""),
    "edited": lambda part, other, log: _edit(part, lambda old: old.replace(b'"ann"', b'"bob"', 1)),
    "line dropped": lambda part, other, log: _edit_lines(part, lambda lines: lines[:1] + lines[2:]),
    "first line dropped": lambda part, other, log: _edit_lines(part, lambda lines: lines[1:]),
    "line added": lambda part, other, log: _edit(part, lambda content: content + b"\n"),
    "beginning added": lambda part, other, log: _edit(part, lambda content: content + b'{"ti'),
    "lines swapped": lambda part, other, log: _edit_lines(part, lambda lines: lines[::-1]),
    "removed": lambda part, other, log: part.unlink(),
    "removed with its head": lambda part, other, log: _unlink_both(part),
    "all removed": lambda part, other, log: _unlink_both(*parts_of(log)),
    "head removed": lambda part, other, log: head_of(part).unlink(),
    "head swapped": lambda part, other, log: _swap(head_of(part), head_of(other)),
    "swapped": lambda part, other, log: _swap(part, other),
    "swapped with heads": lambda part, other, log: _swap_both(part, other),
    "swapped with the newest": lambda part, other, log: _swap_both(part, log),
    "copied as the first": lambda part, other, log: _copy_as(part, "20200101000000"),
    "copied as the last": lambda part, other, log: _copy_as(part, "29990101000000"),
    "a link": lambda part, other, log: _link(part),
    "newest removed": lambda part, other, log: log.unlink(),
    "newest removed with its head": lambda part, other, log: _unlink_both(log),
    "newest and its head emptied": lambda part, other, log: [
        file.write_bytes(b"") for file in (log, head_of(log))
    ],
    "newest cut": lambda part, other, log: _edit_lines(log, lambda lines: lines[:-1]),
    "newest without its first line": lambda part, other, log: _edit_lines(
        log, lambda lines: lines[1:]
    ),
}


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_was_changed_removed_or_moved_is_noticed(log, way, place):
    parts = parts_of(log)
    part = parts.pop(place)
    WAYS[way](part, parts[0], log)
    assert not is_sound(log)
    write(log, range(2))
    assert not is_sound(log)


class KilledError(BaseException):
    """Nothing that the writer handles."""


def _full(*_):
    raise OSError(28, "No space left on device")


def _killed(*_):
    raise KilledError


@pytest.mark.parametrize("stop", [_full, _killed])
@pytest.mark.parametrize(
    "step", ["write_head", "os.rename", "sync_folder", "os.ftruncate", "ChainedLog._put"]
)
@pytest.mark.parametrize("torn", [b"", b'{"time": "20'])
def test_a_rotation_that_is_interrupted_is_finished(path, monkeypatch, stop, step, torn):
    write(path, range(3))
    while path.stat().st_size < 1000:
        write(path, [9])
    before = sentences_of(path)
    with monkeypatch.context() as patch:
        patch.setattr(f"upperson_log.writer.{step}", stop)
        with pytest.raises(KilledError if stop is _killed else InputError):
            write(path, ["lost"])
    if not parts_of(path):
        assert path.stat().st_size >= 1000
    elif torn:  # What a kill within the first line leaves.
        path.write_bytes(torn)
    report = verify_log(path)
    assert (report.problems, report.lines) == ([], len(before))
    write(path, ["after"])
    assert sentences_of(path) == [*before, "sentence after"]
    assert (verify_log(path).problems, len(parts_of(path))) == ([], 1)
    heads = {head_of(file) for file in (path, *parts_of(path))}
    assert {*path.parent.glob("*.head")} == heads


def test_open_logs_follow_one_another_and_are_read_beside_it(path):
    """An idle one goes on after several rotations of others."""
    idle = QueryLog(path, user="idle")
    idle.write("sentence idle", [], k=1)
    logs = [QueryLog(path, user=f"user {number}") for number in range(3)]

    def use(log):
        for number in range(20):
            log.write(f"{log.user}, {number}", [], k=1)

    with ThreadPoolExecutor(len(logs)) as pool:
        jobs = [pool.submit(use, log) for log in logs]
        while not all(job.done() for job in jobs):
            assert verify_log(path).problems == []
            read_page(path, LogFilter())
        for job in jobs:
            job.result()
    idle.write("sentence idle", [], k=1)
    for log in (idle, *logs):
        assert log.problem == ""
        log.close()
    expected = {f"{log.user}, {number}" for log in logs for number in range(20)}
    found = sentences_of(path)
    assert ({*found} - {"sentence idle"}, len(found)) == (expected, 62)
    assert verify_log(path).problems == []
    assert len(parts_of(path)) > 10


def test_a_break_is_open_in_the_files_after_it_until_it_is_acknowledged(log):
    count = len(parts_of(log))
    _edit_lines(log, lambda lines: lines[:-1])
    write(log, range(9))
    assert len(parts_of(log)) > count
    report = verify_log(log)
    assert (len(report.problems), report.absent, bool(report.unacknowledged)) == (1, {}, True)
    with QueryLog(log, user="eve") as opened:
        opened.acknowledge()
    assert verify_log(log).problems == []
    parts_of(log)[count - 1].unlink()  # The one before the break.
    assert not is_sound(log)


def test_archived_parts_are_accepted_when_the_log_or_the_user_names_them(log, tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    first, second = parts_of(log)[:2]
    for part in (first, second):
        for file in (part, head_of(part)):
            file.rename(archive / file.name)
    first, second = archive / first.name, archive / second.name
    chain = verify_log(second).chain
    report = verify_log(log)
    assert (report.code, report.absent) == ("log_altered", {chain: False})
    assert run_rt("log", "verify", log).exit_code == 6
    report = verify_log(log, [chain])
    assert (report.problems, report.absent) == ([], {chain: True})

    done = run_rt_json("log", "acknowledge", log)
    assert done["absent"] == [chain]
    last = lines_of(log)[-1]
    assert (last["action"], last["details"]["absent"]) == ("acknowledge", [chain])
    report = verify_log(log)
    assert (report.problems, report.absent) == ([], {chain: True})
    write(log, range(9))
    assert is_sound(log)
    _unlink_both(parts_of(log)[0])
    assert not is_sound(log)

    assert verify_log(second).problems == []
    chain = verify_log(first).chain
    first.unlink()
    assert not is_sound(second)
    assert verify_log(second, [chain]).problems == []


def test_a_log_of_another_size_is_not_rotated_and_a_linked_one_where_it_lies(path, tmp_path):
    with ChainedLog(tmp_path / "other") as other:
        for _ in range(LINES):
            other.append("delete", {})
    assert parts_of(tmp_path / "other") == []
    (tmp_path / "disk").mkdir()
    path.symlink_to(tmp_path / "disk" / "data")
    write(path, range(LINES))
    assert path.is_symlink()
    assert len(sentences_of(path)) == LINES
    assert {part.parent for part in parts_of(path)} == {tmp_path / "disk"}
    assert is_sound(path)


def test_pages_and_exports_have_the_lines_of_all_files(path, monkeypatch):
    monkeypatch.setattr("upperson_console.log_view._LINES", 4)
    write(path, range(LINES))
    assert parts_of(path)
    shown, before = [], None
    while True:
        lines, before = read_page(path, LogFilter(action="query"), before)
        shown += [line.query for line in lines]
        if before is None:
            break
    assert shown == [f"sentence {number}" for number in reversed(range(LINES))]
    found = [json.loads(line) for line in passing_lines(path, LogFilter(action="query"))]
    assert [line["sentence"] for line in found] == shown[::-1]


def test_a_moment_without_a_newest_file_is_read_too(path):
    write(path, range(3))
    while path.stat().st_size < 1000:
        write(path, [9])
    before = sentences_of(path)
    write(path, ["next"])
    head_of(path).write_bytes(head_of(parts_of(path)[0]).read_bytes())
    os.unlink(path)  # As between the names of two files.
    assert is_sound(path)
    assert len(read_page(path, LogFilter())[0]) == len(before)
    with refused("log_unreadable", InputError):
        verify_log(path.with_name("none"))
