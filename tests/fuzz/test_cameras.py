"""A pipeline refuses odd frames, boxes and settings where they come in, and goes on as before."""

import json
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.helpers.fake_camera import BOX, START, check_sums, person_frame
from tests.helpers.fuzzing import (
    SECONDS,
    as_json,
    damaged_bytes,
    damaged_json,
    examples,
    fuzz,
    mostly,
    refused_well,
    texts,
)
from tests.helpers.onvif_device import MATCH, OnvifDevice, onvif_device
from upperson_camera import (
    BoxesFile,
    CaptureRules,
    Pipeline,
    PipelineSettings,
    Source,
    open_detector,
    parse_source,
)
from upperson_camera.config import CameraEntry, read_cameras
from upperson_camera.crop_folder import remove_unfinished
from upperson_camera.onvif import Answer, ask_cameras, device_at, read_answer
from upperson_camera.regions import Regions
from upperson_camera.source import Logins, without_secrets
from upperson_rt.errors import UppersonError
from upperson_rt.gallery import Gallery
from upperson_rt.ingest.boxes import QualityRules, clean_boxes


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, encoder):
    place = tmp_path_factory.mktemp("fuzz") / "gallery"
    with Gallery.open(place, encoder.fingerprint, encoder.embed_dim, create=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def running(encoder, gallery):
    """A pipeline with a camera whose detector finds one person, and a number for each call."""
    with Pipeline(encoder, gallery, every_s=0, min_views=1, max_delay_s=0) as pipeline:
        pipeline.add_camera("gate", detector=lambda frame: [BOX])
        yield pipeline, count(1)
        assert pipeline.drain()
        stats = pipeline.stats().cameras["gate"]
        assert (stats.state, stats.error) == ("running", None)
        assert stats.committed > 0
    check_sums(pipeline.stats())


@fuzz(
    camera=mostly("gate"),
    frame=mostly(person_frame(), person_frame()[:, :, 0], np.zeros((0, 0, 3), np.uint8)),
    boxes=mostly(None, [BOX], [[*BOX, 0.5]], []), time=mostly(None, START),
    tracks=mostly(None, ["a"]),
)  # fmt: skip
@examples(
    {"camera": "gate", "frame": person_frame(), "boxes": [BOX], "time": None, "tracks": None},
    {"time": 10**400}, {"boxes": [[10**400] * 4]}, {"boxes": [[*BOX, -np.inf]], "tracks": ["a"]},
    {"boxes": [[np.nan] * 4]}, {"boxes": "abcd"}, {"boxes": 5, "tracks": 5},
    {"tracks": ["\udcff"]}, {"camera": ["gate"]}, {"frame": None},
)  # fmt: skip
def test_frames(running, camera, frame, boxes, time, tracks):
    pipeline, calls = running
    refused_well(pipeline.submit, camera, frame, boxes, time, tracks=tracks)
    assert pipeline.submit("gate", person_frame(), [BOX], START + next(calls))
    if SECONDS:  # Takes its time; otherwise the fixture looks at the end.
        assert pipeline.drain()


@fuzz(
    name=mostly("hall", ""), source=mostly(None, "0", Source(address="0", kind="device")),
    detector=mostly(None, lambda frame: []), drop=mostly(None, "oldest", "block"),
    start_time=mostly(None, START),
)  # fmt: skip
@examples(
    {"name": "hall", "source": None, "detector": None, "drop": None, "start_time": None},
    {"name": "\udcff"}, {"name": "a\0b"}, {"name": ["gate"]}, {"detector": 5},
    {"source": 5, "detector": 5, "drop": 5, "start_time": "x"}, {"drop": np.zeros((0, 4))},
)  # fmt: skip
def test_cameras(encoder, gallery, name, source, detector, drop, start_time):
    pipeline = Pipeline(encoder, gallery)
    refused_well(pipeline.add_camera, name, source, detector, drop=drop, start_time=start_time)
    refused_well(pipeline.wait, 0)
    pipeline.stop()


settings_fields = st.dictionaries(
    st.sampled_from(list(PipelineSettings.__dataclass_fields__)),
    mostly(1, 0.5, "oldest"),
    max_size=3,
)


@fuzz(fields=settings_fields, timeout=mostly(0, None))
@examples(
    {"fields": {}, "timeout": 0},
    {"fields": {"every_s": "x"}}, {"fields": {"batch_size": 2.5, "quality": 5}},
    {"fields": {"opener": 5}, "timeout": "x"}, {"fields": {"save_crops": np.zeros((0, 4))}},
    {"timeout": float("nan")},
)  # fmt: skip
def test_settings(encoder, gallery, fields, timeout):
    pipeline = refused_well(Pipeline, encoder, gallery, **fields)
    if isinstance(pipeline, Pipeline) and timeout is not None:
        refused_well(pipeline.wait, 0 if isinstance(timeout, float | int) else timeout)
        refused_well(pipeline.drain, timeout)
        pipeline.stop()
    for kind in (QualityRules, CaptureRules):
        refused_well(kind, **dict(zip(kind.__dataclass_fields__, fields.values(), strict=False)))


ENTRY = {
    "source": "0", "zones": [[[0, 0], [1, 0], [1, 1]]], "every_s": 1.0, "drop": "oldest",
    "detector": "hog", "start_time": "2026-11-25T08:00", "allow_hosts": ["cam"], "border": "drop",
}  # fmt: skip


@fuzz(data=st.data())
def test_files_of_cameras(data):
    document = data.draw(damaged_json({"cameras": {"gate": ENTRY, "hall": ENTRY}}))
    found = refused_well(read_cameras, as_json(document).encode(), Path("cameras.yaml"))
    if isinstance(found, dict):
        assert all(isinstance(entry, CameraEntry) for entry in found.values())
    original = json.dumps({"cameras": {"gate": ENTRY}}).encode()
    refused_well(read_cameras, data.draw(damaged_bytes([original])), Path("cameras.yaml"))


@fuzz(
    zones=mostly([], [[(0, 0), (1, 0), (1, 1)]]),
    corners=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=9),
)
def test_zones(zones, corners):
    refused_well(Regions, zones=zones)
    found = refused_well(Regions, zones=[corners], masks=[corners])
    if isinstance(found, Regions):
        boxes = clean_boxes([[10, 10, 60, 90], [0, 0, 1, 1]], 100, 100)
        assert len(found.in_zone(boxes, 100, 100)) == 2
        found.without_masked(boxes, 100, 100)


