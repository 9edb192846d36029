"""ONNX files of every layout: recognized or refused, and read as they were made."""

import itertools
import json

import numpy as np
import pytest

from tests.helpers.detector_heads import COLOUR, HEADS, write_constant, write_detector
from tests.helpers.refused import refused
from upperson_camera.detectors import LAYOUTS, OnnxDetector, onnx_file
from upperson_rt.cli.options import DetectorLayout
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError

NAMES = {"names": "{0: 'person', 1: 'dog', 2: 'cat'}", "stride": "32"}
FRAME_SIZE = 128, 96
# The input is 64 x 96: such a frame is halved there, or keeps its width.
PLACES = {
    "centre": ((32, 48, 48, 64), (16, 16, 64, 96)),
    "corner": ((48, 48, 64, 64), (32, 16, 80, 96)),
    "stretch": ((40, 48, 48, 64), (32, 16, 56, 96)),
}
"""Where a cell of the input is in the frame, and the box of that cell."""
HOW = {
    "yolov6": {"layout": "yolov5"},
    "yolox-decoded": {"layout": "yolox-decoded"},
    "rt-detr-logits": {"layout": "rt-detr-logits"},
    "rt-detr-ultralytics": {"metadata": NAMES | {"description": "Ultralytics rtdetr-l model"}},
    "rt-detr-chosen": {"metadata": NAMES | {"head": "RTDETRDecoder"}},
    "rf-detr": {"person": 1},
    "ssd": {"person": 1},
    "ssd-tensorflow": {"person": 1},
}


def place_of(head):
    return LAYOUTS[HOW.get(head, {}).get("layout", head)].pixels.place


def frame_with(head, colour=COLOUR, size=FRAME_SIZE):
    """Return a BGR frame in which a cell of the input has a colour, and the box of that cell."""
    (x0, y0, x1, y1), box = PLACES[place_of(head)]
    frame = np.full((*size, 3), 114, np.uint8)
    frame[y0:y1, x0:x1] = colour[::-1]
    return frame, box


def load(tmp_path, head, backend="onnxruntime", layout=None, person=None, **options):
    how = dict(HOW.get(head, {}))
    layout = how.pop("layout", None) if layout is None else layout
    path = write_detector(tmp_path / f"{head}.onnx", head, **how | options)
    return OnnxDetector(path, layout, person, backend=backend, threads=1)


@pytest.mark.parametrize(
    ("head", "backend"),
    [*((head, "onnxruntime") for head in HEADS), ("rt-detr", "openvino"), ("ssd", "openvino")],
)
def test_every_layout_finds_the_person_where_they_are(tmp_path, head, backend):
    pytest.importorskip(backend, reason=f"{backend} is not installed: extra 'cpu'")
    detector = load(tmp_path, head, backend)
    frame, box = frame_with(head)
    (found,) = detector(frame)
    assert found[:4] == pytest.approx(box, abs=0.5)
    assert 0.9 < found[4] <= 1
    swapped, _ = frame_with(head, COLOUR[::-1])
    assert detector(swapped).shape == (0, 5), "red and blue are not the same"
    assert detector(np.full((*FRAME_SIZE, 3), 114, np.uint8)).shape == (0, 5)
    assert detector.backend.name == backend


@pytest.mark.parametrize("head", ["yolov5", "yolox", "rt-detr", "rf-detr", "nanodet-levels"])
def test_inputs_of_other_shapes(tmp_path, head):
    size = (128, 64)
    detector = load(tmp_path, head, size=size)
    assert detector.size == size
    # A frame of the input's own size is not changed by any of the ways to fit it.
    frame = np.full((*size, 3), 114, np.uint8)
    frame[40:48, 24:32] = COLOUR[::-1]
    (found,) = detector(frame)
    assert found[:4] == pytest.approx((16, 24, 40, 64), abs=0.1)


