"""Detectors with a head by the published formulas of each layout, over eyes that see one colour.

The eyes average the pixels of every cell and compare them with one colour, in the channels, range
and normalization that the layout was trained with: a picture that is given in another way, or lies
elsewhere in the input, is not seen, or seen elsewhere. Boxes have one size around their cell.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

COLOUR = (220, 40, 90)
"""R, G, B of what is looked for, from 0 to 255."""
BOX_WIDTH, BOX_HEIGHT = 24.0, 40.0
"""Of every box, in pixels of the input."""
STRIDES = (8, 16, 32)
CLASSES = 3
SURE, PER_DISTANCE = 8.0, 60.0
"""Logit of the colour itself, and how much less another one gives."""
ANCHORS = ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0))
BINS = 16
CHOSEN = 20


class Builder:
    """Puts an ONNX graph together node by node."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value, dtype=np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes):
        names = [f"n{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names


def cell_grid(size, strides=STRIDES):
    """Return (cells, 2) columns and rows, and (cells, 1) strides."""
    places, steps = [], []
    for step in strides:
        ys, xs = np.mgrid[: size[0] // step, : size[1] // step]
        places.append(np.stack([xs.ravel(), ys.ravel()], 1).astype(np.float32))
        steps.append(np.full((xs.size, 1), step, np.float32))
    return np.concatenate(places), np.concatenate(steps)


def eyes(b: Builder, pixels: str, strides, *, bgr: bool, largest: float, imagenet: bool) -> str:
    """Return (N, cells, 1) logits of the colour."""
    colour = np.array(COLOUR, np.float64) / 255
    unit = np.full(3, largest, np.float64)
    if imagenet:
        colour = (colour - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        unit = 1 / np.array([0.229, 0.224, 0.225])
    else:
        colour = colour * largest
    if bgr:
        colour, unit = colour[::-1], unit[::-1]
    target = b.constant(colour.reshape(1, 3, 1, 1))
    per_unit = b.constant((1 / unit).reshape(1, 3, 1, 1))
    levels = []
    for step in strides:
        mean = b.op("AveragePool", pixels, kernel_shape=[step, step], strides=[step, step])
        off = b.op("Mul", b.op("Abs", b.op("Sub", mean, target)), per_unit)
        distance = b.op("ReduceSum", off, b.constant([1], np.int64), keepdims=1)
        flat = b.op("Reshape", distance, b.constant([0, -1, 1], np.int64))
        levels.append(flat)
    distance = b.op("Concat", *levels, axis=1) if len(levels) > 1 else levels[0]
    return b.op("Sub", b.constant(SURE), b.op("Mul", distance, b.constant(PER_DISTANCE)))


def like(b: Builder, logits: str, value) -> str:
    """Return a constant (1, cells, k), once for each picture."""
    nothing = b.op("Mul", logits, b.constant(0.0))
    return b.op("Add", nothing, b.constant(value))


def class_logits(b: Builder, logits: str, person: int, classes: int = CLASSES) -> str:
    """Return (N, cells, classes): what the eyes say for people, surely not for all else."""
    column = np.full((1, 1, classes), -20.0)
    column[..., person] = 0
    mine = np.zeros((1, 1, classes))
    mine[..., person] = 1
    return b.op("Add", b.op("Mul", logits, b.constant(mine)), b.constant(column))


def yolov5(b, pixels, size, person, see):
    """xy = (2 s - 0.5 + grid) stride, wh = (2 s)^2 anchor, for three anchors a cell."""
    logits = eyes(b, pixels, STRIDES, **see)
    places, steps = cell_grid(size)
    tables = []
    for number, (wide, high) in enumerate(ANCHORS):
        share = np.sqrt(np.array([BOX_WIDTH / wide, BOX_HEIGHT / high])) / 2
        raw = np.log(share / (1 - share))
        s = b.op("Sigmoid", like(b, logits, np.zeros((1, 1, 2))))
        doubled = b.op("Sub", b.op("Mul", s, b.constant(2.0)), b.constant(0.5))
        xy = b.op("Mul", b.op("Add", doubled, b.constant(places[None])), b.constant(steps[None]))
        twice = b.op("Mul", b.op("Sigmoid", like(b, logits, raw.reshape(1, 1, 2))), b.constant(2.0))
        wh = b.op("Mul", b.op("Mul", twice, twice), b.constant([[wide, high]]))
        seen = logits if number == 0 else like(b, logits, np.full((1, 1, 1), -20.0))
        sure = b.op("Sigmoid", seen)
        kinds = b.op("Sigmoid", class_logits(b, like(b, logits, np.full((1, 1, 1), 9.0)), person))
        tables.append(b.op("Concat", xy, wh, sure, kinds, axis=2))
    return {"output0": b.op("Concat", *tables, axis=1)}


def yolov6(b, pixels, size, person, see):
    """Boxes in pixels and an objectness that is always one: one row a cell."""
    logits = eyes(b, pixels, STRIDES, **see)
    places, steps = cell_grid(size)
    xy = like(b, logits, ((places + 0.5) * steps)[None])
    wh = like(b, logits, np.array([[[BOX_WIDTH, BOX_HEIGHT]]]))
    one = like(b, logits, np.ones((1, 1, 1)))
    kinds = b.op("Sigmoid", class_logits(b, logits, person))
    return {"outputs": b.op("Concat", xy, wh, one, kinds, axis=2)}


def yolov8(b, pixels, size, person, see):
    """Distances to the sides as expectations over 16 bins, in strides."""
    logits = eyes(b, pixels, STRIDES, **see)
    places, steps = cell_grid(size)
    sides = np.stack([BOX_WIDTH / 2 / steps, BOX_HEIGHT / 2 / steps] * 2, axis=2)[:, 0]
    low = np.floor(sides).astype(int)
    rest = sides - low
    weights = np.full((len(places), 4, BINS), 1e-9)
    rows, columns = np.indices(low.shape)
    weights[rows, columns, low] = np.maximum(1 - rest, 1e-9)
    weights[rows, columns, low + 1] = np.maximum(rest, 1e-9)
    raw = b.constant(np.log(weights)[None])
    bins = b.op("Softmax", raw, axis=3)
    distances = b.op(
        "ReduceSum",
        b.op("Mul", bins, b.constant(np.arange(BINS).reshape(1, 1, 1, -1))),
        b.constant([3], np.int64),
        keepdims=0,
    )
    left_top, right_bottom = b.op("Split", distances, outputs=2, axis=2, num_outputs=2)
    points = b.constant((places + 0.5)[None])
    first, last = b.op("Sub", points, left_top), b.op("Add", points, right_bottom)
    middle = b.op("Div", b.op("Add", first, last), b.constant(2.0))
    boxes = b.op("Concat", middle, b.op("Sub", last, first), axis=2)
    boxes = b.op("Mul", boxes, b.constant(steps[None]))
    boxes = b.op("Add", b.op("Mul", logits, b.constant(0.0)), boxes)
    kinds = b.op("Sigmoid", class_logits(b, logits, person))
    return {"output0": b.op("Transpose", b.op("Concat", boxes, kinds, axis=2), perm=[0, 2, 1])}


def end_to_end(b, pixels, size, person, see):
    """The best boxes over all classes: corners, score, class."""
    logits = eyes(b, pixels, STRIDES, **see)
    places, steps = cell_grid(size)
    half = np.array([BOX_WIDTH, BOX_HEIGHT]) / 2
    middles = (places + 0.5) * steps
    corners = like(b, logits, np.concatenate([middles - half, middles + half], 1)[None])
    return {"output0": b.op("Concat", *best(b, logits, corners, person), axis=2)}


def best(b, logits, boxes, person):
    """Return boxes (N, K, 4), scores (N, K, 1) and classes (N, K, 1) of the highest scores."""
    kinds = b.op("Sigmoid", class_logits(b, logits, person))
    flat = b.op("Reshape", kinds, b.constant([0, -1], np.int64))
    scores, index = b.op("TopK", flat, b.constant([CHOSEN], np.int64), outputs=2, axis=1)
    classes = b.constant([CLASSES], np.int64)
    labels = b.op("Cast", b.op("Mod", index, classes), to=TensorProto.FLOAT)
    row = b.op("Unsqueeze", b.op("Div", index, classes), b.constant([2], np.int64))
    chosen = b.op(
        "GatherElements", boxes, b.op("Tile", row, b.constant([1, 1, 4], np.int64)), axis=1
    )
    last = b.constant([2], np.int64)
    return chosen, b.op("Unsqueeze", scores, last), b.op("Unsqueeze", labels, last)


def yolox(b, pixels, size, person, see):
    """Offsets from the cell and logarithms of the size, both in strides; nothing is decoded."""
    logits = eyes(b, pixels, STRIDES, **see)
    _, steps = cell_grid(size)
    wh = np.log(np.array([[BOX_WIDTH, BOX_HEIGHT]]) / steps)
    raw = np.concatenate([np.full((len(steps), 2), 0.5), wh], 1)
    sure = b.op("Sigmoid", logits)
    kinds = b.op("Sigmoid", class_logits(b, like(b, logits, np.full((1, 1, 1), 9.0)), person))
    return {"output": b.op("Concat", like(b, logits, raw[None]), sure, kinds, axis=2)}


def yolox_decoded(b, pixels, size, person, see):
    """The same with (xy + grid) stride and exp(wh) stride in the graph."""
    table = yolox(b, pixels, size, person, see)["output"]
    places, steps = cell_grid(size)
    xy, wh, rest = b.op(
        "Split", table, b.constant([2, 2, 1 + CLASSES], np.int64), outputs=3, axis=2
    )
    stride = b.constant(steps[None])
    xy = b.op("Mul", b.op("Add", xy, b.constant(places[None])), stride)
    wh = b.op("Mul", b.op("Exp", wh), stride)
    return {"output": b.op("Concat", xy, wh, rest, axis=2)}


def shares(b, logits, size):
    """Return (N, queries, 4) centres and sizes as shares of the picture."""
    places, steps = cell_grid(size, STRIDES[:1])
    sides = np.array([size[1], size[0]], np.float64)
    wh = np.tile(np.array([[BOX_WIDTH, BOX_HEIGHT]]) / sides, (len(places), 1))
    return like(b, logits, np.concatenate([(places + 0.5) * steps / sides, wh], 1)[None])


def rt_detr(b, pixels, size, person, see):
    """The best queries over all classes; corners times the sizes asked for."""
    logits = eyes(b, pixels, STRIDES[:1], **see)
    xy, wh = b.op("Split", shares(b, logits, size), outputs=2, axis=2, num_outputs=2)
    half = b.op("Div", wh, b.constant(2.0))
    corners = b.op("Concat", b.op("Sub", xy, half), b.op("Add", xy, half), axis=2)
    wanted = b.op("Cast", "orig_target_sizes", to=TensorProto.FLOAT)
    wanted = b.op("Unsqueeze", b.op("Concat", wanted, wanted, axis=1), b.constant([1], np.int64))
    boxes, scores, labels = best(b, logits, b.op("Mul", corners, wanted), person)
    last = b.constant([2], np.int64)
    return {
        "labels": b.op("Cast", b.op("Squeeze", labels, last), to=TensorProto.INT64),
        "boxes": boxes,
        "scores": b.op("Squeeze", scores, last),
    }


def rt_detr_logits(b, pixels, size, person, see):
    logits = eyes(b, pixels, STRIDES[:1], **see)
    return {
        "logits": class_logits(b, logits, person),
        "pred_boxes": shares(b, logits, size),
    }


def rt_detr_ultralytics(b, pixels, size, person, see):
    logits = eyes(b, pixels, STRIDES[:1], **see)
    kinds = b.op("Sigmoid", class_logits(b, logits, person))
    return {"output0": b.op("Concat", shares(b, logits, size), kinds, axis=2)}


def rt_detr_chosen(b, pixels, size, person, see):
    logits = eyes(b, pixels, STRIDES[:1], **see)
    return {"output0": b.op("Concat", *best(b, logits, shares(b, logits, size), person), axis=2)}


def rf_detr(b, pixels, size, person, see):
    """Boxes and logits of COCO's 91 numbers, in which people are number 1."""
    logits = eyes(b, pixels, STRIDES[:1], **see)
    classes = 91 if person == 1 else CLASSES
    return {"dets": shares(b, logits, size), "labels": class_logits(b, logits, person, classes)}


_RGB = {"bgr": False, "largest": 1.0, "imagenet": False}
_BGR = {"bgr": True, "largest": 255.0, "imagenet": False}

HEADS = {
    "yolov5": (yolov5, _RGB),
    "yolov6": (yolov6, _RGB),
    "yolov8": (yolov8, _RGB),
    "end-to-end": (end_to_end, _RGB),
    "yolox": (yolox, _BGR),
    "yolox-decoded": (yolox_decoded, _BGR),
    "rt-detr": (rt_detr, _RGB),
    "rt-detr-logits": (rt_detr_logits, _RGB),
    "rt-detr-ultralytics": (rt_detr_ultralytics, _RGB),
    "rt-detr-chosen": (rt_detr_chosen, _RGB),
    "rf-detr": (rf_detr, _RGB | {"imagenet": True}),
}
"""Heads by name, and what their eyes were trained with."""


def write_detector(
    path: Path,
    head: str,
    size: tuple[int, int] = (64, 96),
    batch: int | None = 1,
    person: int = 0,
    metadata: dict[str, str] | None = None,
    half: bool = False,
    input_name: str = "images",
    any_size: bool = False,
    rename: dict[str, str] | None = None,
) -> Path:
    """Write a detector that finds `COLOUR`; a batch of None may change."""
    build, see = HEADS[head]
    b = Builder()
    pixels = input_name
    if half:
        pixels = b.op("Cast", input_name, to=TensorProto.FLOAT)
    outputs = {
        (rename or {}).get(name, name): tensor
        for name, tensor in build(b, pixels, size, person, see).items()
    }
    for name, tensor in outputs.items():
        b.nodes.append(helper.make_node("Identity", [tensor], [name]))
    rows = "N" if batch is None else batch
    sides = ("H", "W") if any_size else size
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(input_name, kind, [rows, 3, *sides])]
    if head == "rt-detr":
        inputs.append(
            helper.make_tensor_value_info("orig_target_sizes", TensorProto.INT64, [rows, 2])
        )
    types = dict.fromkeys(outputs, TensorProto.FLOAT) | {
        name: TensorProto.INT64 for name in outputs if head == "rt-detr" and name == "labels"
    }
    graph = helper.make_graph(
        b.nodes,
        head,
        inputs,
        [helper.make_tensor_value_info(name, types[name], None) for name in outputs],
        b.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    for key, value in (metadata or {}).items():
        model.metadata_props.append(onnx.StringStringEntryProto(key=key, value=value))
    onnx.save(model, path)
    return path
