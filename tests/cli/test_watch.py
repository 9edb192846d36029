"""``upperson-rt watch`` as users run it: from a video to an answer, and how it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from tests.helpers.command_line import environment, start_program
from tests.helpers.fake_camera import LIVE, FakeTime, pictures_of, wait_for
from tests.helpers.invoke import refusal
from tests.helpers.invoke import run_rt as run
from tests.helpers.invoke import run_rt_json as run_json
from tests.helpers.refused import refused
from tests.helpers.remote_gallery import refuse
from tests.helpers.small_servers import http_server, no_server, rtsp_server
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_camera.decoding import find_hwaccel
from upperson_rt import extensions
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
def work(original, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(original[0], tmp_path / "work"))
    for name in ("UPPERSON_BUNDLE", "UPPERSON_GALLERY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "work"


WATCH = ("watch", "street.avi", "--detector", "street.json", "--threads", "1")


def first_json(text):
    """Return the object that a text begins with."""
    return json.JSONDecoder().raw_decode(text)[0]


def read_log(work):
    return (work / "output.err").read_text()


def test_everybody_is_one_track_and_is_found_by_sentence_and_time(work, original, demo_folder):
    bundle, truth = ("-b", demo_folder / "bundle"), original[1]

    def is_of(hit, person):
        boxes = truth["frames"][hit["attributes"]["frame"]]
        return any(one["person"] == person and one["box"] == hit["box"] for one in boxes)

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
            options = (*bundle, "--camera", "gate", *period, "--by-track", "--threads", 1)
            hits = run_json("query", sentence, *options)["hits"]
            shown = [is_of(hit, person["person"]) for hit in hits]
            assert len(shown) >= 2, "others are in view, too"
            ranks.append(shown.index(True) + 1)
        assert min(ranks) <= 2, person["captions"]
        first += min(ranks) == 1
    # The quick demo's model is trained for seconds only, and still tells most of them apart.
    assert first >= 4

    found = run("query", truth["people"][0]["captions"][0], *bundle)
    lines = found.stdout.splitlines()[1:]
    assert all((work / line.split()[-1]).is_file() for line in lines), "paths that can be opened"
    assert run_json("query", "a woman", *bundle, "--until", START)["hits"] == []


def test_the_summary_for_people_counts_everything(work):
    result = run(*WATCH, "--vectors-only", "--every", 3)
    assert result.exit_code == 0, result.stderr
    added, frames, people, latency = result.stdout.splitlines()
    rows = int(re.match(r"added (\d+) pictures in [\d.]+ s; 6 tracks followed; ", added)[1])
    assert frames == "frames: 96 read, 96 searched, dropped none"
    reasons = r"(\d+) (?:boxes|accepted|no_track|not_best|too_soon|still)"
    boxes, accepted, *left_out = map(int, re.findall(reasons, people))
    assert boxes == accepted + sum(left_out)
    assert accepted == rows
    assert re.match(r"from frame to gallery: [\d.]+ s median", latency)
    assert "the file begins at" in result.stderr
    with Gallery.open("gallery") as gallery:
        assert gallery.count(Filter(camera="street")) == rows
        assert not gallery.crops_dir.exists()
        assert all(item.crop is None for item in gallery.items())


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


HANGING = """
import threading
from functools import partial
import upperson_camera
from upperson_camera import BoxesFile, StreamReader
from upperson_rt.cli import main
from upperson_camera import crop_folder as service

def hang(*arguments):
    print("hangs", file=sys.stderr, flush=True)
    threading.Event().wait()

def opener(source, timeout_s):
    return hang() if source.is_live else StreamReader(source, timeout_s)

