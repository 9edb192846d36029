"""Metrics of `watch` reach the live page; anything else in their place is reported in a line."""

import html
import os
import re
import time

import pytest

from tests.helpers.console import ODD, Client
from tests.helpers.refused import refused
from tests.helpers.small_servers import dripping_server, no_server, other_server
from tests.unit.runtime.serve.conftest import LOCAL
from upperson_console.accounts import Access, Accounts
from upperson_console.app import make_app
from upperson_console.live import Live, check_source
from upperson_rt.errors import UsageError

METRICS = """\
# TYPE upperson_frames_read_total counter
upperson_frames_read_total{camera="gate"} 250.0
upperson_frames_read_total{camera="yard"} 7.0
# TYPE upperson_frames_dropped_total counter
upperson_frames_dropped_total{camera="gate",reason="queue"} 3.0
upperson_frames_dropped_total{camera="gate",reason="empty"} 1.0
# TYPE upperson_camera_up gauge
upperson_camera_up{camera="gate"} 1.0
upperson_camera_up{camera="yard"} 0.0
# TYPE upperson_queue_depth gauge
upperson_queue_depth{camera="",queue="crops"} 5.0
# TYPE upperson_encoder_busy_seconds_total counter
upperson_encoder_busy_seconds_total 30.0
# TYPE upperson_uptime_seconds gauge
upperson_uptime_seconds 60.0
"""
CAMERA = 'upperson_camera_up{camera="gate"}'
OK = b"HTTP/1.0 200 OK\r\n"


def watching(reader, file):
    """A client of a console that reads a metrics file."""
    return Client(make_app(reader.service, Access(None, LOCAL), live=Live([str(file)])))


def state(page):
    """The state of the only process."""
    (row,) = re.findall('<td class="wide">.*?<span class="state [^"]*">(.*?)</span></td>', page)
    return html.unescape(re.sub("</?span[^>]*>", "", row))


def problem_of(source):
    """Why a source has no state, or None."""
    return Live([])._read(str(source))[0].problem


def test_cameras_have_the_state_that_the_process_publishes(reader, tmp_path):
    file = tmp_path / "watch.prom"
    client = watching(reader, file)
    file.write_text(METRICS)
    page = client.get("/live").text
    assert re.findall(r"<dt>Frames</dt><dd>(\d+)</dd><dt>Dropped</dt><dd>(.*?)</dd>", page) == [
        ("250", "4 frames"), ("7", "0 frames"),
    ]  # fmt: skip
    assert state(page) == "running"
    assert '<td class="num">50 %</td><td class="num">5</td>' in page
    os.utime(file, (time.time() - 60,) * 2)
    assert state(client.get("/live").text).startswith("ended: ")
    assert "gate" in reader.client.get("/live").text  # Without any process.


def test_a_viewer_sees_the_state_of_its_cameras_alone(guarded, tmp_path):
    (tmp_path / "watch.prom").write_text(METRICS)
    live = Live([str(tmp_path / "watch.prom")])
    for role, cameras in (("viewer", {"gate"}), ("admin", {"gate", "yard", ODD})):
        account = Accounts(guarded.token_file).of_token(guarded.tokens[role])
        assert {one.name for one in live.now(guarded.service, account)[1]} == cameras


def test_files_without_metrics_are_reported_in_a_line(reader, tmp_path):
    file = tmp_path / "watch.prom"
    client = watching(reader, file)
    for text in (
        *(f"{CAMERA} {number}" for number in ("NaN", "-Inf", "1e308", "1e400", "x", "", "-1e30")),
        f"{CAMERA} 9e18\n{CAMERA} 9e18", 'upperson_camera_up{camera="gate} 1', "a{b", "# TYPE a",
        'a{="b"} 1', "\0", "\udcff", "\x1b[2J\x1b]0;x\x07 1", "<script>alert(1)</script>",
        'a{b="' + "\\" * 100_000, "a{" + "b," * 20_000, 'a{b="c",' * 10_000,
    ):  # fmt: skip
        file.write_bytes(text.encode("utf-8", "surrogateescape") + b"\n")
        began = time.process_time()
        page = client.get("/live").text
        assert time.process_time() - began < 5
        shown = state(page)
        assert shown == "running" or shown.startswith("publishes no metrics"), text[:99]
        assert len(shown) < 300
        assert shown.isprintable()
        assert "<script>alert" not in page
        assert CAMERA not in text or shown != "running"


def test_no_read_of_another_file_blocks(tmp_path):
    folder, pipe, long, loop = (tmp_path / name for name in ("folder", "pipe", "long", "loop"))
    folder.mkdir()
    os.mkfifo(pipe)
    long.write_text(METRICS + "#\n" * (1 << 19))
    loop.symlink_to(loop)
    for file, expected in (
        (folder, "publishes no metrics: no file"),
        (pipe, "publishes no metrics: no file"),
        (long, "publishes no metrics: longer than 1048576 bytes"),
        (tmp_path / "gone", "not running: No such file or directory"),
        (loop, "not running: Too many levels of symbolic links"),
    ):
        assert problem_of(file) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (OK + b"\r\n" + METRICS.encode("utf-16"), "publishes no metrics: 'utf-8'"),
        (OK + b"\r\n" + b"#\n" * (1 << 20), "no metrics: longer than 1048576 bytes"),
        (b"HTTP/1.0 404 No\r\n\r\n", "publishes no metrics: it answers 404"),
        (b"HTTP/1.0 302 Go\r\nLocation: file:///etc/passwd\r\n\r\n", "metrics: it answers 302"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "not running: "),
        (OK + b"X: y\r\n" * 200 + b"\r\n", "not running: got more than"),
        (b"SSH-2.0-OpenSSH_9.7\r\n", "not running: SSH-2.0-OpenSSH_9.7"),
        (b"", "not running: Remote end closed connection"),
    ],
)
def test_an_address_without_metrics_is_reported(content, expected):
    with other_server(content) as port:
        assert expected in problem_of(f"http://127.0.0.1:{port}/metrics")


def test_an_address_is_read_within_a_second():
    with other_server(OK + b"\r\n" + METRICS.encode()) as port:
        assert problem_of(f"http://127.0.0.1:{port}/") is None
    with no_server() as port:
        assert problem_of(f"http://127.0.0.1:{port}/") == "not running: Connection refused"
    for start in (OK + b"X: ", OK + b"\r\n# "):
        with dripping_server(start) as (port, cut):
            why = problem_of(f"http://127.0.0.1:{port}/")
            assert why == "not running: it does not answer within 1 s"
            assert cut.wait(10)


@pytest.mark.parametrize(
    "source",
    [
        "ftp://x", "http://", "http://[::1", "http://h:port/", "http://h:99999/",
        "file:///etc/passwd", "http://anna:s3cret@h/metrics", "http://anna:12/s3cret@h/metrics",
    ],
)  # fmt: skip
def test_other_addresses_are_refused(source):
    with refused("watch_source_invalid", UsageError) as found:
        check_source(source)
    assert "s3cret" not in str(found.value)
