"""What a console reads beside its gallery: metrics and its log."""

import pytest
from hypothesis import example
from hypothesis import strategies as st

from tests.helpers.fuzzing import as_json, damaged_bytes, examples, fuzz, json_values, refused_well
from tests.unit.runtime.serve.test_live import METRICS
from upperson_camera.reasons import answer_challenge
from upperson_console.live import Live
from upperson_console.log_view import LogFilter, read_page
from upperson_log.chain import LogReport, head_of, verify_log
from upperson_log.query_log import QueryLog
from upperson_rt.gallery import Hit, Item

EXPONENTS = METRICS.replace("250.0", "2.5e2 1790000000000").encode()


@fuzz(content=damaged_bytes([METRICS.encode(), EXPONENTS]))
@example(content=b'upperson_frames_read{camera="gate"} NaN\n')
@example(content=b'upperson_queue_depth{camera=""} +Inf\n')
@example(content=b"upperson_uptime_seconds 1e308\nupperson_uptime_seconds 1e308\n")
def test_metrics(written, content):
    process, values = Live([])._read(str(written("watch.prom", content)))
    assert process.problem is None or "\n" not in process.problem
    assert len(process.problem or "") < 300
    for sums in values.values():
        assert all(isinstance(int(value), int) for value in sums.values())


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Content of two sound logs, and of the file beside each."""
    found = []
    for start, lines in ((b"", 4), (b'{"user": "old"}\n' * 2 + b'{"time": "20', 3)):
        path = tmp_path_factory.mktemp("log") / "log"
        path.write_bytes(start)
        with QueryLog(path, user="ann") as log:
            for number in range(lines):
                hits = [Hit(id=number, score=0.5, item=Item(key="a"))]
                log.write(f"sentence {number}", hits, k=number + 1, details={"picture": "7"})
        found.append((path.read_bytes(), head_of(path).read_bytes()))
    return found


@fuzz(data=st.data(), beside=st.booleans())
def test_logs(logs, written, data, beside):
    pair = data.draw(st.sampled_from(logs))
    damaged = data.draw(damaged_bytes([pair[beside]]))
    path = written("log", pair[0] if beside else damaged)
    head_of(path).write_bytes(damaged if beside else pair[1])
    report = refused_well(verify_log, path)
    assert isinstance(report, LogReport)
    if damaged != pair[beside]:
        assert report.problems or report.cut_off
    assert len(read_page(path, LogFilter())[0]) <= 50
    with QueryLog(path) as log:  # It can be written to, whatever stands there.
        log.write("more", [], k=1)
    assert read_page(path, LogFilter())[0][0].query == "more"


LINE = {"time": "2026-11-26T09:00:00+00:00", "user": "ann", "action": "query", "sentence": "red"}


@fuzz(changes=st.dictionaries(st.sampled_from([*LINE, "ids", "details"]), json_values, max_size=2))
@examples(
    {"changes": {"time": "9999-12-31T23:59:59-23:59"}},
    {"changes": {"time": 10**400, "ids": 5}},
    {"changes": {"details": {"a": "x" * 100_000}, "sentence": {"a": {"b": [None] * 1000}}}},
)
def test_lines_of_a_log_that_are_json(written, changes):
    lines = [as_json(LINE | changes), "[1]", "5", "null", '"x"', "[" * 900 + "]" * 900, "{}"]
    content = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    found, _ = read_page(written("log", content), LogFilter())
    assert len(found) == len(lines)
    assert all(line.action == "damaged" for line in found[:-1])


CHALLENGES = [
    b'Digest realm="cam", nonce="0a1b", qop="auth", opaque="x", algorithm=MD5',
    b'Digest realm="cam", nonce="0a1b"',
    b'Basic realm="cam"',
]


@fuzz(contents=st.lists(damaged_bytes(CHALLENGES), max_size=3))
@example(contents=[b"Digest realm="])
@example(contents=[b'Digest realm="a", nonce="b", qop="auth-int"'])
def test_challenges(contents):
    challenges = [content.decode("latin-1") for content in contents]
    answer = answer_challenge(challenges, ("anna", "secret"), "http://h/x", "POST", "/x")
    assert answer is None or answer.startswith(("Digest ", "Basic "))
