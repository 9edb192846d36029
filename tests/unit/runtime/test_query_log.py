import json
import os
import random
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.command_line import run_code
from tests.helpers.log_manipulations import ONLY_OPEN, WAYS, problem_of
from tests.helpers.refused import refused
from upperson_log import writer as log_writer
from upperson_log.chain import verify_log
from upperson_log.query_log import QueryLog
from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Hit, Item

HITS = [Hit(id=number, score=0.5, item=Item(key=str(number))) for number in (7, 3)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_some(path, count=6, **more):
    with QueryLog(path, user="ann") as log:
        for number in range(count):
            log.write(f"sentence {number}", HITS, k=2, **more)


def counts_of(path):
    """Lines, those of older releases, those cut off, and problems."""
    report = verify_log(path)
    return report.lines, report.unchained, report.cut_off, report.problems


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_line_says_who_asked_what_and_what_came_out(path):
    with QueryLog(path, user="ann") as log:
        where = Filter(camera=["gate", "hall"], since=5.0, attributes={"floor": 2})
        log.write("woman\nin \N{BLACK HEART SUIT}", HITS, k=2, where=where, gallery="g")
        log.write("red", HITS, k=2, where=Filter(camera="gate"))
    line, other = lines_of(path)
    assert other["filter"] == {"camera": "gate"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(line.pop("chain")) == 64
    assert line.pop("time").endswith("+00:00")
    where = {"camera": ["gate", "hall"], "since": 5.0, "attributes": {"floor": 2}}
    assert line == {
        "user": "ann", "action": "query", "sentence": "woman\nin \N{BLACK HEART SUIT}",
        "filter": where, "k": 2, "by_track": False, "gallery": "g", "ids": [7, 3],
        "keys": ["7", "3"],
    }  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="users have numbers on POSIX only")
def test_the_user_is_the_systems_not_a_variable(path, monkeypatch):
    import pwd

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "another")
    assert QueryLog(path).user == pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    assert QueryLog(path).user == "uid 987654"


def test_every_line_is_on_disk_before_the_call_returns(path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(fsync(file)))
    with QueryLog(path) as log:
        assert len(synced) == 1  # Its name.
        for count in (2, 3):
            log.write("red", HITS, k=1)
            assert (len(synced), len(lines_of(path))) == (count, count - 1)


def test_lines_of_threads_and_processes_do_not_mix(path):
    code = """
import sys
from upperson_log.query_log import QueryLog
log = QueryLog(sys.argv[1], user=sys.argv[2])
for _ in range(20):
    log.write("x" * 5000, [], k=1)
"""

    def in_a_process(name):
        done = run_code(code, path, name)
        assert done.returncode == 0, done.stderr

    log = QueryLog(path, user="threads")
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(in_a_process, name) for name in ("a", "b")]
        jobs += [pool.submit(log.write, "x" * 5000, HITS, k=1) for _ in range(20)]
        for job in jobs:
            job.result()
    assert counts_of(path) == (60, 0, 0, [])
    assert Counter(line["user"] for line in lines_of(path)) == {"a": 20, "b": 20, "threads": 20}


def test_a_line_cut_off_by_a_full_disk_spoils_no_other(path, monkeypatch):
    log = QueryLog(path)
    write = os.write

    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:9]))
    log.write("red", HITS, k=1)  # In pieces, but whole.
    calls = iter([lambda file, content: write(file, content[:20]), full])
    monkeypatch.setattr(os, "write", lambda *arguments: next(calls)(*arguments))
    with refused("log_unwritable", InputError, path=str(path)):
        log.write("green", HITS, k=1)
    monkeypatch.setattr(os, "write", write)
    log.write("blue", HITS, k=1)
    first, torn, last = path.read_text().splitlines()
    first, last = json.loads(first), json.loads(last)
    assert (first["sentence"], last["sentence"]) == ("red", "blue")
    assert len(torn) == last["cut_off"] == 20
    assert counts_of(path) == (2, 0, 1, [])


@pytest.mark.parametrize(
    "make",
    [lambda path: path.parent.rmdir(), lambda path: path.mkdir(), lambda path: os.mkfifo(path)],
)
def test_what_cannot_be_written_is_refused_at_once(tmp_path, make):
    path = tmp_path / "place" / "log"
    path.parent.mkdir()
    log = QueryLog(tmp_path / "log")
    log.close()
    with refused("log_unwritable", InputError):
        log.write("red", HITS, k=1)
    make(path)
    with refused("log_unwritable", InputError, path=str(path)):
        QueryLog(path)


