"""HOG, boxes from a file, detectors of one's own, and how cameras share one."""

import importlib
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.helpers.fake_camera import Gate, wait_for
from tests.helpers.refused import refused
from upperson_camera import BoxesFile, HogDetector, open_detector
from upperson_rt.errors import InputError, UsageError
from upperson_rt.ingest.detector import SharedDetector

FRAME = np.zeros((8, 8, 3), np.uint8)


OWN = """
makes_a_list = list
def fails(): raise ValueError("no camera")
def ends(): raise SystemExit(0)
def interrupts(): raise KeyboardInterrupt
def talks(): raise ValueError("x" * 10**7)
def is_unspeakable(): raise Unspeakable
class Unspeakable(Exception):
    def __str__(self): raise KeyboardInterrupt
class All:
    def make(): return lambda frame: [(1, 2, 3, 4)]
"""


@pytest.mark.parametrize(
    ("name", "options", "error", "code"),
    [
        ("yolo", {}, InputError, "unknown_detector"),
        ("hog", {"layout": "yolox"}, UsageError, "detector_option_refused"),
        ("hog", {"person": "person"}, UsageError, "detector_option_refused"),
        ("a.json", {"min_score": 0.5}, UsageError, "detector_option_refused"),
        *(
            (name, {}, InputError, "detector_not_imported")
            for name in (
                *("none_such.people:make", "own_people:none"),
                *("interrupts_at_once:make", "ends_at_once:make"),
            )
        ),
        *(
            (f"own_people:{name}", {}, InputError, "detector_failed")
            for name in ("fails", "ends", "interrupts", "is_unspeakable", "talks")
        ),
        ("own_people:makes_a_list", {}, InputError, "detector_not_callable"),
        ("own_people:makes_a_list.x", {}, InputError, "detector_not_imported"),
        ("x" * 70_000, {}, InputError, "unknown_detector"),
        ("x" * 70_000, {"layout": "yolox"}, UsageError, "detector_option_refused"),
        ("x" * 70_000 + ".onnx", {}, InputError, None),
        ("x" * 300 + ".json", {}, InputError, None),
    ],
)
def test_what_is_no_detector_is_refused_in_a_thousand_characters(
    tmp_path, monkeypatch, name, options, error, code
):
    (tmp_path / "own_people.py").write_text(OWN)
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit(0)")
    (tmp_path / "interrupts_at_once.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error) if code is None else refused(code, error) as raised:
        open_detector(name, **options)
    assert len(str(raised.value)) < 1100
    assert open_detector("own_people:All.make")(FRAME) == [(1, 2, 3, 4)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_meanwhile_is_no_fault_of_a_detector(tmp_path, monkeypatch, number):
    class Stopped(KeyboardInterrupt):
        pass

    def stop(number, frame):
        raise Stopped

    lines = ["import signal", "def waits():", f"    signal.raise_signal({int(number)})"]
    (tmp_path / f"patient_{number.name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stopped):
            open_detector(f"patient_{number.name}:waits")
        assert signal.getsignal(number) is stop
        with refused("detector_not_imported", InputError):
            open_detector("impatient:waits")
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


class Batched:
    """Gives for each frame its only value, and notes how many came at once."""

    def __init__(self, gate, max_batch=8):
        self.gate, self.batches = gate, []
        self._max_batch = max_batch

    @property
    def max_batch(self):
        if isinstance(self._max_batch, BaseException):
            raise self._max_batch
        return self._max_batch

    def __call__(self, frame):
        return self.detect_many([frame])[0]

    def detect_many(self, frames):
        self.batches.append(len(frames))
        self.gate.hold()
        if any(frame.max() == 99 for frame in frames):
            raise ValueError("99 is no picture")
        return [int(frame.max()) for frame in frames]


def test_frames_that_wait_for_a_shared_detector_go_together_and_fail_together():
    with Gate() as gate, ThreadPoolExecutor(9) as pool:
        detector = Batched(gate, max_batch=3)
        shared = SharedDetector(detector)
        first = pool.submit(shared.detect, FRAME)
        wait_for(lambda: gate.entered == 1)
        others = []
        for waiting, number in enumerate([1, 2, 3, 4, 99], 1):
            others.append(pool.submit(shared.detect, FRAME + number))
            wait_for(lambda waiting=waiting: len(shared._waiting) == waiting)
        gate.open()
        assert [job.result() for job in (first, *others[:3])] == [0, 1, 2, 3]
        for job in others[3:]:
            with pytest.raises(ValueError, match="99 is no picture"):
                job.result()
        assert detector.batches == [1, 3, 2]
        assert shared.detect(FRAME + 7) == 7


@pytest.mark.parametrize(
    "most", [0, -1, -(10**400), 2.5, float("nan"), "8", None, [], SystemExit(1), ValueError("?")]
)
def test_a_number_of_frames_that_is_none_is_refused_and_never_waited_for(
    tmp_path, monkeypatch, most
):
    detector = Batched(Gate(), most)
    with refused("max_batch_malformed", InputError):
        SharedDetector(detector)
    (tmp_path / "odd_batches.py").write_text("made = []\ndef make():\n    return made[0]")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_batches", raising=False)
    importlib.import_module("odd_batches").made.append(detector)
    with refused("max_batch_malformed", InputError):
        open_detector("odd_batches:make")


@pytest.mark.parametrize("most", [True, np.int64(3), 10**400])
def test_any_whole_number_of_frames_will_do(most):
    with Gate() as gate:
        gate.open()
        assert SharedDetector(Batched(gate, most)).detect(FRAME) == 0


def test_a_plain_detector_is_called_by_one_camera_at_a_time():
    inside, most = [], []

    def detect(frame):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0)  # Others may run.
        inside.pop()
        return int(frame.max())

    shared = SharedDetector(detect)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(shared.detect, [FRAME + number for number in range(50)]))
    assert found == list(range(50))
    assert max(most) == 1


def test_hog_boxes_are_scaled_back_shrunk_and_not_twice(monkeypatch):
    detector = HogDetector(width_px=320)
    seen = []

    class Hog:
        def detectMultiScale(self, image, **options):  # noqa: N802
            seen.append(image.shape)
            found = np.array([[10, 20, 64, 128], [12, 20, 64, 128], [200, 20, 64, 128]])
            return found, np.array([1.5, 0.9, 0.1])

    for size in ((40, 40), (128, 64), (720, 1280)):
        assert detector(np.zeros((*size, 3), np.uint8)).shape == (0, 5)
    monkeypatch.setattr(detector, "_hog", Hog())
    boxes = detector(np.zeros((480, 640, 3), np.uint8))
    assert seen == [(240, 320, 3)]
    assert len(boxes) == 1, "one overlaps a better one, one is below the least score"
    x0, y0, x1, y1, score = boxes[0]
    assert score == pytest.approx(1.5)
    assert 20 < x0 < x1 < 2 * 74
    assert 40 < y0 < y1 < 2 * 148


def test_boxes_from_a_file_go_by_the_number_of_the_frame(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"frames": [[], [{"box": [1, 2, 3, 4], "person": 0}]]}))
    boxes = open_detector(str(path))
    assert isinstance(boxes, BoxesFile)
    assert [boxes.boxes_at(index) for index in range(3)] == [[], [[1, 2, 3, 4]], []]
    with refused("boxes_of_a_video", InputError):
        boxes(np.zeros((8, 8, 3), np.uint8))
    for text in ("[]", "{}", "junk", '{"frames": [[{}]]}'):
        path.write_text(text)
        with refused("boxes_unreadable", InputError, path=path):
            BoxesFile(path)