boxes_at = BoxesFile.boxes_at
BoxesFile.boxes_at = lambda boxes, index: boxes_at(boxes, index) if index < 24 else hang()
service.write_all_atomically = lambda contents, pool: pool.submit(hang).result()
settings = partial(upperson_camera.PipelineSettings, end_within_s=0.2, opener=opener)
upperson_camera.PipelineSettings = settings
main()
"""


def test_what_hangs_is_abandoned_and_named(work):
    options = ("gate=0", "--json", "--every", "0")
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; {HANGING}", *WATCH, *options],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(3):
            while process.stderr.readline() != "hangs\n":
                assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate()
    assert process.returncode == 3, errors
    done = first_json(output)
    camera = done["cameras"]["street"]
    assert (camera["failures"], done["failures"]) == ({"detector_stuck": 1}, {"gallery_stuck": 1})
    assert camera["frames_dropped"]["detector_stuck"] == 1
    assert done["cameras"]["gate"]["failures"] == {"source_stuck": 1}
    assert camera["accepted"] == camera["crops_dropped"]["failed"] > 0
    assert "the gallery did not return within 0.2 s" in errors.splitlines()[-1]
    assert "the detector did not return within 0.2 s" in errors


def test_crops_wait_on_disk_for_a_server_that_is_away_and_the_next_run_sends_them(
    work, monkeypatch
):
    clock = FakeTime()
    clock.sleep = lambda seconds: setattr(clock, "more_s", clock.more_s + 5)
    monkeypatch.setattr("upperson_camera.buffered.time", clock)
    monkeypatch.setattr(SqliteGallery, "is_remote", True)
    watch = (*WATCH, "--vectors-only", "--camera", "gate", "--start", START)
    with monkeypatch.context() as patched:
        patched.setattr(SqliteGallery, "add", lambda *given: refuse())
        result = run(*watch, "--metrics-file", "watch.prom", "--json")
    assert result.exit_code == 5, result.stderr
    counted = first_json(result.stdout)
    camera = counted["cameras"]["gate"]
    waiting = counted["buffered"]
    assert waiting == camera["accepted"] == camera["crops_waiting"] > 0
    assert (camera["committed"], counted["items"]) == (0, None)
    assert sum(camera["crops_dropped"].values()) + waiting == camera["detections"]
    metrics = (work / "watch.prom").read_text()
    assert f'upperson_queue_depth{{camera="",queue="buffer"}} {waiting}.0' in metrics
    (file,) = (work / "buffer").glob("*.sqlite")
    assert str(file.relative_to(work)) in result.stderr.splitlines()[-1]

    done = run_json(*watch)
    assert (done["recovered"], done["buffered"]) == (waiting, 0)
    camera = done["cameras"]["gate"]
    assert camera["committed"] == camera["replaced"] == done["items"] == waiting


def test_watch_starts_while_the_server_is_away(work, monkeypatch):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: extra 'milvus'")
    clock = FakeTime()
    clock.sleep = lambda seconds: setattr(clock, "more_s", clock.more_s + 5)
    monkeypatch.setattr("upperson_camera.buffered.time", clock)
    with no_server() as port:
        gallery = ("--gallery", f"milvus://127.0.0.1:{port}/people")
        result = run(*WATCH, *gallery, "--vectors-only", "--log-json", "--json")
    assert result.exit_code == 5, result.stderr
    counted = first_json(result.stdout)
    assert counted["buffered"] == counted["cameras"]["street"]["accepted"] > 0
    assert (counted["items"], counted["failures"]) == (None, {"gallery_away": 1})
    first = next(json.loads(line) for line in result.stderr.splitlines() if "gallery_away" in line)
    assert (first["event"], first["waiting"]) == ("gallery_away", 0)


def test_a_signal_commits_what_was_accepted_and_metrics_say_the_same(work):
    metrics = ("--metrics-port", 0, "--metrics-file", work / "upperson.prom")
    process = start_watch(work, "--log-json", "--json", *metrics, "--keep", "30d")
    try:
        seen = wait_for_rows(work, 4)
        url = re.search(r"metrics: (http://127\.0\.0\.1:\d+/metrics)\"", read_log(work))[1]
        with urllib.request.urlopen(url) as answer:
            assert 'upperson_committed_total{camera="street"}' in answer.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0, read_log(work)
    finally:
        process.kill()
    done = json.loads((work / "output").read_text())
    camera = done["cameras"]["street"]
    assert camera["state"] == "stopped"
    assert 0 < camera["frames_read"] < 96
    assert camera["frames_waiting"] == camera["crops_waiting"] == 0
    with Gallery.open(work / "gallery") as gallery:
        assert gallery.verify() == []
        keys = {item.key for item in gallery.items()}
        assert pictures_of(gallery) == sorted(gallery.crops_dir / i.crop for i in gallery.items())
    assert camera["accepted"] == camera["committed"] == done["items"] == len(keys)
    assert seen <= keys
    published = (work / "upperson.prom").read_text()
    assert "upperson_pruned_total 0.0" in published
    assert f'upperson_committed_total{{camera="street"}} {float(len(keys))}' in published


def test_logs_are_json_lines(work):
    (work / "text.avi").write_text("no video")
    result = run("watch", "text.avi", "--log-json", "--detector", "street.json", "--start", START)
    events = [json.loads(line) for line in result.stderr.splitlines()]
    (logged,) = [event for event in events if event.get("event") == "failed"]
    assert (logged["level"], logged["camera"]) == ("error", "text")
    assert result.exit_code == 3
    assert events[-1]["level"] == "error"
    assert logged["message"].partition(": ")[2] in events[-1]["message"]
    assert any(event["logger"] == "upperson_rt.cli" for event in events[:-1])
    assert run("watch", "none.avi").stderr.startswith("error: "), "text again"


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
            "gate": "user name and password are wrong", "hall": "it has no such stream",
            "door": "nothing listens there", "yard": "there is no such device",
        }  # fmt: skip

        def all_lost():
            assert process.poll() is None, read_log(work)
            return all(why in read_log(work) for why in reasons.values())

        try:
            wait_for(all_lost)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 3, read_log(work)
        finally:
            process.kill()
    log = read_log(work).splitlines()
    events = [json.loads(line) for line in log]  # There are no lines of FFmpeg's.
    assert all(why in events[-1]["message"] for why in reasons.values())
    loud = [event for event in events if event["level"] == "warning"]
    cameras = sorted(event["camera"] for event in loud if "camera" in event)
    assert cameras == ["door", "gate", "hall", "yard"], "once each, however many attempts"
    assert sum("camera" not in event for event in loud) == 1, "that of hog"
    assert "secret" not in read_log(work)


@pytest.mark.parametrize(("pictures", "silent"), [(3, {"gate": "nothing came in 5 s"}), (4, None)])
def test_a_camera_that_gave_nothing_but_rubbish_gave_no_picture(pictures, silent):
    module = import_module("upperson_camera.cli.watch")
    camera = SimpleNamespace(
        state="stopped", error=None, frames_read=pictures, frames_dropped={"empty": 3}
    )
    stats = SimpleNamespace(seconds=5, cameras={"gate": camera})
    with refused("camera_failed", silent=silent) if silent else nullcontext():
        module._refuse_failed(stats, {"gate": LIVE})


def test_errors_are_one_line_and_a_code(work, monkeypatch):
    monkeypatch.setattr("cv2.videoio_registry.hasBackend", lambda backend: False)
    monkeypatch.setitem(sys.modules, "trackers", None)
    Gallery.open("other", "sha256:" + "a" * 64, 16, create=True).close()
    os.mkfifo("pipe.yaml")
    for arguments, exit_code, code in (
        (("street.avi", "--tracker", "bytetrack"), 5, "extra_missing"),
        (("none.mp4",), 3, "source_not_found"),
        (("file:///a.mp4",), 2, "file_by_address"),
        (("rtsp://anna:a/b@cam/x",), 2, "login_not_escaped"),
        (("street.avi", "street.avi"), 2, "camera_exists"),
        ((), 2, "no_source"),
        (("--config", "cameras.yaml", "--camera", "gate"), 2, "beside_config"),
        (("--config", "pipe.yaml"), 3, "config_unreadable"),
        (("street.avi", "a=street.avi", "--camera", "b"), 2, "camera_name_for_several"),
        (("street.avi", "--drop", "some"), 2, "unknown_policy"),
        (("0", "--drop", "block"), 2, "only_files_wait"),
        (("street.avi", "--hwaccel", "abacus"), 2, "unknown_hwaccel"),
        (("street.avi", "--detector", "none.onnx"), 3, "detector_not_found"),
        (("street.avi", "--start", "soon"), 2, None),
        (("street.avi", "-b", "none"), 3, None),
        (("street.avi", "--device", "cuda", "--backend", "onnxruntime"), 5, None),
        (("fake ! pipeline",), 5, "gstreamer_missing"),
        (("a=rtsps://cam/x", "--insecure", "b"), 2, "camera_unknown"),
        (("a=rtsps://cam/x", "--ca", "street.json"), 3, "ca_unreadable"),
        (("street.avi", "-g", "other"), 6, None),
    ):
        detector = () if "--detector" in arguments else ("--detector", "street.json")
        refusal(run("watch", *arguments, *detector, "--json"), exit_code, code)
        if code == "extra_missing":
            assert not (work / "gallery").exists(), "refused before anything begins"


CAMERA = """
  {name}:
    source: {source}
    detector: street.json
    hwaccel: auto
    start_time: 2026-11-25T08:00:00Z
    zones: {zones}