@pytest.mark.parametrize(("head", "batch"), [("yolov5", None), ("rt-detr", None), ("yolox", 4)])
def test_batches_that_may_change_and_fixed_ones(tmp_path, head, batch):
    detector = load(tmp_path, head, batch=batch)
    assert detector.max_batch == (batch or 8)
    frame, box = frame_with(head)
    empty = np.full((50, 70, 3), 114, np.uint8)
    frames = [empty, frame, empty, frame, frame, empty]
    found = detector.detect_many(frames)
    assert [len(boxes) for boxes in found] == [0, 1, 0, 1, 1, 0]
    for boxes in itertools.compress(found, [0, 1, 0, 1, 1, 0]):
        assert boxes[0, :4] == pytest.approx(box, abs=0.5)


def test_half_floats_and_sizes_that_only_the_metadata_tells(tmp_path):
    frame, box = frame_with("yolov8")
    half = load(tmp_path, "yolov8", half=True)
    assert half(frame)[0, :4] == pytest.approx(box, abs=1)
    free = load(tmp_path, "yolov8", any_size=True, metadata={"imgsz": "[64, 96]"})
    assert free.size == (64, 96)
    assert free(frame)[0, :4] == pytest.approx(box, abs=0.5)


@pytest.mark.parametrize(
    ("size", "code"),
    [
        ("large", "detector_size_unreadable"),
        ("[100000, 100000]", "detector_size_out_of_range"),
        ("[0, 0]", "detector_size_out_of_range"),
        ("[1e400, 1]", "detector_size_unreadable"),
        ("-" * 100_000 + "1", "detector_size_unreadable"),
        ("[64, 96]" + " " * 1_000_000, "detector_size_unreadable"),
    ],
)
def test_sizes_that_no_picture_has_take_no_memory(tmp_path, size, code):
    with refused(code, InputError) as caught:
        load(tmp_path, "yolov8", any_size=True, metadata={"imgsz": size})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("head", "options", "layout"),
    [
        ("yolov5", {}, "yolov5"),
        ("yolov6", {}, "yolov5"),
        ("yolov6", {"rename": {"outputs": "output0"}, "metadata": NAMES}, "yolov5"),
        ("yolov8", {}, "yolov8"),
        ("end-to-end", {}, "end-to-end"),
        ("end-to-end", {"metadata": NAMES | {"end2end": "True"}}, "end-to-end"),
        ("yolox", {}, "yolox"),
        ("rt-detr", {}, "rt-detr"),
        ("rf-detr", {}, "rf-detr"),
        ("nanodet", {}, "nanodet"),
        ("nanodet-levels", {}, "nanodet-levels"),
        ("ssd", HOW["ssd"], "ssd"),
        ("ssd-tensorflow", HOW["ssd-tensorflow"], "ssd-tensorflow"),
        ("rt-detr-ultralytics", HOW["rt-detr-ultralytics"], "rt-detr-ultralytics"),
        ("rt-detr-chosen", HOW["rt-detr-chosen"], "rt-detr-chosen"),
        ("yolox-decoded", {}, "yolov5 or yolox-decoded"),
        ("rt-detr-logits", {}, "rt-detr-logits or rf-detr"),
        ("rf-detr", {"rename": {"dets": "boxes", "labels": "logits"}}, "rt-detr-logits or rf-detr"),
        ("rt-detr-ultralytics", {}, "rt-detr-ultralytics, perhaps"),
        ("rt-detr-chosen", {}, "end-to-end or rt-detr-chosen"),
    ],
)
def test_a_layout_is_recognized_or_refused_until_it_is_named(tmp_path, head, options, layout):
    path = write_detector(tmp_path / "d.onnx", head, **options)
    choices = layout.removesuffix(", perhaps").split(" or ")
    if choices == [layout]:
        detector = OnnxDetector(path, backend="onnxruntime", threads=1)
        assert detector.layout.name == layout
        for fact in (f"d.onnx: {layout} (", "96 x 64, batch 1, class ", "onnxruntime"):
            assert fact in str(detector)
        return
    with refused("ambiguous_layout", InputError, fitting=choices):
        OnnxDetector(path, backend="onnxruntime")
    for name in choices:
        assert OnnxDetector(path, name, backend="onnxruntime").layout.name == name


