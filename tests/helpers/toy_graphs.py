"""The toy's towers as ONNX graphs, exported once a session, and helpers to look into graphs.

Tests that use `toy_graph` or `graph_of` ask for the fixture ``toy_graphs``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from tests.helpers.toy_clip import toy_ids, toy_model, toy_pixels
from tests.helpers.traces import once_in
from upperson_calibration.graph import BlockLinear, TowerGraph
from upperson_export.fold import fold_image_tower, fold_text_tower
from upperson_export.graphs import write_with_weights
from upperson_export.plain import PlainTower
from upperson_machine.int8 import int8_sums_saturate
from upperson_rt.agreement import compare_embeds
from upperson_rt.towers import Tower

Array = npt.NDArray[Any]
Graph = TowerGraph | ir.Model | onnx.ModelProto
TOWERS: tuple[Tower, ...] = ("image", "text")

FOLD: dict[Tower, Callable[[Any], PlainTower]] = {
    "image": fold_image_tower,
    "text": fold_text_tower,
}

_FOLDER = tempfile.TemporaryDirectory(prefix="toy_graphs.")
_NUMBERS = count()
_GRAPHS: dict[Tower, TowerGraph] = {}


def toy_inputs(kind: Tower, count: int = 9) -> Array:
    """Return uint8 [count, H, W, 3], or int32 [count, 14] with captions of several lengths."""
    rows = toy_pixels(count) if kind == "image" else toy_ids([14, *([9, 4] * count)][:count])
    return np.asarray(rows.numpy())


def load_toy_graphs(folder: Path) -> None:
    """Take the toy's graphs from a folder, exporting them if they are not there."""
    for kind in TOWERS:
        file, description = folder / f"{kind}.onnx", folder / f"{kind}.json"
        if not description.exists():
            example = toy_pixels(3) if kind == "image" else toy_ids([4, 9])
            traced = once_in(folder.parent / "traces")
            graph = traced(FOLD[kind](toy_model()), kind, file, example=example)
            description.write_text(json.dumps([asdict(linear) for linear in graph.linears]))
        linears = [BlockLinear(**fields) for fields in json.loads(description.read_text())]
        _GRAPHS[kind] = TowerGraph(kind, file, tuple(linears))


def toy_graph(kind: Tower) -> TowerGraph:
    """Return the float32 graph of the toy's model, which is shared."""
    return _GRAPHS[kind]


def export_exchanged(tower: PlainTower, kind: Tower, path: Path, *, example: Any) -> TowerGraph:
    """Do as `export_onnx` for a tower that differs from the toy's in weights alone, at once."""
    graph = write_with_weights(toy_graph(kind), tower, path)
    assert graph is not None
    return graph


def graph_of(tower: PlainTower, kind: Tower) -> TowerGraph:
    """Return the graph of a folded tower that differs from the toy's in weights alone."""
    file = Path(_FOLDER.name, f"{next(_NUMBERS)}.onnx")
    return export_exchanged(tower, kind, file, example=None)


def proto_of(graph: Graph) -> onnx.ModelProto:
    """Return a graph as tests read it; changes of it change nothing else."""
    if isinstance(graph, onnx.ModelProto):
        return graph
    return onnx.load(graph.file) if isinstance(graph, TowerGraph) else ir.to_proto(graph)


def run_graph(graph: Graph, *inputs: Array, outputs: Iterable[str] = ()) -> list[Array]:
    """Run a graph in ONNX Runtime on one thread, with the same numbers on every CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if int8_sums_saturate():
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        proto_of(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    found: list[Array] = session.run(list(outputs) or None, dict(zip(names, inputs, strict=True)))
    return found


def amax_of(graph: TowerGraph, inputs: Array) -> dict[str, float]:
    names = list(dict.fromkeys(linear.activation for linear in graph.linears))
    watched = graph.load()
    values = ir.convenience.create_value_mapping(watched.graph)
    watched.graph.outputs.extend(values[name] for name in names)
    found = run_graph(watched, inputs, outputs=names)
    return {name: float(np.abs(value).max()) for name, value in zip(names, found, strict=True)}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def min_cosine(a: Array, b: Array) -> float:
    return compare_embeds(a, b).min_cosine
