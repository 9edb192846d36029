"""A tower's graphs: the float32 one that torch exports, and each variant made from it.

Tensor names, dynamic axes and node names are the product's interface, see
``docs/reference/formats.md``.
"""

import ast
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch.export import Dim

from upperson_calibration.graph import BlockLinear, TowerGraph
from upperson_export.passes.half import (
    ERROR,
    AccumulateInFloat32,
    ShowAccumulationErrors,
    SimulateHalf,
    fp16_products,
)
from upperson_export.plain import PlainTower
from upperson_export.variants import VARIANTS, Tensors, VariantName
from upperson_rt.agreement import compare_embeds
from upperson_rt.backends import open_backend
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.towers import GRAPH_NAMES, SHORTEST_TEXT, Backend, Tower, run_tower

OPSET = 19
"""QuantizeLinear takes float16 since 19, which int8-fp16 needs; TensorRT 10.3 reads up to 20."""

IR_VERSION = 9
"""The version of opset 19; ONNX Runtime 1.17 reads no later one."""

MAX_FILE_BYTES = 2**31 - 2**24
"""Limit of a tower's weights: protobuf writes no message of 2 GiB, which also has the nodes."""

DYNAMIC_AXES: dict[Tower, dict[int, str]] = {
    "image": {0: "batch"},
    "text": {0: "batch", 1: "length"},
}
"""Dynamic axes of the input, by name."""


def export_onnx(tower: PlainTower, kind: Tower, path: Path, *, example: torch.Tensor) -> TowerGraph:
    """Trace a plain tower in evaluation mode and write one self-contained ONNX file.

    The example is an input of batch 2 or more: a dynamic axis of 1, or of the context's length,
    would become a constant.
    """
    input_name, output_name = GRAPH_NAMES[kind]
    dims = {"batch": Dim("batch", min=1)}
    if kind == "text":
        dims["length"] = Dim("length", min=SHORTEST_TEXT, max=len(tower.get_parameter("positions")))
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter warns about its own internals; parity catches a wrong graph.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # noqa: TID251 - Not ours.
        program = torch.onnx.export(
            tower,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes=({axis: dims[name] for axis, name in DYNAMIC_AXES[kind].items()},),
            optimize=True,
            verbose=False,
        )
    assert program is not None  # only None with the legacy exporter
    model = program.model
    model.ir_version = IR_VERSION
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    ir.passes.Sequential(
        ShapeAfterCast(),
        NameByModule(),
        # Tracebacks of the exporting machine, among others.
        common.ClearMetadataAndDocStringPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
    _check(model)
    ir.save(model, path)
    return TowerGraph(kind, path, described_linears(model, tower), tower.padding_counts)


def require_one_file(tower: PlainTower, kind: Tower) -> None:
    """Raise InputError if a tower's float32 weights do not fit into one ONNX file."""
    size_bytes = sum(weight.numel() * weight.element_size() for weight in tower.parameters())
    if size_bytes > MAX_FILE_BYTES:
        raise InputError(
            f"the {kind} tower has {size_bytes / 2**30:.1f} GiB of weights in float32, and a file "
            "of ONNX holds 2 GiB: choose a smaller base",
            code="tower_too_large",
            tower=kind,
        )


def write_with_weights(graph: TowerGraph, tower: PlainTower, path: Path) -> TowerGraph | None:
    """Write a copy of a graph with the weights of another tower of the same structure.

    The file is that of `export_onnx`, without the trace, which takes most of an export's time. None
    if the exporter merged or renamed a weight.
    """
    model = graph.load()
    initializers = model.graph.initializers
    weights = tower.state_dict()
    if not weights.keys() <= initializers.keys():
        return None
    for name, weight in weights.items():
        initializers[name].const_value = ir.tensor(weight.numpy(), name=name)
    ir.save(model, path)
    return replace(graph, file=path)


def build_variant(
    graph: TowerGraph,
    variant: VariantName,
    amax: Mapping[str, float] | None = None,
    keep_float: Collection[str] = (),
    *,
    largest: Mapping[str, float] | None = None,
) -> ir.Model:
    """Make one variant of a tower from its float32 graph, whose file stays as it is.

    ``amax`` has the range of each tensor that enters a block Linear, for int8; ``keep_float`` names
    MatMul nodes of block Linears that stay in float. ``largest`` has the largest absolute value of
    each float tensor: nodes around one near the end of float16's range compute in float32.

    Raises:
        InputError: A range is missing or not usable, or ``keep_float`` names no block Linear.
    """
    if VARIANTS[variant].int8 and amax is None:
        raise InputError(
            f"the variant '{variant}' needs calibrated ranges: calibrate first",
            code="ranges_missing",
            variant=variant,
        )
    linears = [linear.node for linear in graph.linears]
    if unknown := sorted(set(keep_float) - set(linears)):
        raise InputError(
            f"no block Linear is named {', '.join(unknown)}: the graph has {', '.join(linears)}",
            code="linear_unknown",
            found=unknown,
        )
    given = Tensors(
        linears=[name for name in linears if name not in keep_float],
        amax=amax or {},
        largest=largest,
    )
    return _changed(graph.load(), *VARIANTS[variant].passes(given), common.RemoveUnusedNodesPass())


def simulate_half(typed: ir.Model, accumulated: Collection[str] = ()) -> ir.Model:
    """Turn a typed graph into one that a CPU computes with float16's range and rounding."""
    return _changed(typed, SimulateHalf(accumulated))


def open_simulated(
    path: Path, threads: int | None = None, accumulated: Collection[str] = ()
) -> Backend:
    """Open a typed graph in ONNX Runtime with float16's range and rounding."""
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder, path.name)
        ir.save(simulate_half(ir.load(path), accumulated), half)
        return open_backend(half, "onnxruntime", threads=threads)