ADDRESSES = [
    "rtsp://user:pw@host/stream", "http://[::1", "file:///etc/passwd", "/dev/video0", "a ! b",
    "rtsp://\udcff", "://", "0" * 400, "9" * 5000, "\0", "x" * 5000, "http://h/?token=\x1b[2J",
]  # fmt: skip


@fuzz(address=st.one_of(st.sampled_from(ADDRESSES), mostly("film.avi")))
@examples(
    {"address": "x" * 300_000},  # Took hours.
    {"address": "a=b" * 100_000}, {"address": "pass=" * 50_000},
    {"address": "://a:" * 50_000 + "@"}, {"address": "http://admin:12/pw@host"},
)  # fmt: skip
def test_addresses(address):
    found = refused_well(parse_source, address)
    if isinstance(found, Source):
        assert "pw" not in found.shown.split("host")[0]
        assert isinstance(found.default_name, str)
    if isinstance(address, str):
        assert without_secrets(without_secrets(address)) == without_secrets(address)


BOXES = {"frames": [[{"box": [1, 2, 30, 40], "person": 1}], [], [{"box": [5, 5, 9, 9]}]]}


@fuzz(document=damaged_json(BOXES))
@examples(
    {"document": {"frames": {"0": 5}}},
    {"document": {"frames": [["ab"]]}}, {"document": {"frames": [[{"box": "abcd"}]]}},
)  # fmt: skip
def test_files_of_boxes(written, document):
    found = refused_well(BoxesFile, written("boxes.json", document))
    if isinstance(found, BoxesFile):
        for index in range(3):
            assert isinstance(found.boxes_at(index), list)