"""


def write_cameras(path, **cameras):
    text = "cameras:" + "".join(
        CAMERA.format(name=name, source=source, zones=zones)
        for name, (source, zones) in cameras.items()
    )
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def test_a_file_of_cameras_is_followed_while_it_watches(work):
    left = "[[[0, 0], [0.5, 0], [0.5, 1], [0, 1]]]"
    file = work / "cameras.yaml"
    with no_server() as port:
        never = f"rtsp://127.0.0.1:{port}/stream"
        write_cameras(file, gate=("street.avi", "[]"), door=(never, "[]"))
        options = ("--config", file, "--threads", 1, "--every", 0.5, "--json", "--log-json")
        process = start_program("upperson-rt", "watch", *options, cwd=work, output=work / "output")
        try:
            wait_for_rows(work, 4)
            file.write_text("cameras: {door: {source: rtsp://anna:s3cr3t@cam/x}}")

            def log(event):
                assert process.poll() is None, read_log(work)
                lines = [line for line in read_log(work).splitlines() if line.endswith("}")]
                return [one for one in map(json.loads, lines) if one.get("event") == event]

            wait_for(lambda: log("config_refused"))
            assert [one["code"] for one in log("config_refused")] == ["secret_in_config"]
            # Without the camera that never ends, all sources end.
            write_cameras(file, gate=("street.avi", "[]"), hall=("street.avi", left))
            assert process.wait() == 0, read_log(work)
        finally:
            process.kill()
    assert "s3cr3t" not in read_log(work)
    assert f"gate, door: {find_hwaccel('auto')[1]}" in read_log(work)
    assert f"hall: {find_hwaccel('auto')[1]}" in read_log(work)
    done = json.loads((work / "output").read_text())
    cameras = done["cameras"]
    states = {name: camera["state"] for name, camera in cameras.items()}
    assert states == {"gate": "ended", "hall": "ended", "door": "removed"}
    assert cameras["gate"]["frames_read"] == cameras["hall"]["frames_read"] == 96
    with Gallery.open(work / "gallery") as gallery:
        rows = {name: list(gallery.items(Filter(camera=name))) for name in states}
    assert rows["door"] == []
    assert 0 < len(rows["hall"]) == cameras["hall"]["committed"] < len(rows["gate"])
    assert cameras["hall"]["crops_dropped"]["outside_zone"] > 0
    width = VideoSpec().width
    assert all(item.box[0] + item.box[2] <= width for item in rows["hall"])


class Sink:
    """An output that notes what it gets."""

    made: ClassVar = []

    def __init__(self):
        self.rows, self.closed = [], 0
        Sink.made.append(self)

    def committed(self, items, replaced):
        assert not self.closed
        self.rows += items

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("fails", [None, "gallery", "output", "opening"])
def test_outputs_get_the_rows_and_are_closed_also_after_an_error(work, monkeypatch, fails):
    class Broken(Sink):
        def __init__(self):
            super().__init__()
            if fails == "opening":
                self.closed = 1
                raise SystemExit(0)

        def committed(self, *rows):
            raise InputError("the server is away")

    points = {
        name: [SimpleNamespace(value=name, load=lambda kind=kind: kind)]
        for name, kind in (("notes", Sink), ("broken", Broken))
    }
    found = extensions._entry_points
    monkeypatch.setattr(
        extensions, "_entry_points", lambda group: points if group == "outputs" else found(group)
    )
    monkeypatch.setattr(Sink, "made", [])
    if fails == "gallery":
        monkeypatch.setattr(SqliteGallery, "add", Broken.committed)
    broken = ("--output", "broken") if fails in ("output", "opening") else ()
    result = run(*WATCH, "--output", "notes", *broken, "--vectors-only", "--every", 3)
    assert result.exit_code == {None: 0, "opening": 5}.get(fails, 3), result.stderr
    assert [sink.closed for sink in Sink.made] == [1] * (2 if broken else 1)
    rows = Sink.made[0].rows
    assert bool(rows) == (fails in (None, "output"))
    if fails is None:
        with Gallery.open("gallery") as gallery:
            assert {item.key for item in rows} == {item.key for item in gallery.items()}
        assert run(*WATCH, "--output", "none").exit_code == 2


def test_frames_and_clips_are_kept_where_asked_for_and_names_may_have_spaces(work):
    done = run_json("watch", "Parking Nord=street.avi", *WATCH[2:], "--clips", 1)
    camera = done["cameras"]["Parking Nord"]
    assert camera["clips"] == camera["whole_frames"] == camera["committed"] > 0
    kept = list(Path("gallery/clips").rglob("*.*"))
    assert {path.suffix for path in kept} >= {".jpg", ".mkv"}  # The film is MJPEG.
    with Gallery.open("gallery") as gallery:
        assert gallery.cameras() == ["Parking Nord"]


def test_a_camera_of_a_file_has_clips_of_its_own(work):
    Path("cameras.yaml").write_text(
        "cameras:\n"
        "  gate: {source: street.avi, detector: street.json, clip_s: 1}\n"
        "  hall: {source: street.avi, detector: street.json}\n"
    )
    cameras = run_json("watch", "--config", "cameras.yaml", "--threads", 1)["cameras"]
    assert cameras["gate"]["clips"] == cameras["gate"]["committed"] > 0
    assert (cameras["hall"]["clips"], cameras["hall"]["whole_frames"]) == (0, 0)
