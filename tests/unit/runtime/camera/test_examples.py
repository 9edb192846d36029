"""The programs of docs/examples and the Python of docs/how-to/cameras.md run."""

import re
import runpy
import sys
import threading
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest

import upperson_rt
from tests.helpers.command_line import ROOT
from tests.helpers.fake_camera import person_frame, wait_for
from tests.helpers.fake_cuda import FakeDriver
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.gallery import Gallery
from upperson_synthetic.video import VideoSpec, write_video

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    make_toy_bundle(folder / "bundle")
    write_video(folder / "street.avi", VideoSpec(people=3, seconds=4, fps=2, seed=5))
    return folder


@pytest.fixture
def work(original, tmp_path, monkeypatch):
    for name in ("bundle", "street.avi", "street.json"):
        (tmp_path / name).symlink_to(original / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_example(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_page_runs(work, capsys):
    page = (ROOT / "docs/how-to/cameras.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"block {number}", "exec"), names)
    assert "street" in capsys.readouterr().out
    with Gallery.open("gallery") as gallery:
        assert set(gallery.cameras()) == {"street", "hall"}


def test_an_opencv_loop(work, monkeypatch, capsys):
    run_example(monkeypatch, "opencv_loop.py", "bundle", "gallery", "street.avi", "red coat")
    lines = capsys.readouterr().out.splitlines()
    with Gallery.open("gallery") as gallery:
        rows = gallery.count()
    assert re.fullmatch(rf"\d+ tracks, {rows} pictures added", lines[0])
    assert lines[1].startswith("frames dropped {")
    assert len(lines) == 2 + min(3, rows) > 2


@pytest.mark.timeout(120)  # HOG looks at two frames, and a machine may be busy.
def test_a_gstreamer_source(work, monkeypatch, capsys):
    """OpenCV here has no GStreamer: what would be opened is looked at, the rest is real."""
    opened, silent = [], threading.Event()

    def capture(address, backend):
        """Return a stream of two frames that then gives nothing until the program ends."""
        opened.append((address, backend))
        frames = [(True, person_frame())] * 2
        return SimpleNamespace(
            isOpened=lambda: True,
            read=lambda: frames.pop() if frames else (silent.wait() and False, None),
            get=lambda number: 0.0,  # As of most streams: unknown.
            release=lambda: None,
        )

    def wait(pipeline):
        wait_for(lambda: pipeline.stats().cameras["gate"].frames_read == 2)
        assert pipeline.drain()
        raise KeyboardInterrupt

    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: True)
    monkeypatch.setattr(cv2, "VideoCapture", capture)
    monkeypatch.setattr(upperson_rt.Pipeline, "wait", wait)
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    address = "rtsp://10.0.0.5/stream"
    run_example(monkeypatch, "gstreamer_source.py", "bundle", "gallery", address, "hog")
    silent.set()
    ((elements, backend),) = opened
    assert elements.startswith(f"rtspsrc location={address} ")
    assert backend == cv2.CAP_GSTREAMER
    assert re.fullmatch(r"\d+ people added, \d+ in all\n", capsys.readouterr().out)


class Chain:
    """A list as pyds has it: an element with `data` and the `next` one."""

    def __init__(self, *items):
        self.data, self._rest = items[0], items[1:]

    @property
    def next(self):
        if not self._rest:
            raise StopIteration
        return Chain(*self._rest)


@pytest.fixture
def deepstream(monkeypatch):
    """Stand in for pyds and gi with the few names that the probe uses."""
    frame = person_frame()
    surface = np.dstack([frame[:, :, ::-1], np.full(frame.shape[:2], 255, np.uint8)])
    same = SimpleNamespace(cast=lambda value: value)
    pyds = ModuleType("pyds")
    pyds.NvDsFrameMeta = pyds.NvDsObjectMeta = same
    pyds.get_nvds_buf_surface = lambda buffer, batch_id: surface
    pyds.unmapped = []
    pyds.unmap_nvds_buf_surface = lambda buffer, batch_id: pyds.unmapped.append(batch_id)
    repository = ModuleType("gi.repository")
    results = SimpleNamespace(OK="ok", REMOVE="remove")
    repository.Gst = SimpleNamespace(PadProbeReturn=results)
    gi = ModuleType("gi")
    gi.repository = repository
    for name, module in {"pyds": pyds, "gi": gi, "gi.repository": repository}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return pyds


def detected(number, class_id=0):
    box = SimpleNamespace(left=100.0, top=40.0, width=60.0, height=180.0)
    return SimpleNamespace(object_id=number, class_id=class_id, rect_params=box)


@pytest.mark.parametrize("integrated", [True, False])
def test_a_deepstream_probe(work, deepstream, monkeypatch, capsys, integrated):
    FakeDriver(integrated=integrated).install(monkeypatch)
    names = runpy.run_path(str(EXAMPLES / "deepstream_handover.py"))
    people = Chain(detected(7), detected(8, class_id=2), detected(names["UNTRACKED"]))
    batches = [
        SimpleNamespace(
            frame_meta_list=Chain(
                SimpleNamespace(source_id=3, batch_id=1, ntp_timestamp=ntp, obj_meta_list=people)
            )
        )
        for ntp in (1_800_000_000 * 10**9, 1_800_000_001 * 10**9, 0)
    ]
    deepstream.gst_buffer_get_nvds_batch_meta = lambda buffer: batches[buffer]
    encoder = upperson_rt.open("bundle")
    with Gallery.open("gallery", encoder.fingerprint, encoder.embed_dim, create=True) as gallery:
        with upperson_rt.Pipeline(encoder, gallery, every_s=0) as pipeline:
            pipeline.add_camera("gate")
            probe = names["hand_over"](pipeline, {3: "gate"})
            for number in range(3):
                info = SimpleNamespace(get_buffer=lambda number=number: number)
                assert probe(None, info, 0) == "ok"
                assert pipeline.drain()
        items = list(gallery.items())
        assert {item.track for item in items} == {f"gate/{pipeline.run_name}-7"}
        assert {item.box for item in items} == {(100, 40, 160, 220)}
        assert items[0].time in (1_800_000_000, 1_800_000_001)
        red = gallery.search(encoder.encode_texts(["red"]), 1)[0][0]
        assert red.score > 0.5, "RGBA was taken for what it is"
    assert deepstream.unmapped == ([1, 1, 1] if integrated else [])
    assert probe(None, info, 0) == "remove"
    assert "the gallery gets nothing more: " in capsys.readouterr().err
