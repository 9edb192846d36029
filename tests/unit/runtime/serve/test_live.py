"""The live page: metrics of `watch`, or a line of what is there instead, and newest frames."""

import html
import io
import os
import re
import time

import pytest
from PIL import Image

from tests.helpers.console import ODD, START, Client, log_lines, logged, picture_in
from tests.helpers.refused import refused
from tests.helpers.small_servers import dripping_server, no_server, other_server
from tests.unit.runtime.serve.conftest import LOCAL
from upperson_console.accounts import Access, Account
from upperson_console.app import make_app
from upperson_console.live import Live, check_source
from upperson_rt.errors import UsageError
from upperson_rt.gallery.snapshots import Snapshot, picture_path, snapshot_folder, write_snapshot

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


def test_a_viewer_sees_the_state_of_its_cameras_alone(reader, tmp_path):
    (tmp_path / "watch.prom").write_text(METRICS)
    live = Live([str(tmp_path / "watch.prom")])
    for seen, cameras in ((("gate",), {"gate"}), (None, {"gate", "yard", ODD})):
        account = Account(name="vera", role="viewer", cameras=seen)
        assert {one.name for one in live.now(reader.service, account)[1]} == cameras


def test_the_share_of_the_encoder_is_that_of_the_last_seconds_and_since_a_restart(tmp_path):
    file = tmp_path / "watch.prom"
    live = Live([])

    def busy(busy_s, uptime_s):
        text = METRICS.replace("total 30.0", f"total {busy_s}").replace("ds 60.0", f"ds {uptime_s}")
        file.write_text(text)
        return live._read(str(file))[0].busy

    assert [busy(30, 60), busy(30, 70), busy(38, 80)] == [0.5, 0.0, 0.8]
    busy(1, 4)
    assert busy(3, 8) == 0.5


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
        assert (len(shown) < 300, shown.isprintable(), "<script>alert" in page) == (
            True,
            True,
            False,
        )
        assert CAMERA not in text or shown != "running"


def test_no_read_of_another_file_or_address_blocks(tmp_path, monkeypatch):
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
    with other_server(OK + b"\r\n" + METRICS.encode()) as port:
        assert problem_of(f"http://127.0.0.1:{port}/") is None
    with no_server() as port:
        assert problem_of(f"http://127.0.0.1:{port}/") == "not running: Connection refused"
    monkeypatch.setattr("upperson_console.live._TIMEOUT_S", 0.2)
    for start in (OK + b"X: ", OK + b"\r\n# "):
        with dripping_server(start) as (port, cut):
            why = problem_of(f"http://127.0.0.1:{port}/")
            assert why == "not running: it does not answer within 0.2 s"
            assert cut.wait(10)


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


# --- The newest frame of a camera

SQUARE = ((0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (0.0, 1.0))


def write(console, camera, **more):
    made = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(made, "JPEG")
    snapshot = Snapshot(camera=camera, width=128, height=96, **{"time": START, **more})
    folder = snapshot_folder(console.service.gallery)
    write_snapshot(folder, snapshot, made.getvalue())
    return picture_path(folder, camera)


def test_the_page_draws_zones_and_masks_by_their_numbers(console):
    camera = "<new>"  # It has no pictures of people yet.
    write(console, camera, zones=(SQUARE, SQUARE[:3]), masks=(SQUARE[1:],))
    live = console.client.get("/live").text
    (link,) = re.findall('href="(/live/camera[?][^"]*)"', live)
    page = console.client.get(link)
    assert page.status_code == 200
    drawn = re.findall('<polygon class="(zone|mask)" points="([^"]*)"/>', page.text)
    points = [tuple(tuple(map(float, p.split(","))) for p in each.split()) for _, each in drawn]
    assert [kind for kind, _ in drawn] == ["zone", "zone", "mask"]
    assert points == [SQUARE, SQUARE[:3], SQUARE[1:]]
    texts = re.findall('<text x="(.*?)%" y="(.*?)%">(.*?)</text>', page.text)
    assert [name for *_, name in texts] == ["zone 1", "zone 2", "mask 1"]
    assert [*map(float, texts[0][:2])] == [25, 75]
    (source,) = re.findall('<img src="(/live/camera/[^"]*)"', page.text)
    for _ in range(2):  # Each frame is logged once.
        answer = console.client.get(source)
        headers = {"content-type": "image/jpeg", "cache-control": "no-store"}
        assert answer.headers.items() >= headers.items()
        assert picture_in(answer.content).size == (64, 48)
    logged(console, action="view", filter={"camera": camera}, details={"snapshot": camera})
    write(console, camera, time=START + 60)
    console.client.get(source)
    snapshots = [line["details"].get("snapshot") for line in log_lines(console)]
    assert snapshots.count(camera) == 2


@pytest.mark.parametrize("path", ["/live/camera", "/live/camera/picture"])
def test_accounts_see_their_own_cameras_alone(guarded, path):
    for camera in ("gate", ODD):
        write(guarded, camera, zones=(SQUARE,))

    def status(camera, role):
        client = guarded.client if role is None else getattr(guarded, role)
        return client.get(path, params={"name": camera}).status_code

    assert status("gate", "viewer") == status("gate", "admin") == status(ODD, "admin") == 200
    assert status(ODD, "viewer") == status("none", "viewer") == 404
    assert status("gate", None) in (303, 401)
    live = guarded.viewer.get("/live").text
    assert re.findall('href="/live/camera[?]name=([^"]*)"', live) == ["gate"]


def test_a_file_that_does_not_decode_is_not_sent(console):
    file = write(console, "gate")
    file.write_bytes(b"<script>")
    answer = console.client.get("/live/camera/picture?name=gate")
    assert (answer.status_code >= 400, b"<script>" in answer.content) == (True, False)
    file.unlink()
    assert console.client.get("/live/camera/picture?name=gate").status_code >= 400