def float_type_of(backend: Backend) -> str:
    """Return the float type of a backend, such as ``f32`` or ``bf16``."""
    return str(getattr(backend, "float_type", "f32"))


def _changed(model: ir.Model, *passes: ir.passes.InPlacePass) -> ir.Model:
    for change in passes:
        change(model)
    _check(model)
    return model


def _check(model: ir.Model) -> None:
    """Check that a graph is valid; a copy, because large initializers lose their order."""
    common.CheckerPass()(model.clone())


def described_linears(model: ir.Model, tower: PlainTower) -> tuple[BlockLinear, ...]:
    """Find the block Linears of a tower in its graph, in graph order."""
    sites = {f"{path}.weight": site for path, site in tower.block_linears().items()}
    found = []
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        x, weight = node.inputs
        if x is not None and weight is not None and weight.name in sites:
            found.append(
                BlockLinear(
                    node=str(node.name),
                    activation=str(x.name),
                    weight=weight.name,
                    site=sites.pop(weight.name),
                )
            )
    if sites:
        raise IntegrityError(
            f"the exported graph has no MatMul with '{next(iter(sites))}': report the versions of "
            "torch, onnxscript and onnx"
        )
    return tuple(found)


# --- Passes for every exported graph: readable names, and a Cast alone at a uint8 input

_SCOPES = "pkg.torch.onnx.name_scopes"


class NameByModule(ir.passes.InPlacePass):
    """Name every node ``<module path>/<OpType>``, numbered if a module repeats an operator.

    An output gets its node's name, with ``.1`` and so on for further ones, so that tensor names in
    calibration files are readable and do not depend on the exporter's counters. Weights, inputs and
    outputs of the graph keep their names. A node without a recorded module path belongs to the
    module of its first reader.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename in place."""
        uses: Counter[str] = Counter()
        for node in model.graph:
            name = f"{_module_path(node)}/{node.op_type}".lstrip("/")
            uses[name] += 1
            node.name = name if uses[name] == 1 else f"{name}_{uses[name]}"
            for index, value in enumerate(node.outputs):
                if not value.is_graph_output():
                    value.name = f"{node.name}.{index}" if index else node.name
        return ir.passes.PassResult(model, modified=True)