@fuzz(content=damaged_bytes([json.dumps(BOXES).encode()]), name=st.one_of(texts, mostly("hog")))
def test_detectors(tmp_path_factory, monkeypatch, content, name):
    monkeypatch.chdir(tmp_path_factory.mktemp("detectors"))
    for file in ("a.json", "a.onnx", "a.xml"):
        Path(file).write_bytes(content)
        refused_well(open_detector, file)
    if not isinstance(name, str) or name not in ("auto", "hog", "nanodet", "ssdlite"):
        refused_well(open_detector, name)


NOTE = {"cameras": ["gate"], "since": START, "until": START + 1, "pictures": ["gate/1.jpg"]}


@fuzz(note=st.one_of(damaged_json(NOTE), st.just(NOTE)))
@examples(
    {"note": {"cameras": ["gate"]}},
    {"note": []}, {"note": NOTE | {"pictures": ["../../outside.jpg"]}},
    {"note": NOTE | {"pictures": [5]}}, {"note": NOTE | {"until": 1e300}},
)  # fmt: skip
def test_notes_of_killed_processes(gallery, tmp_path_factory, note):
    folder = tmp_path_factory.mktemp("notes") / "a" / "b"
    (folder / "gate").mkdir(parents=True)
    (folder.parent.parent / "outside.jpg").touch()
    (folder / ".unfinished-1.json").write_bytes(as_json(note).encode("utf-8", "surrogatepass"))
    done = refused_well(remove_unfinished, gallery, folder)
    assert done is None or isinstance(done, UppersonError)
    assert (folder.parent.parent / "outside.jpg").exists()


QUESTION = "urn:uuid:1"
MATCHES = [
    MATCH.format(relates_to=QUESTION, name=name, addresses=addresses).encode()
    for name, addresses in (("Gate", "http://10.0.0.5/x"), ("%ff", "http://[::1 https://10.0.0.5"))
]


@fuzz(content=damaged_bytes(MATCHES))
def test_answers_to_a_search(content):
    found = read_answer(content, "10.0.0.5", [QUESTION])
    assert isinstance(found, Answer | None)
    if found is not None and found.address is not None:
        assert "://10.0.0.5" in found.address


ONVIF = OnvifDevice(streams={"main": "rtsp://127.0.0.1/main"})
NAMES = ("GetSystemDateAndTime", "GetServices", "GetDeviceInformation", "GetProfiles")
NAMES += ("GetStreamUri",)


@pytest.fixture(scope="module")
def device():
    with onvif_device(streams=ONVIF.streams) as running:
        yield running


@fuzz(name=st.sampled_from(NAMES), content=damaged_bytes([ONVIF.envelope(n) for n in NAMES]))
def test_answers_of_a_device(device, name, content):
    answer = b"HTTP/1.0 200 OK\r\n\r\n" + content
    device.answer = lambda asked: answer if asked == name else None
    (camera,) = ask_cameras([device_at(device.address)], Logins())
    assert (camera.problem is None) == bool(camera.streams)
    for stream in camera.streams:
        assert parse_source(stream.address).kind == "network"
    device.answer = lambda asked: None
    (camera,) = ask_cameras([device_at(device.address)], Logins())
    assert camera.problem is None


@fuzz(content=damaged_bytes([b'machine 10.0.0.5 login a password "b c"\ndefault login d\n']))
def test_files_of_logins(written, content):
    path = written("netrc", content)
    path.chmod(0o600)
    found = refused_well(Logins.read, path)
    if isinstance(found, Logins):
        assert refused_well(found.given_to, parse_source("rtsp://10.0.0.5/x")).shown