def test_another_layout_than_the_named_one_is_refused(tmp_path):
    path = write_detector(tmp_path / "d.onnx", "rf-detr")
    fitting = ["rt-detr-logits", "rf-detr"]
    with refused("other_layout", InputError, layout="rt-detr", fitting=fitting):
        OnnxDetector(path, "rt-detr", backend="onnxruntime")
    with refused("unknown_layout", UsageError, found="yolo8"):
        OnnxDetector(path, "yolo8", backend="onnxruntime")


GRID = {"output": (1, 126, 8)}


@pytest.mark.parametrize(
    ("outputs", "inputs", "code"),
    [
        # Zeros are offsets of nothing, and so a grid; a real answer in pixels cannot be.
        (GRID, {"images": [1, 3, 64, 96]}, None),
        (GRID, {"images": [1, 4, 64, 96]}, "detector_inputs_unknown"),
        (GRID, {"images": [1, 3, 64, 96], "mask": [1, 1]}, "detector_inputs_unknown"),
        (GRID, {"images": [1, 3, 64, 96], "more": [1, 3, 64, 96]}, "detector_inputs_unknown"),
        ({"odd": (1, 7, 11)}, {"images": [1, 3, 64, 96]}, "ambiguous_layout"),
        ({"odd": (1, 1000)}, {"images": [1, 3, 64, 96]}, "no_known_layout"),
        ({"a": (1, 20, 4), "b": (1, 30, 9)}, {"images": [1, 3, 64, 96]}, "no_known_layout"),
    ],
)
def test_models_of_no_layout_are_refused(tmp_path, outputs, inputs, code):
    """A model that answers with zeros."""
    zeros = {name: np.zeros(shape) for name, shape in outputs.items()}
    path = write_constant(tmp_path / "odd.onnx", zeros, inputs)
    if code is None:
        assert OnnxDetector(path, backend="onnxruntime").layout.name == "yolox"
        return
    with refused(code, InputError):
        OnnxDetector(path, backend="onnxruntime")


@pytest.mark.parametrize("content", [None, b"", b"no protocol buffers"])
def test_no_file_and_a_damaged_one(tmp_path, content):
    path = tmp_path / "d.onnx"
    if content is not None:
        path.write_bytes(content)
    expected = (
        refused("detector_not_found", path=path) if content is None else pytest.raises(InputError)
    )
    with expected:
        OnnxDetector(path)


RF_DETR = {"rfdetr_inference": json.dumps({"class_id_to_name": {"0": "car", "2": "person"}})}


@pytest.mark.parametrize(
    ("head", "made", "metadata", "wanted", "number"),
    [
        ("yolov8", 2, {"names": "{0: 'dog', 1: 'cat', 2: 'person'}"}, None, 2),
        ("yolov8", 1, {"names": "['dog', 'person', 'cat']"}, None, 1),
        ("yolov8", 1, {"names": "{0: 'a', 1: 'head', 2: 'b'}"}, "head", 1),
        ("yolox", 2, {}, 2, 2),
        ("rf-detr", 1, {}, None, 1),  # COCO's own numbers begin at one.
        ("rf-detr", 2, RF_DETR, None, 2),
        ("rt-detr", 2, {}, "2", 2),
    ],
)
def test_the_class_that_is_people(tmp_path, head, made, metadata, wanted, number):
    path = write_detector(tmp_path / "d.onnx", head, person=made, metadata=metadata)
    detector = OnnxDetector(path, person=wanted, backend="onnxruntime", threads=1)
    assert detector.person == number
    assert f"class {number} (" in str(detector)
    frame, box = frame_with(head)
    assert detector(frame)[0, :4] == pytest.approx(box, abs=0.5)
    other = OnnxDetector(path, person=str((number + 1) % 3), backend="onnxruntime", threads=1)
    assert len(other(frame)) == 0


UNKNOWN, UNREADABLE = "detector_class_unknown", "detector_classes_unreadable"