def _module_path(node: ir.Node) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:
        readers = node.successors()
        return _module_path(readers[0]) if readers else ""
    # A list literal of the enclosing modules, outermost first, then the traced value.
    modules = ast.literal_eval(scopes)[:-1]
    path = str(modules[-1]) if modules else ""
    return "" if path.startswith("_") else path  # the exporter's own helpers


class ShapeAfterCast(ir.passes.InPlacePass):
    """Let Shape nodes read the Cast of an 8-bit graph input instead of the input itself.

    TensorRT takes uint8 at the border of a network only: nothing but a Cast may read it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewire in place."""
        modified = False
        for value in model.graph.inputs:
            casts = [node for node in value.consumers() if node.op_type == "Cast"]
            if value.dtype != ir.DataType.UINT8 or not casts:
                continue
            for node in [node for node in value.consumers() if node.op_type == "Shape"]:
                node.replace_input_with(0, casts[0].outputs[0])
                modified = True
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


# --- Fp16 accumulation: how much of a typed tower's accuracy it costs, and casts against that
#
# TensorRT picks the fastest of its float16 kernels. Some accumulate products in float32, as cuBLAS
# does, others in float16: its release notes promise float32 inside a fused attention only where
# queries, keys and values are cast up. So the worst case is simulated, on a few samples since it is
# slow.

SAMPLES = 4
"""Evenly among those given: ten times as slow as float32, and ViT-B/16 has 123 such products."""

_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
"""Shares of the products, those with the largest errors first, that get casts; tried in turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp16Accumulation:
    """Effect of fp16 accumulation on a typed tower in the worst case."""

    cosine: float
    """Minimum cosine to ONNX Runtime's embeddings from the same file, which an engine is compared
    with; 0 if a sum overflows."""
    min_cosine: float
    """The cosine that is required, or products get casts."""
    float_sums: tuple[str, ...] = ()
    """MatMul nodes that got casts, those with the largest errors first."""


def make_overflow_safe(
    path: Path, tower: Tower, inputs: npt.NDArray[Any], canary_min_cosine: float
) -> Fp16Accumulation:
    """Rewrite an ONNX file so that fp16 accumulation cannot overflow, with as few casts as needed.

    Half of the loss is allowed at which an engine is refused, ``1 - canary_min_cosine``.
    """
    few = inputs[:: max(1, len(inputs) // SAMPLES)][:SAMPLES]
    expected = run_tower(open_backend(path, "onnxruntime"), tower, few)
    products = fp16_products(ir.load(path).graph)
    wanted = (1 + canary_min_cosine) / 2

    def cosine(accumulated: Collection[str]) -> float:
        found = run_tower(open_simulated(path, accumulated=accumulated), tower, few)
        return compare_embeds(expected, found).min_cosine

    worst = cosine(products)
    if worst >= wanted:
        return Fp16Accumulation(cosine=worst, min_cosine=wanted)
    errors = _errors(path, tower, few, products)
    ranked = sorted(products, key=errors.__getitem__, reverse=True)
    for share in _SHARES:
        count = math.ceil(len(products) * share)
        worst = cosine(ranked[count:])
        if worst >= wanted:
            break
    typed = ir.load(path)
    AccumulateInFloat32(ranked[:count])(typed)
    ir.save(typed, path)
    return Fp16Accumulation(cosine=worst, min_cosine=wanted, float_sums=tuple(ranked[:count]))


def _errors(
    path: Path, tower: Tower, inputs: npt.NDArray[Any], products: Collection[str]
) -> dict[str, float]:
    """Return the relative error of each product alone; infinite if it overflows."""
    graph = simulate_half(ir.load(path))
    ShowAccumulationErrors(products)(graph)
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder, path.name)
        ir.save(graph, shown)
        found = open_backend(shown, "onnxruntime").run({GRAPH_NAMES[tower][0]: inputs})
    return {name: float(np.nan_to_num(found[name + ERROR], nan=np.inf)) for name in products}