def test_the_line_that_was_changed_or_is_missing_is_named(path):
    """Lines that were added, swapped or edited are tried by `log_manipulations`."""
    write_some(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for place in (0, 5):
        changed = lines[place].replace(b'"ann"', b'"bob"')
        path.write_bytes(b"".join([*lines[:place], changed, *lines[place + 1 :]]))
        problem = f"line {place + 1} is not what was written"
        assert verify_log(path).problems[0].startswith(problem)
        path.write_bytes(b"".join([*lines[:place], *lines[place + 1 :]]))
        assert (problem if place < 5 else "at the end are missing") in verify_log(path).problems[0]


def test_what_older_releases_wrote_is_chained_to_what_follows(path, tmp_path):
    old = b'{"user": "old"}\n' * 3 + b'{"user": "cut o'
    path.write_bytes(old)
    write_some(path, 2)
    assert counts_of(path) == (2, 4, 0, [])
    path.write_bytes(path.read_bytes().replace(b'"old"', b'"new"', 1))
    assert verify_log(path).problems[0].startswith("line 5 ")
    (tmp_path / "log.head").unlink()
    assert "log.head is missing" in verify_log(path).problems[-1]


WHOLE = b'{"time": "2026-11-26T09:00:00.000+00:00", "user": "bob", "action": "query"}'


@pytest.mark.parametrize("length", [1, 30])
def test_a_last_line_that_a_crash_cut_off_is_known(path, length):
    write_some(path, 3)
    for count in (1, 2):
        with open(path, "ab") as file:
            file.write(WHOLE[:length])
        assert counts_of(path) == (1 + 2 * count, 0, count, [])
        write_some(path, 2)
        assert counts_of(path) == (3 + 2 * count, 0, count, [])


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1::/:\n", "no_query_log"),
        (b"", "no_query_log"),
        (WHOLE + b"\n", "log_unchained"),
    ],
)
def test_what_is_no_query_log_is_not_approved(path, tmp_path, content, code):
    path.write_bytes(content)
    report = verify_log(path)
    assert (report.code, report.lines, len(report.problems)) == (code, 0, 1)
    QueryLog(tmp_path / "new").close()
    for first in (b"", WHOLE[:1]):  # Nothing was written yet, or the first line was cut off.
        (tmp_path / "new").write_bytes(first)
        assert verify_log(tmp_path / "new").code == ""
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "pipe"):  # Reading that would wait forever.
        with refused("log_unreadable", InputError):
            verify_log(tmp_path / name)


@pytest.mark.parametrize("with_head", [False, True])
def test_a_log_without_its_chain_or_its_line_ends_is_not_approved(path, with_head):
    write_some(path, 3)
    if not with_head:
        path.with_name("log.head").unlink()
    stripped = [{**line, "chain": None} for line in lines_of(path)]
    for content in (
        "".join(f"{json.dumps(line)}\n" for line in stripped).encode(),
        path.read_bytes().replace(b"\n", b"\r\n"),
    ):
        path.write_bytes(content)
        report = verify_log(path)
        assert (report.code, report.lines, report.unchained) == ("log_unchained", 0, 3)
    assert "CR LF" in report.problems[0]


def test_a_log_that_was_made_anew_as_a_whole_lacks_the_chain_that_was_noted(path):
    chains = []
    with QueryLog(path) as log:
        assert log.last_chain() == ""
        for number in range(3):
            log.write(f"sentence {number}", [], k=1)
            chains.append(log.last_chain())
    write_some(path, 1)  # What was there before stays what it was.
    report = verify_log(path, chains)
    assert (report.problems, report.expected) == ([], dict(zip(chains, (1, 2, 3), strict=True)))
    assert (report.lines, report.chain) == (4, lines_of(path)[-1]["chain"])
    # A user who may write both files leaves out lines, and chains the others again.
    path.unlink()
    path.with_name("log.head").unlink()
    write_some(path, 2)
    assert verify_log(path).problems == []
    (problem,) = verify_log(path, [chains[1]]).problems
    assert problem.startswith(f"no line has the expected chain {chains[1]}: the log was written")


def test_of_very_many_strange_lines_a_hundred_are_listed(path):
    write_some(path, 3)
    with open(path, "ab") as file:
        file.write(b"\n" * 1_000)
    lines, _, _, problems = counts_of(path)
    assert (lines, len(problems), problems[-1]) == (3, 101, "and 900 more of them")
    assert problems[0].startswith("line 4 is not what was written")


@pytest.mark.parametrize("soon", [0, 500, 1 << 20])
def test_a_log_goes_on_whether_it_is_read_through_or_not(path, monkeypatch, soon):
    monkeypatch.setattr(log_writer, "SOON_BYTES", soon)
    path.write_bytes(b'{"user": "old"}\n' * 5)
    for count in range(4):
        write_some(path, 1, user=f"{count}" * 50 * count)
    with open(path, "ab") as file:
        file.write(b'{"time": "2026-')
    write_some(path, 1)
    assert counts_of(path) == (5, 5, 1, [])


_WAYS = [(way, is_open) for way in WAYS for is_open in (False, True)]


@pytest.mark.parametrize(("way", "is_open"), [*_WAYS, *((way, True) for way in ONLY_OPEN)], ids=str)
def test_a_manipulated_log_is_never_continued_unseen(tmp_path, way, is_open):
    assert problem_of(tmp_path, way, is_open, random.Random(1)) == ""


