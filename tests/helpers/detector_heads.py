"""Detectors with the outputs of each layout, over a graph that sees one colour.

It averages the pixels of every cell and compares them with one colour, in the channels, range and
normalization that the layout was trained with: a picture that is given in another way, or lies
elsewhere in the input, is not found, or found elsewhere. Boxes have one size around their cell.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

COLOUR = (220, 40, 90)
"""R, G, B of what is looked for, from 0 to 255."""
BOX = np.array([24.0, 40.0])
"""Width and height of every box, in pixels of the input."""
STRIDES = (8, 16, 32)
CLASSES = 3
SURE, PER_DISTANCE = 8.0, 60.0
"""Logit of the colour itself, and how much less another one gives."""
CHOSEN = 20
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BINS = 8
"""Of a distance of NanoDet."""


class Head:
    """Puts the graph of a detector together node by node."""

    def __init__(self, size, person, strides=STRIDES, *, bgr=False, white=1.0, mean=0.0, std=1.0):
        self.size, self.person = size, person
        self.nodes, self.constants = [], []
        places = [np.stack(np.mgrid[: size[0] // s, : size[1] // s][::-1], -1) for s in strides]
        self.steps = np.concatenate([np.full((p[..., 0].size, 1), s) for p, s in
                                     zip(places, strides, strict=True)])  # fmt: skip
        middles = (np.concatenate([place.reshape(-1, 2) for place in places]) + 0.5) * self.steps
        self.boxes = np.hstack([middles, np.broadcast_to(BOX, middles.shape)])
        """(cells, 4) middles and sizes in pixels of the input."""
        self.shares = self.boxes / np.array([size[1], size[0]] * 2)
        self.logits = self._eyes(strides, bgr, white, np.broadcast_to(mean, 3), std)
        """(N, cells, 1) of the colour."""

    def constant(self, value, dtype=np.float32):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind, *inputs, outputs=1, **attributes):
        """Add a node; inputs that are no names are constants."""
        inputs = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        names = [f"n{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def shape(self, *sizes):
        return self.constant(sizes, np.int64)

    def _eyes(self, strides, bgr, white, mean, std):
        colour = np.array(COLOUR[::-1] if bgr else COLOUR) / 255 * white
        colour, unit = (colour - mean) / std, np.broadcast_to(white / np.asarray(std), 3)
        levels = []
        for step in strides:
            mean = self.op("AveragePool", "pixels", kernel_shape=[step] * 2, strides=[step] * 2)
            off = self.op("Abs", self.op("Sub", mean, colour.reshape(1, 3, 1, 1)))
            off = self.op("Div", off, unit.reshape(1, 3, 1, 1))
            distance = self.op("ReduceSum", off, self.shape(1), keepdims=1)
            levels.append(self.op("Reshape", distance, self.shape(0, -1, 1)))
        distance = self.op("Concat", *levels, axis=1)
        return self.op("Sub", SURE, self.op("Mul", distance, PER_DISTANCE))

    def like(self, value):
        """Return a constant (cells, k) for each picture."""
        return self.op("Add", self.op("Mul", self.logits, 0.0), np.asarray(value)[None])

    def classes(self, logits=None, count=CLASSES):
        """Return (N, cells, classes) logits: those given for people, surely not for all else."""
        mine = np.arange(count) == self.person
        logits = self.op("Mul", logits or self.logits, mine.astype(float).reshape(1, 1, -1))
        return self.op("Add", logits, np.where(mine, 0, -20.0).reshape(1, 1, -1))

    def rows(self, boxes, *, objectness=None, logits=None):
        """Return (N, cells, 4 + classes), or 5 + classes with an objectness."""
        middle = [] if objectness is None else [objectness]
        kinds = self.op("Sigmoid", self.classes(logits))
        return self.op("Concat", boxes, *middle, kinds, axis=2)

    def best(self, boxes):
        """Return boxes (N, K, 4), scores (N, K, 1) and classes (N, K, 1) of the best scores."""
        flat = self.op("Reshape", self.op("Sigmoid", self.classes()), self.shape(0, -1))
        scores, index = self.op("TopK", flat, self.shape(CHOSEN), outputs=2, axis=1)
        kinds, last = self.shape(CLASSES), self.shape(2)
        labels = self.op("Cast", self.op("Mod", index, kinds), to=TensorProto.FLOAT)
        row = self.op("Tile", self.op("Unsqueeze", self.op("Div", index, kinds), last),
                      self.shape(1, 1, 4))  # fmt: skip
        chosen = self.op("GatherElements", boxes, row, axis=1)
        return chosen, self.op("Unsqueeze", scores, last), self.op("Unsqueeze", labels, last)

    def corners(self, boxes):
        return np.hstack([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2])


def certain(h):
    return h.like(np.full((1, 1), 9.0))


def yolov5(h):
    """Three anchors a cell, one of which is sure."""
    sure = [h.op("Sigmoid", h.logits), *[h.like(np.zeros((1, 1)))] * 2]
    tables = [h.rows(h.like(h.boxes), objectness=one, logits=certain(h)) for one in sure]
    return {"output0": h.op("Concat", *tables, axis=1)}


def yolov6(h):
    """An objectness that is always one."""
    return {"outputs": h.rows(h.like(h.boxes), objectness=h.like(np.ones((1, 1))))}


def yolov8(h):
    return {"output0": h.op("Transpose", h.rows(h.like(h.boxes)), perm=[0, 2, 1])}


def end_to_end(h):
    return {"output0": h.op("Concat", *h.best(h.like(h.corners(h.boxes))), axis=2)}


def yolox(h):
    """Offsets from the cell and logarithms of the size, both in strides; nothing is decoded."""
    raw = np.hstack([np.full((len(h.steps), 2), 0.5), np.log(BOX / h.steps)])
    sure = h.op("Sigmoid", h.logits)
    return {"output": h.rows(h.like(raw), objectness=sure, logits=certain(h))}


def yolox_decoded(h):
    sure = h.op("Sigmoid", h.logits)
    return {"output": h.rows(h.like(h.boxes), objectness=sure, logits=certain(h))}


def rt_detr(h):
    """The best queries over all classes; corners times the sizes that are wanted."""
    wanted = h.op("Cast", "orig_target_sizes", to=TensorProto.FLOAT)
    wanted = h.op("Unsqueeze", h.op("Concat", wanted, wanted, axis=1), h.shape(1))
    boxes = h.op("Mul", h.like(h.corners(h.shares)), wanted)
    boxes, scores, labels = h.best(boxes)
    labels = h.op("Cast", h.op("Squeeze", labels, h.shape(2)), to=TensorProto.INT64)
    return {"labels": labels, "boxes": boxes, "scores": h.op("Squeeze", scores, h.shape(2))}


def rt_detr_logits(h):
    return {"logits": h.classes(), "pred_boxes": h.like(h.shares)}


def rt_detr_ultralytics(h):
    return {"output0": h.rows(h.like(h.shares))}


def rt_detr_chosen(h):
    return {"output0": h.op("Concat", *h.best(h.like(h.shares)), axis=2)}


def rf_detr(h):
    """Boxes and logits of COCO's 91 numbers, in which people are number 1."""
    return {"dets": h.like(h.shares), "labels": h.classes(count=91 if h.person == 1 else CLASSES)}


