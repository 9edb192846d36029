"""HOG, YOLO graphs in every layout, and boxes from a file."""

import json

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from upperson.data.synthetic.video import VideoSpec, write_video
from upperson_rt.camera import BoxesFile, HogDetector, open_detector
from upperson_rt.camera.detectors import YoloDetector, decode_yolo
from upperson_rt.errors import InputError

SIZE = 64
CELLS = 64 + 16 + 4
# Centre, size in the model's pixels; the frame below is 128 x 64, so it is fitted at half its size.
PERSON = (32.0, 32.0, 8.0, 20.0)
EXPECTED = [56, 12, 72, 52]


def write_yolo(path, output, names="{0: 'person', 1: 'dog'}", float_type=TensorProto.FLOAT):
    """Write a model that answers with the same output whatever it sees."""
    constant = numpy_helper.from_array(np.asarray(output, np.float32), "answer")
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
        helper.make_node("Cast", ["mean"], ["mean32"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["mean32", "zero"], ["nothing"]),
        helper.make_node("Add", ["answer", "nothing"], ["output0"]),
    ]
    graph = helper.make_graph(
        nodes,
        "yolo",
        [helper.make_tensor_value_info("images", float_type, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, list(np.shape(output)))],
        [constant, numpy_helper.from_array(np.float32(0), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    if names is not None:
        model.metadata_props.append(onnx.StringStringEntryProto(key="names", value=names))
    onnx.save(model, path)
    return path


def v8_output(rows):
    output = np.zeros((1, 6, CELLS), np.float32)
    for column, (box, person, dog) in enumerate(rows):
        output[0, :, column] = [*box, person, dog]
    return output


def v5_output(rows):
    output = np.zeros((1, 3 * CELLS, 7), np.float32)
    for row, (box, person, dog) in enumerate(rows):
        output[0, row] = [*box, 0.9, person, dog]
    return output


def end_to_end_output(rows):
    output = np.zeros((1, 300, 6), np.float32)
    for row, ((x, y, w, h), person, dog) in enumerate(rows):
        corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        output[0, row] = [*corners, max(person, dog), float(dog > person)]
    return output


@pytest.fixture
def frame():
    return np.full((64, 128, 3), 90, np.uint8)


@pytest.mark.parametrize("layout", [v8_output, v5_output, end_to_end_output])
@pytest.mark.parametrize("float_type", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_every_layout_gives_the_person_and_nobody_twice(tmp_path, frame, layout, float_type):
    rows = [
        (PERSON, 0.8, 0.1),
        ((32.5, 32.0, 8.0, 20.0), 0.7, 0.1),  # The same one again.
        ((10.0, 40.0, 8.0, 12.0), 0.1, 0.9),  # A dog.
        ((50.0, 40.0, 8.0, 20.0), 0.2, 0.0),  # Not sure enough.
    ]
    path = write_yolo(tmp_path / "yolo.onnx", layout(rows), float_type=float_type)
    boxes = open_detector(str(path))(frame)
    kept = boxes[boxes[:, 4] == boxes[:, 4].max()]
    assert kept[:, :4].round().tolist() == [EXPECTED]
    assert len(boxes) == 1
    assert boxes[0, 4] == pytest.approx(0.72 if layout is v5_output else 0.8, abs=1e-3)


def test_nobody_is_an_empty_array(tmp_path, frame):
    path = write_yolo(tmp_path / "yolo.onnx", v8_output([]))
    assert YoloDetector(path)(frame).shape == (0, 5)


def test_the_class_person_is_found_by_its_name(tmp_path, frame):
    output = v8_output([(PERSON, 0.1, 0.8)])
    path = write_yolo(tmp_path / "yolo.onnx", output, names="{0: 'dog', 1: 'person'}")
    assert YoloDetector(path).person == 1
    assert len(YoloDetector(path)(frame)) == 1
    path = write_yolo(tmp_path / "unnamed.onnx", output, names=None)
    assert len(YoloDetector(path)(frame)) == 0, "class 0 of a model without names"
    path = write_yolo(tmp_path / "dogs.onnx", output, names="{0: 'dog', 1: 'cat'}")
    with pytest.raises(InputError, match="knows no class 'person'"):
        YoloDetector(path)


def test_other_models_are_refused(tmp_path, frame):
    path = write_yolo(tmp_path / "odd.onnx", np.zeros((1, 7, 11)))
    with pytest.raises(InputError, match=r"shape \(1, 7, 11\) is unknown"):
        YoloDetector(path)(frame)
    with pytest.raises(InputError, match=r"must be \(1, A, B\)"):
        decode_yolo(np.zeros((2, 6, CELLS), np.float32), 0, (SIZE, SIZE))
    with pytest.raises(InputError, match="has 2 classes, no class 5"):
        decode_yolo(np.zeros((1, 6, CELLS), np.float32), 5, (SIZE, SIZE))
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(InputError, match="cannot load the detector"):
        open_detector(str(tmp_path / "junk.onnx"))
    with pytest.raises(InputError, match="no detector file"):
        open_detector(str(tmp_path / "none.onnx"))
    with pytest.raises(InputError, match="no detector 'yolo'"):
        open_detector("yolo")


def test_hog_finds_people_who_are_drawn(tmp_path):
    # Not on every street: HOG also knows outlines that are none, and misses long coats.
    truth = write_video(tmp_path / "street.avi", VideoSpec(people=8, seconds=12, fps=1, seed=0))
    assert {path.name for path in tmp_path.iterdir()} == {"street.avi", "street.json"}
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "a video may be read by whom the file beside it may be read by"
    detector, reader = HogDetector(), cv2.VideoCapture(str(tmp_path / "street.avi"))
    people = found = 0
    for entries in truth["frames"]:
        frame = reader.read()[1]
        boxes = detector(frame)
        people += len(entries)
        found += sum(any(overlap(e["box"], box) > 0.4 for box in boxes) for e in entries)
    assert people >= 10
    assert found >= 0.5 * people


def overlap(a, b):
    """Return intersection over union."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


def test_hog_looks_at_frames_of_every_size():
    detector = HogDetector()
    for size in ((40, 40), (128, 64), (720, 1280)):
        assert detector(np.zeros((*size, 3), np.uint8)).shape == (0, 5)


def test_hog_boxes_are_scaled_back_shrunk_and_not_twice(monkeypatch):
    detector = HogDetector(width_px=320)
    seen = []

    class Hog:
        def detectMultiScale(self, image, **options):  # noqa: N802
            seen.append(image.shape)
            found = np.array([[10, 20, 64, 128], [12, 20, 64, 128], [200, 20, 64, 128]])
            return found, np.array([1.5, 0.9, 0.1])

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
    with pytest.raises(InputError, match="by their number"):
        boxes(np.zeros((8, 8, 3), np.uint8))
    for text in ("[]", "{}", "junk", '{"frames": [[{}]]}'):
        path.write_text(text)
        with pytest.raises(InputError, match="cannot read boxes"):
            BoxesFile(path)