def test_a_log_that_was_cut_goes_on_in_a_new_file_until_that_is_acknowledged(path, tmp_path):
    write_some(path)
    chain, cut = verify_log(path).chain, path.read_bytes()[:-300]
    path.write_bytes(cut)
    write_some(path, 1)
    assert (tmp_path / "log.broken-1").read_bytes() == cut
    assert "at the end are missing" in verify_log(tmp_path / "log.broken-1").problems[0]
    first, line = lines_of(path)
    assert (first["action"], first["previous"], line["sentence"]) == ("break", chain, "sentence 0")
    assert first["details"]["set_aside"] == "log.broken-1"
    report = verify_log(path, [chain])
    assert (report.previous, report.unacknowledged) == (chain, first["time"])
    assert (report.expected, len(report.problems)) == ({chain: 1}, 1)
    with QueryLog(path, user="eve") as log:
        assert log.problem
        log.acknowledge("the disk was full")
        assert not log.problem
    write_some(path, 1)
    assert verify_log(path).problems == []
    said = lines_of(path)[2]
    assert (said["user"], said["action"]) == ("eve", "acknowledge")
    assert said["details"] == {"since": first["time"], "reason": "the disk was full"}


@pytest.mark.parametrize("fails", ["os.rename", "sync_folder", "ChainedLog._put", "write_head"])
def test_a_break_that_is_interrupted_is_found_again(path, monkeypatch, fails):
    write_some(path, 3)
    path.write_bytes(path.read_bytes()[:-9])
    with monkeypatch.context() as patch:
        patch.setattr(f"upperson_log.writer.{fails}", full)
        with refused("log_unwritable", InputError):
            QueryLog(path)
    assert verify_log(path).problems
    write_some(path, 1)
    assert len(verify_log(path).problems) == 1
    assert lines_of(path)[-1]["sentence"] == "sentence 0"


def test_a_head_that_a_crash_left_behind_is_caught_up(path, tmp_path):
    write_some(path, 1)
    head = (tmp_path / "log.head").read_bytes()
    write_some(path, 1)
    (tmp_path / "log.head").write_bytes(head)
    path.write_bytes(path.read_bytes()[:-1])  # Its line end is missing, too.
    assert verify_log(path).problems == []
    QueryLog(path).close()
    assert (tmp_path / "log.head").read_bytes() != head
    write_some(path, 1)
    assert (verify_log(path).previous, counts_of(path)) == ("", (3, 0, 0, []))
    (tmp_path / "log.head").write_bytes(head)  # No crash leaves it two lines behind.
    (problem,) = verify_log(path).problems
    assert "2 lines behind" in problem


def test_several_open_logs_agree_on_the_new_file(path, tmp_path):
    logs = [QueryLog(path, user=f"user {number}") for number in range(4)]
    for number in range(5):
        for log in logs:
            log.write(f"{log.user}, {number}.", [], k=1)
        if number == 1:
            path.rename(tmp_path / "log.moved")
    broken = sorted(tmp_path.glob("log.broken-*[0-9]"))
    assert len(broken) < len(logs)
    text = "".join(one.read_text() for one in (*broken, path, tmp_path / "log.moved"))
    for number in range(5):
        assert all(f"{log.user}, {number}." in text for log in logs)
    assert path.read_text().count("sentence") >= 8  # None breaks again after the first round.
    for log in logs:
        log.close()


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="root alone gives files away")
@pytest.mark.parametrize("name", ["log", "log.head"])
def test_a_new_file_that_root_begins_belongs_to_the_owner_of_the_one_before(path, tmp_path, name):
    write_some(path, 2)
    for one in ("log", "log.head"):
        os.chown(tmp_path / one, 1234, 1234)
    (tmp_path / name).unlink()
    write_some(path, 1)
    assert {(tmp_path / one).stat().st_uid for one in ("log", "log.head")} == {1234}


@pytest.mark.parametrize(("head_too", "made_anew"), [(True, False), (False, True)])
def test_a_log_that_was_rotated_is_not_written_to_under_its_new_name(path, head_too, made_anew):
    """A new file goes on, and says so until it is acknowledged."""
    with QueryLog(path, user="ann") as log:
        log.write("before", [], k=1)
        chain = log.last_chain()
        path.rename(path.with_name("log.1"))
        if head_too:
            path.with_name("log.head").rename(path.with_name("log.1.head"))
        if made_anew:
            path.touch()
        log.write("after", [], k=1)
    assert [line["sentence"] for line in lines_of(path.with_name("log.1"))] == ["before"]
    first, second = lines_of(path)
    assert (first["action"], first["previous"], second["sentence"]) == ("break", chain, "after")
    assert "log acknowledge" in verify_log(path).problems[0]


def test_a_name_alone_sets_no_log_aside(path, tmp_path):
    """A log that was moved to the name of one set aside does not continue it."""
    log = QueryLog(path)
    log.write("red", HITS, k=1)
    path.rename(tmp_path / "log.broken-9")
    (tmp_path / "log.head").rename(tmp_path / "log.broken-9.head")
    write_some(path, 1)
    log.write("green", HITS, k=1)
    log.close()
    assert log.problem
    assert verify_log(path).problems