@pytest.mark.parametrize(
    ("metadata", "wanted", "code"),
    [
        ({"names": "{0: 'dog', 1: 'cat', 2: 'cow'}"}, None, UNKNOWN),
        ({"names": NAMES["names"]}, "head", UNKNOWN),
        ({}, "head", UNKNOWN),
        ({}, "3", UNKNOWN),
        *(
            ({"names": names}, None, UNREADABLE)
            for names in ("{0: ", "{1e400: 'person'}", "-" * 100_000 + "1", "5")
        ),
        *(
            ({"rfdetr_inference": text}, None, UNREADABLE)
            for text in ("{}", "[]", "{", '{"class_id_to_name": {"a": "person"}}')
        ),
    ],
)
def test_a_class_that_is_not_there_is_refused(tmp_path, metadata, wanted, code):
    path = write_detector(tmp_path / "d.onnx", "yolov8", metadata=metadata)
    with refused(code, InputError):
        OnnxDetector(path, person=wanted, backend="onnxruntime")


def test_scores_below_the_least_are_left_out_and_nobody_is_there_twice(tmp_path):
    path = write_detector(tmp_path / "d.onnx", "yolov8")
    frame = np.full((64, 96, 3), 114, np.uint8)
    frame[24:32, 40:48] = COLOUR[::-1]
    frame[24:32, 48:56] = COLOUR[::-1]  # Next to it: its box overlaps by a half.
    faint = np.add(COLOUR[::-1], (0, 27, 0))
    frame[8:16, 80:88] = faint  # A logit of 1.6.
    kept = OnnxDetector(path, backend="onnxruntime", threads=1)(frame)
    assert len(kept) == 3
    assert kept[:, 4].min() == pytest.approx(0.84, abs=0.02)
    assert len(OnnxDetector(path, min_score=0.9, backend="onnxruntime")(frame)) == 2
    assert len(OnnxDetector(path, max_overlap=0.4, backend="onnxruntime")(frame)) == 2


def test_numbers_that_are_none_are_an_error_or_left_out(tmp_path, monkeypatch):
    detector = load(tmp_path, "yolov8")
    frame, run = frame_with("yolov8")[0], detector.backend.run

    def spoil(rows):
        def spoiled(inputs):
            found = {name: array.copy() for name, array in run(inputs).items()}
            found["output0"][:, rows] = np.nan
            return found

        monkeypatch.setattr(detector.backend, "run", spoiled)

    spoil(slice(0, 1))
    assert detector(frame).shape == (0, 5), "a box that lies nowhere"
    spoil(slice(None))
    with refused("detector_gives_nan", BackendError, path=detector.path):
        detector(frame)


class Wrong:
    """A backend that finds people everywhere."""

    name, version, device, max_batch = "openvino", "1", "cpu", None

    def run(self, inputs):
        (pixels,) = inputs.values()
        return {"output0": np.ones((len(pixels), 7, 126), np.float32)}


def test_a_backend_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "open_backend", lambda *given, **options: Wrong())
    with refused("backend_disagrees", IntegrityError):
        OnnxDetector(write_detector(tmp_path / "d.onnx", "yolov8"), backend="openvino")


def test_auto_measures_once(tmp_path, monkeypatch):
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(onnx_file, "installed_backends", lambda device: ("onnxruntime", "other"))
    really, loaded = onnx_file.open_backend, []

    def open_backend(path, name, **options):
        loaded.append(name)
        return really(path, "onnxruntime", **options)

    monkeypatch.setattr(onnx_file, "open_backend", open_backend)
    path = write_detector(tmp_path / "d.onnx", "yolov8", batch=None)
    detector = OnnxDetector(path, threads=1)
    assert set(loaded) == {"onnxruntime", "other"}
    loaded.clear()
    again = OnnxDetector(path, threads=1)
    assert (len(loaded), again.choice.why) == (1, detector.choice.why), "what was measured is kept"


def test_the_help_of_commands_names_all_layouts():
    """It is written out there, since help loads no numpy."""
    (option,) = DetectorLayout.__metadata__
    named = option.help.removeprefix("Layout of FILE.onnx: ").rstrip(".").replace(" or ", ", ")
    assert named.split(", ") == list(LAYOUTS)