def distances(h):
    """Return (cells, 4 x bins) logits whose weighted mean is half of a box, in strides."""
    wanted = np.tile(BOX / 2 / h.steps, 2)[:, :, None]
    shares = np.clip(1 - np.abs(wanted - np.arange(BINS)), 1e-9, None)
    return np.log(shares).reshape(len(h.steps), -1)


def nanodet(h):
    kinds = h.op("Sigmoid", h.classes())
    return {"output": h.op("Concat", kinds, h.like(distances(h)), axis=2)}


def nanodet_levels(h):
    """An output for the classes and one for the distances of each level."""
    outputs, first = {}, 0
    for step in STRIDES:
        last = first + int((h.steps == step).sum())
        for name, whole in (("cls", h.op("Sigmoid", h.classes())), ("reg", h.like(distances(h)))):
            part = h.op("Slice", whole, h.shape(first), h.shape(last), h.shape(1))
            outputs[f"{name}_pred_stride_{step}"] = part
        first = last
    return outputs


def ssd(h):
    """Rows of picture, class, score and corners; one picture."""
    boxes, scores, labels = h.best(h.like(h.corners(h.shares)))
    rows = h.op("Concat", h.op("Mul", labels, 0.0), labels, scores, boxes, axis=2)
    return {"detection_out": h.op("Unsqueeze", rows, h.shape(0))}


