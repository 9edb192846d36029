"""The toy's towers as ONNX graphs, exported once a process, and helpers to look into graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper
from torch import nn

from tests.helpers.toy_clip import toy_ids, toy_model, toy_pixels
from upperson_calibration.block_linears import block_linears
from upperson_export.fold import fold_image_tower, fold_text_tower
from upperson_export.graphs import export_onnx
from upperson_rt.agreement import compare_embeds
from upperson_rt.towers import Tower

Array = npt.NDArray[Any]
TOWERS: tuple[Tower, ...] = ("image", "text")

_FOLD: dict[str, Callable[[Any], nn.Module]] = {"image": fold_image_tower, "text": fold_text_tower}


def toy_inputs(kind: Tower, count: int = 9) -> Array:
    """Return uint8 [count, H, W, 3], or int32 [count, 14] with captions of several lengths."""
    rows = toy_pixels(count) if kind == "image" else toy_ids([14, *([9, 4] * count)][:count])
    return np.asarray(rows.numpy())


def exported(model: Any, kind: Tower) -> onnx.ModelProto:
    """Fold and export one tower of a model with the toy's sizes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tower.onnx")
        example = toy_pixels(3) if kind == "image" else toy_ids([4, 9])
        export_onnx(_FOLD[kind](model), kind, path, example=example)
        return onnx.load(path)


@cache
def toy_graph(kind: Tower) -> onnx.ModelProto:
    """The float32 graph; shared, so not to be changed."""
    return exported(toy_model(), kind)


def run_graph(model: onnx.ModelProto, *inputs: Array, outputs: Iterable[str] = ()) -> list[Array]:
    """Run a model in ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    found: list[Array] = session.run(list(outputs) or None, dict(zip(names, inputs, strict=True)))
    return found


def amax_of(model: onnx.ModelProto, inputs: Array) -> dict[str, float]:
    """Return the largest absolute value of what enters each block Linear."""
    names = list(dict.fromkeys(linear.activation for linear in block_linears(model)))
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    found = run_graph(watched, inputs, outputs=names)
    return {name: float(np.abs(value).max()) for name, value in zip(names, found, strict=True)}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the node that computes each tensor."""
    return {name: node for node in model.graph.node for name in node.output}


def min_cosine(a: Array, b: Array) -> float:
    """Return the smallest cosine of two sets of rows [N, E]."""
    return compare_embeds(a, b).min_cosine
