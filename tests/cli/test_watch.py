"""``upperson-rt watch`` as users run it: from a video to an answer, and how it ends."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.command_line import environment, start_program
from tests.helpers.small_servers import http_server, no_server, rtsp_server
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.cli import app
from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Gallery
from upperson_rt.gallery.sqlite import SqliteGallery
from upperson_synthetic.video import VideoSpec, write_video

START = 1_800_000_000
FPS = 8


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with ./bundle and ./street.avi, and what is true about the video."""
    folder = tmp_path_factory.mktemp("watch")
    make_toy_bundle(folder / "bundle")
    spec = VideoSpec(people=6, seconds=12, fps=FPS, seed=5)
    return folder, write_video(folder / "street.avi", spec)


@pytest.fixture
def truth(original):
    return original[1]


@pytest.fixture
def work(original, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(original[0], tmp_path / "work"))
    for name in ("UPPERSON_BUNDLE", "UPPERSON_GALLERY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "work"


WATCH = ("watch", "street.avi", "--detector", "street.json", "--threads", "1")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def people_of(hit, truth):
    found = truth["frames"][hit["attributes"]["frame"]]
    return {entry["person"] for entry in found if entry["box"] == list(hit["box"])}


def test_everybody_is_one_track_and_is_found_by_sentence_and_time(work, truth, demo_folder):
    bundle = ("-b", demo_folder / "bundle")
    done = run_json(*WATCH, *bundle, "--every", 1, "--start", START, "--camera", "gate")
    camera = done["cameras"]["gate"]
    assert (camera["state"], camera["tracks"]) == ("ended", 6)
    assert camera["committed"] == camera["accepted"] == done["items"] > 12
    first = 0
    for person in truth["people"]:
        period = (
            *("--since", START + person["first_frame"] / FPS),
            *("--until", START + (person["last_frame"] + 1) / FPS),
        )
        ranks = []
        for sentence in person["captions"]:
            found = run_json(
                "query",
                sentence,
                *bundle,
                "--camera",
                "gate",
                *period,
                "--by-track",
                "--threads",
                1,
            )
            shown = [person["person"] in people_of(hit, truth) for hit in found["hits"]]
            assert len(shown) >= 2, "others are in view, too"
            ranks.append(shown.index(True) + 1)
        assert min(ranks) <= 2, person["captions"]
        first += min(ranks) == 1
    # The quick demo's model is trained for seconds only, and still tells most of them apart.
    assert first >= 4

    asked = ("query", truth["people"][0]["captions"][0], *bundle)
    result = run(*asked, "--sheet", "found.png")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()[1:]
    assert all((work / line.split()[-1]).is_file() for line in lines), "paths that can be opened"
    files = [Path(hit["file"]) for hit in run_json(*asked)["hits"]]
    assert [str(file.relative_to(work)) for file in files] == [line.split()[-1] for line in lines]
    assert (work / "found.png").read_bytes().startswith(b"\x89PNG")
    nobody = run_json("query", "a woman", *bundle, "--until", START)
    assert nobody["hits"] == []


def test_the_summary_for_people_counts_everything(work):
    result = run(*WATCH, "--vectors-only", "--every", 3)
    assert result.exit_code == 0, result.stderr
    added, frames, people, latency = result.stdout.splitlines()
    rows = int(re.match(r"added (\d+) pictures of 6 tracks in ", added)[1])
    assert frames == "frames: 96 read, 96 searched, dropped none"
    reasons = r"(\d+) (?:boxes|accepted|no_track|not_best|too_soon)"
    boxes, accepted, *left_out = map(int, re.findall(reasons, people))
    assert boxes == accepted + sum(left_out)
    assert accepted == rows
    assert re.match(r"from frame to gallery: [\d.]+ s median", latency)
    assert "the file begins at" in result.stderr
    with Gallery.open("gallery") as gallery:
        assert gallery.count(Filter(camera="street")) == rows
        assert not gallery.crops_dir.exists()
        assert all(item.crop is None for item in gallery.items())


def test_hog_looks_and_warns(work):
    done = run("watch", "street.avi", "--json", "--threads", 1, "--duration", 2)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["cameras"]["street"]["frames_processed"] > 0
    assert "hog misses many people" in done.stderr


def start_watch(work, *options):
    options = (*WATCH, "--realtime", "--every", 0.2, "--batch-size", 2, *options)
    return start_program("upperson-rt", *options, cwd=work, output=work / "output")


def wait_for_rows(work, number):
    """Wait as another process would: by looking into the gallery."""
    while True:
        with suppress(InputError), Gallery.open(work / "gallery") as gallery:  # May not be there.
            if gallery.count() >= number:
                return {item.key for item in gallery.items()}
        time.sleep(0.01)


def check_gallery(work):
    with Gallery.open(work / "gallery") as gallery:
        assert gallery.verify() == []
        keys = {item.key for item in gallery.items()}
        crops = {item.crop for item in gallery.items()}
        pictures = {
            str(path.relative_to(gallery.crops_dir))
            for path in gallery.crops_dir.rglob("*")
            if path.is_file()
        }
    return keys, crops, pictures


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_commits_all_that_was_accepted(work, number):
    process = start_watch(work, "--json")
    try:
        seen = wait_for_rows(work, 4)
        process.send_signal(number)
        assert process.wait() == 0, (work / "output.err").read_text()
    finally:
        process.kill()
    done = json.loads((work / "output").read_text())
    camera = done["cameras"]["street"]
    assert camera["state"] == "stopped"
    assert 0 < camera["frames_read"] < 96
    assert camera["frames_waiting"] == camera["crops_waiting"] == 0
    keys, crops, pictures = check_gallery(work)
    assert camera["accepted"] == camera["committed"] == done["items"] == len(keys)
    assert seen <= keys
    assert crops == pictures


HANGING = """
import threading
from functools import partial
import upperson_camera
from upperson_camera import BoxesFile
from upperson_rt.cli import main
from upperson_rt.gallery.sqlite import SqliteGallery

def hang(*arguments):
    print("hangs", file=sys.stderr, flush=True)
    threading.Event().wait()

if sys.argv.pop(1) == "detector":
    BoxesFile.boxes_at = hang
else:
    SqliteGallery.add = hang
settings = partial(upperson_camera.PipelineSettings, end_within_s=0.2)
upperson_camera.PipelineSettings = settings
main()
"""


@pytest.mark.parametrize("where", ["detector", "gallery"])
def test_what_hangs_is_left_behind_and_named(work, where):
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; {HANGING}", where, *WATCH, "--json", "--every", "0"],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.stderr.readline() != "hangs\n":
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate()
    assert process.returncode == 3, errors
    assert "committing what was accepted; Ctrl-C or SIGTERM ends it at once\n" in errors
    done = json.loads(output)
    camera = done["cameras"]["street"]
    if where == "detector":
        said = "1 of 1 camera was given up: street: the detector did not return within 0.2 s"
        assert camera["failures"] == {"detector_stuck": 1}
        assert camera["frames_dropped"]["detector_stuck"] == 1
    else:
        said = "the gallery did not return within 0.2 s of the end"
        assert done["failures"] == {"gallery_stuck": 1}
        assert camera["accepted"] == camera["crops_dropped"]["failed"] > 0
    assert errors.splitlines()[-1].startswith(f"error: {said}")


def test_a_gallery_that_fails_ends_it_and_the_counts_are_told(work, monkeypatch):
    def fail(*arguments):
        raise InputError("the disk is full")

    monkeypatch.setattr(SqliteGallery, "add", fail)
    result = run(*WATCH)
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "the disk is full" in result.stderr
    assert result.stdout.startswith("added 0 pictures of ")
    assert "gallery 'gallery' failed" in result.stdout
    result = run(*WATCH, "--json")
    assert result.exit_code == 3
    told = json.loads(result.stdout)
    assert told["items"] is None
    camera = told["cameras"]["street"]
    assert camera["committed"] == 0
    assert camera["accepted"] == camera["crops_dropped"]["failed"] > 0


def test_a_killed_process_loses_nothing_committed_and_leaves_nothing_for_good(work):
    process = start_watch(work)
    try:
        seen = wait_for_rows(work, 4)
    finally:
        process.kill()
    process.wait()
    keys, crops, pictures = check_gallery(work)
    assert seen <= keys
    assert crops <= pictures
    assert run(*WATCH, "--every", 3).exit_code == 0
    again, crops, pictures = check_gallery(work)
    assert keys <= again
    assert crops == pictures


def test_logs_are_json_lines_and_metrics_go_where_asked(work):
    process = start_watch(
        work, "--log-json", "--metrics-port", 0, "--metrics-file", work / "upperson.prom"
    )
    try:
        wait_for_rows(work, 2)
        url = re.search(r"metrics: (http://127\.0\.0\.1:\d+/metrics)\"", read_log(work))[1]
        with urllib.request.urlopen(url) as answer:
            assert 'upperson_committed_total{camera="street"}' in answer.read().decode()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, read_log(work)
    finally:
        process.kill()
    keys, _, _ = check_gallery(work)
    metrics = (work / "upperson.prom").read_text()
    assert f'upperson_committed_total{{camera="street"}} {float(len(keys))}' in metrics

    (work / "text.avi").write_text("no video")
    result = run("watch", "text.avi", "--log-json", "--detector", "street.json", "--start", START)
    events = [json.loads(line) for line in result.stderr.splitlines()]
    (logged,) = [event for event in events if event.get("event") == "failed"]
    assert (logged["level"], logged["camera"]) == ("error", "text")
    assert "cannot open" in logged["message"]
    assert result.exit_code == 3
    assert events[-1]["level"] == "error"
    assert events[-1]["message"].startswith("1 of 1 camera was given up: text: cannot open")
    told = [event["message"] for event in events if event["logger"] == "upperson_rt.cli"]
    assert any(message.startswith("backend: ") for message in told)
    result = run("watch", "street.avi", "street.avi", "--log-json")
    assert json.loads(result.stderr)["message"].startswith("two cameras are called street")
    assert run("watch", "none.avi").stderr.startswith("error: no video none.avi"), "text again"


def test_cameras_that_never_give_a_picture_say_why_and_end_with_3(work):
    with rtsp_server(auth="digest") as rtsp, http_server(404) as http, no_server() as port:
        sources = [
            f"gate=rtsp://anna:secret@127.0.0.1:{rtsp}/stream",
            f"hall=http://127.0.0.1:{http}/video",
            f"door=rtsp://127.0.0.1:{port}/stream",
            "yard=/dev/video987",
        ]
        options = ("--detector", "hog", "--threads", 1, "--log-json")
        process = start_program(
            "upperson-rt", "watch", *sources, *options, cwd=work, output=work / "output"
        )
        reasons = {
            "gate": f"cannot open rtsp://127.0.0.1:{rtsp}/stream: the server answers 401 "
            "Unauthorized: user name and password are wrong",
            "hall": f"cannot open http://127.0.0.1:{http}/video: the server answers 404 Not Found: "
            "it has no such stream: check the path",
            "door": f"cannot open rtsp://127.0.0.1:{port}/stream: 127.0.0.1 port {port} refuses "
            "connections: nothing listens there",
            "yard": "cannot open /dev/video987: there is no such device: plug the camera in, or "
            "name another",
        }
        try:
            while not all(
                f"camera {name}: {why}" in read_log(work) for name, why in reasons.items()
            ):
                assert process.poll() is None, read_log(work)
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 3, read_log(work)
        finally:
            process.kill()
    log = read_log(work).splitlines()
    told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    events = [json.loads(line) for line in log]  # There are no lines of FFmpeg's.
    assert events[-1]["message"] == f"4 of 4 cameras never gave a picture: {told}"
    loud = [event for event in events if event["level"] == "warning"]
    cameras = sorted(event["camera"] for event in loud if "camera" in event)
    assert cameras == ["door", "gate", "hall", "yard"], "once each, however many attempts"
    (hog,) = [event["message"] for event in loud if "camera" not in event]
    assert hog.startswith("hog misses many people")
    assert "secret" not in read_log(work)


def test_without_a_terminal_the_progress_is_told_in_lines(work, monkeypatch):
    module = import_module("upperson_camera.cli.watch")  # The package has the command by this name.
    monkeypatch.setattr(module, "_TELL_S", 0.0)
    monkeypatch.setattr(module, "_REDRAW_S", 0.1)
    result = run(*WATCH, "--vectors-only", "--realtime", "--duration", 1)
    assert result.exit_code == 0, result.stderr
    told = re.findall(r"^\d+ s: (\d+) frames? searched, \d+ tracks?, \d+ pictures? added$",
                      result.stderr, re.MULTILINE)  # fmt: skip
    assert len(told) >= 2
    assert sorted(map(int, told)) == list(map(int, told))
    quiet = run(*WATCH, "--vectors-only", "--duration", 0.5, "--log-json")
    assert "frames searched" not in quiet.stderr


def read_log(work):
    return (work / "output.err").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("none.mp4",), 3, "no video none.mp4: expected a file"),
        (("rtps://cam/x",), 2, "rtps://cam/x cannot be read: an address begins with rtsp, rtsps,"),
        (("file:///a.mp4",), 2, "file:///a.mp4: name a file by its path"),
        (("rtsp:///x",), 2, "rtsp:///x has no host or port that can be read"),
        (("rtsp://anna:a/b@cam/x",), 2, "an address of rtsp:// has an @ behind its host"),
        (("http://[::1/x",), 2, "such as http://10.0.0.5:8554/path"),
        (("street.avi", "street.avi"), 2, "two cameras are called street"),
        (("street.avi", "a=street.avi", "--camera", "b"), 2, "--camera names one source"),
        (("street.avi", "--drop", "some"), 2, "no drop policy 'some'"),
        (("street.avi", "--tracker", "sort"), 2, "no tracker 'sort': it is one of upperson, "),
        (
            ("street.avi", "--detector", "none.onnx"),
            3,
            "none.onnx: docs/detectors.md names",
        ),
        (("street.avi", "--start", "soon"), 2, "soon"),
        (("street.avi", "--start", "1800000000000"), 3, "not milliseconds"),
        (("street.avi", "-b", "none"), 3, "none is not a bundle"),
        (("street.avi", "--device", "cuda", "--backend", "onnxruntime"), 5, "device 'cuda'"),
        (("0", "--drop", "block"), 2, "only a file can"),
        (("fake ! pipeline",), 5, "has no GStreamer"),
        (("a=rtsps://cam/x", "--insecure", "b"), 2, "--insecure b"),
        (("a=rtsps://cam/x", "--ca", "none.pem"), 3, "none.pem"),
        (("a=rtsps://cam/x", "--ca", "street.json"), 3, "expected PEM"),
    ],
)
def test_errors_are_one_line_and_a_code(work, monkeypatch, arguments, code, message):
    monkeypatch.setattr("cv2.videoio_registry.hasBackend", lambda backend: False)
    detector = () if "--detector" in arguments else ("--detector", "street.json")
    result = run("watch", *arguments, *detector)
    assert result.exit_code == code, result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_tracker_that_is_not_installed_is_told_before_anything_begins(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    result = run(*WATCH, "--tracker", "bytetrack")
    assert result.exit_code == 5
    assert "pip install --no-deps 'trackers>=2.6'" in " ".join(result.stderr.split())
    assert result.stderr.count("error:") == 1
    assert not (work / "gallery").exists()


def test_a_gallery_of_another_model_is_refused(work):
    Gallery.open("gallery", "sha256:" + "a" * 64, 16, create=True).close()
    result = run(*WATCH)
    assert result.exit_code == 6
    assert "another model" in result.stderr
