"""ONNX files of every layout: recognized or refused, and read as they were made."""

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
EMPTY = np.full((*FRAME_SIZE, 3), 114, np.uint8)
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
    **{head: {"person": 1} for head in ("rf-detr", "ssd", "ssd-tensorflow")},
}


def frame_with(head, colour=COLOUR):
    """Return a BGR frame in which a cell of the input has a colour, and the box of that cell."""
    layout = HOW.get(head, {}).get("layout", head)
    (x0, y0, x1, y1), box = PLACES[LAYOUTS[layout].pixels.place]
    frame = EMPTY.copy()
    frame[y0:y1, x0:x1] = colour[::-1]
    return frame, box


def opened(path, layout=None, backend="onnxruntime", **options):
    return OnnxDetector(path, layout, backend=backend, threads=1, **options)


def load(tmp_path, head, backend="onnxruntime", **made):
    how = dict(HOW.get(head, {}))
    layout = how.pop("layout", None)
    return opened(write_detector(tmp_path / "d.onnx", head, **how | made), layout, backend)


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
    assert detector(EMPTY).shape == (0, 5)
    assert detector.backend.name == backend


@pytest.mark.parametrize("head", ["yolov5", "yolox", "rt-detr", "rf-detr", "nanodet-levels"])
def test_inputs_of_other_shapes(tmp_path, head):
    detector = load(tmp_path, head, size=(128, 64))
    assert detector.size == (128, 64)
    # A frame of the input's own size is not changed by any of the ways to fit it.
    frame = np.full((128, 64, 3), 114, np.uint8)
    frame[40:48, 24:32] = COLOUR[::-1]
    (found,) = detector(frame)
    assert found[:4] == pytest.approx((16, 24, 40, 64), abs=0.1)


@pytest.mark.parametrize(("head", "batch"), [("yolov5", None), ("rt-detr", None), ("yolox", 4)])
def test_batches_that_may_change_and_fixed_ones(tmp_path, head, batch):
    detector = load(tmp_path, head, batch=batch)
    assert detector.max_batch == (batch or 8)
    frame, box = frame_with(head)
    found = detector.detect_many([EMPTY[:50, :70], frame, EMPTY, frame, frame, EMPTY])
    assert [len(boxes) for boxes in found] == [0, 1, 0, 1, 1, 0]
    for (edges,) in (found[1][:, :4], found[3][:, :4], found[4][:, :4]):
        assert edges == pytest.approx(box, abs=0.5)


def test_half_floats_and_sizes_that_only_the_metadata_tells(tmp_path):
    frame, box = frame_with("yolov8")
    assert load(tmp_path, "yolov8", half=True)(frame)[0, :4] == pytest.approx(box, abs=1)
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
    ("head", "made", "layouts"),
    [
        *((head, {}, [head]) for head in (
            "yolov5", "yolov8", "end-to-end", "yolox", "rt-detr", "rf-detr", "nanodet",
            "nanodet-levels",
        )),
        *((head, HOW[head], [head]) for head in (
            "ssd", "ssd-tensorflow", "rt-detr-ultralytics", "rt-detr-chosen",
        )),
        ("yolov6", {}, ["yolov5"]),
        ("yolov6", {"rename": {"outputs": "output0"}, "metadata": NAMES}, ["yolov5"]),
        ("end-to-end", {"metadata": NAMES | {"end2end": "True"}}, ["end-to-end"]),
        ("yolox-decoded", {}, ["yolov5", "yolox-decoded"]),
        ("rt-detr-logits", {}, ["rt-detr-logits", "rf-detr"]),
        ("rf-detr", {"rename": {"dets": "boxes", "labels": "logits"}},
         ["rt-detr-logits", "rf-detr"]),
        ("rt-detr-chosen", {}, ["end-to-end", "rt-detr-chosen"]),
    ],
)  # fmt: skip
def test_a_layout_is_recognized_or_refused_until_it_is_named(tmp_path, head, made, layouts):
    path = write_detector(tmp_path / "d.onnx", head, **made)
    if len(layouts) > 1:
        with refused("ambiguous_layout", InputError, fitting=layouts):
            opened(path)
        assert [opened(path, name).layout.name for name in layouts] == layouts
        return
    detector = opened(path)
    assert [detector.layout.name] == layouts
    for fact in (f"d.onnx: {layouts[0]} (", "96 x 64, batch 1, class ", "onnxruntime"):
        assert fact in str(detector)


def test_a_layout_of_one_kind_that_nothing_proves_has_to_be_named_and_no_other_is_taken(tmp_path):
    path = write_detector(tmp_path / "a.onnx", "rt-detr-ultralytics")
    with refused("ambiguous_layout", InputError, fitting=["rt-detr-ultralytics"]):
        opened(path)
    assert opened(path, "rt-detr-ultralytics").layout.name == "rt-detr-ultralytics"
    path, fitting = write_detector(tmp_path / "b.onnx", "rf-detr"), ["rt-detr-logits", "rf-detr"]
    with refused("other_layout", InputError, layout="rt-detr", fitting=fitting):
        opened(path, "rt-detr")
    with refused("unknown_layout", UsageError, found="yolo8"):
        opened(path, "yolo8")


IMAGES, GRID = {"images": [1, 3, 64, 96]}, {"output": (1, 126, 8)}