def ssd_tensorflow(h):
    boxes, scores, labels = h.best(h.like(h.corners(h.shares)[:, [1, 0, 3, 2]]))
    flat = {"scores": scores, "classes": labels}
    found = {f"detection_{n}": h.op("Squeeze", one, h.shape(2)) for n, one in flat.items()}
    count = h.op("ReduceSum", found["detection_scores"], h.shape(1), keepdims=0)
    return {"detection_boxes": boxes, **found, "num_detections": count}


_NANODET = {"mean": (103.53, 116.28, 123.675), "std": (57.375, 57.12, 58.395)}
_BGR, _QUERIES = {"bgr": True, "white": 255.0}, {"strides": STRIDES[:1]}

HEADS = {
    "yolov5": (yolov5, {}),
    "yolov6": (yolov6, {}),
    "yolov8": (yolov8, {}),
    "end-to-end": (end_to_end, {}),
    "yolox": (yolox, _BGR),
    "yolox-decoded": (yolox_decoded, _BGR),
    "rt-detr": (rt_detr, _QUERIES),
    "rt-detr-logits": (rt_detr_logits, _QUERIES),
    "rt-detr-ultralytics": (rt_detr_ultralytics, _QUERIES),
    "rt-detr-chosen": (rt_detr_chosen, _QUERIES),
    "rf-detr": (rf_detr, _QUERIES | IMAGENET),
    "nanodet": (nanodet, _BGR | _NANODET),
    "nanodet-levels": (nanodet_levels, _BGR | _NANODET),
    "ssd": (ssd, _BGR),
    "ssd-tensorflow": (ssd_tensorflow, {"white": 255.0}),
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
    any_size: bool = False,
    rename: dict[str, str] | None = None,
    **trained: Any,
) -> Path:
    """Write a detector that finds `COLOUR`; a batch of None may change.

    ``trained`` are pixels that its eyes want, other than those of its layout.
    """
    build, options = HEADS[head]
    made = Head(size, person, **options | trained)
    tensors = {(rename or {}).get(name, name): one for name, one in build(made).items()}
    to_floats = helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT)
    nodes = [to_floats, *made.nodes]
    nodes += [helper.make_node("Identity", [tensor], [name]) for name, tensor in tensors.items()]
    rows, sides = batch or "N", ("H", "W") if any_size else size
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    value, integer = helper.make_tensor_value_info, TensorProto.INT64
    inputs = [value("images", kind, [rows, 3, *sides])]
    if head == "rt-detr":
        inputs.append(value("orig_target_sizes", integer, [rows, 2]))
    integers = {"labels"} if head == "rt-detr" else set()
    outputs = [value(n, integer if n in integers else TensorProto.FLOAT, None) for n in tensors]
    graph = helper.make_graph(nodes, head, inputs, outputs, made.constants)
    return _save(graph, path, metadata)


def write_constant(
    path: Path,
    outputs: dict[str, np.ndarray[Any, Any]],
    inputs: dict[str, list[int]] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a model that gives the same numbers for every picture."""
    inputs, floats = inputs or {"images": [1, 3, 64, 96]}, TensorProto.FLOAT
    nodes = [helper.make_node("ReduceMean", [next(iter(inputs))], ["mean"], keepdims=0)]
    nodes.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    nodes += [helper.make_node("Add", [f"{name}0", "nothing"], [name]) for name in outputs]
    arrays = {"zero": np.zeros(())} | {f"{name}0": array for name, array in outputs.items()}
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info(n, floats, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, floats, a.shape) for n, a in outputs.items()],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    return _save(graph, path, metadata, opset=17)


def _save(
    graph: onnx.GraphProto, path: Path, metadata: dict[str, str] | None, opset: int = 18
) -> Path:
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path