@pytest.mark.parametrize(
    ("outputs", "inputs", "code"),
    [
        # Zeros are offsets of nothing, and so a grid; a real answer in pixels cannot be.
        (GRID, IMAGES, None),
        (GRID, {"images": [1, 4, 64, 96]}, "detector_inputs_unknown"),
        (GRID, IMAGES | {"mask": [1, 1]}, "detector_inputs_unknown"),
        (GRID, IMAGES | {"more": [1, 3, 64, 96]}, "detector_inputs_unknown"),
        ({"odd": (1, 7, 11)}, IMAGES, "ambiguous_layout"),
        ({"odd": (1, 1000)}, IMAGES, "no_known_layout"),
        ({"a": (1, 20, 4), "b": (1, 30, 9)}, IMAGES, "no_known_layout"),
    ],
)
def test_models_of_zeros_that_have_no_layout_are_refused(tmp_path, outputs, inputs, code):
    zeros = {name: np.zeros(shape) for name, shape in outputs.items()}
    path = write_constant(tmp_path / "odd.onnx", zeros, inputs)
    if code is None:
        assert opened(path).layout.name == "yolox"
        return
    with refused(code, InputError):
        opened(path)


def test_no_file_and_a_damaged_one(tmp_path):
    path = tmp_path / "d.onnx"
    with refused("detector_not_found", path=path):
        OnnxDetector(path)
    for content in (b"", b"no protocol buffers"):
        path.write_bytes(content)
        with pytest.raises(InputError):
            OnnxDetector(path)


RF_DETR = {"rfdetr_inference": json.dumps({"class_id_to_name": {"0": "car", "2": "person"}})}


@pytest.mark.parametrize(
    ("head", "metadata", "wanted", "number"),
    [
        ("yolov8", {"names": "{0: 'dog', 1: 'cat', 2: 'person'}"}, None, 2),
        ("yolov8", {"names": "['dog', 'person', 'cat']"}, None, 1),
        ("yolov8", {"names": "{0: 'a', 1: 'head', 2: 'b'}"}, "head", 1),
        ("yolox", {}, 2, 2),
        ("rf-detr", {}, None, 1),  # COCO's own numbers begin at one.
        ("rf-detr", RF_DETR, None, 2),
        ("rt-detr", {}, "2", 2),
    ],
)
def test_the_class_that_is_people(tmp_path, head, metadata, wanted, number):
    path = write_detector(tmp_path / "d.onnx", head, person=number, metadata=metadata)
    detector = opened(path, person=wanted)
    assert detector.person == number
    assert f"class {number} (" in str(detector)
    frame, box = frame_with(head)
    assert detector(frame)[0, :4] == pytest.approx(box, abs=0.5)
    assert len(opened(path, person=str((number + 1) % 3))(frame)) == 0


@pytest.mark.parametrize(
    ("metadata", "wanted", "code"),
    [
        *((metadata, wanted, "detector_class_unknown") for metadata, wanted in (
            ({"names": "{0: 'dog', 1: 'cat', 2: 'cow'}"}, None), (NAMES, "head"), ({}, "head"),
            ({}, "3"),
        )),
        *(({"names": names}, None, "detector_classes_unreadable") for names in (
            "{0: ", "{1e400: 'person'}", "-" * 100_000 + "1", "5",
        )),
        *(({"rfdetr_inference": text}, None, "detector_classes_unreadable") for text in (
            "{}", "[]", "{", '{"class_id_to_name": {"a": "person"}}',
        )),
    ],
)  # fmt: skip
def test_a_class_that_is_not_there_is_refused(tmp_path, metadata, wanted, code):
    path = write_detector(tmp_path / "d.onnx", "yolov8", metadata=metadata)
    with refused(code, InputError):
        opened(path, person=wanted)


def test_scores_below_the_least_are_left_out_and_nobody_is_there_twice(tmp_path):
    path = write_detector(tmp_path / "d.onnx", "yolov8")
    frame = np.full((64, 96, 3), 114, np.uint8)
    frame[24:32, 40:56] = COLOUR[::-1]  # Two cells, whose boxes overlap by a half.
    frame[8:16, 80:88] = np.add(COLOUR[::-1], (0, 27, 0))  # A logit of 1.6.
    kept = opened(path)(frame)
    assert len(kept) == 3
    assert kept[:, 4].min() == pytest.approx(0.84, abs=0.02)
    assert len(opened(path, min_score=0.9)(frame)) == 2
    assert len(opened(path, max_overlap=0.4)(frame)) == 2


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
        load(tmp_path, "yolov8", "openvino")


def test_auto_measures_once(tmp_path, monkeypatch):
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(onnx_file, "installed_backends", lambda device: ("onnxruntime", "other"))
    really, loaded = onnx_file.open_backend, []

    def open_backend(path, name, **options):
        loaded.append(name)
        return really(path, "onnxruntime", **options)

    monkeypatch.setattr(onnx_file, "open_backend", open_backend)
    detector = load(tmp_path, "yolov8", "auto", batch=None)
    assert set(loaded) == {"onnxruntime", "other"}
    loaded.clear()
    again = opened(detector.path, backend="auto")
    assert (len(loaded), again.choice.why) == (1, detector.choice.why), "what was measured is kept"


def test_the_help_of_commands_names_all_layouts():
    """It is written out there, since help loads no numpy."""
    (option,) = DetectorLayout.__metadata__
    named = option.help.removeprefix("Layout of FILE.onnx: ").rstrip(".").replace(" or ", ", ")
    assert named.split(", ") == list(LAYOUTS)
