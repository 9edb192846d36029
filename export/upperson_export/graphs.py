"""A tower's graphs: the float32 one that torch exports, and each variant made from it.

Tensor names, dynamic axes and node names are the product's interface: see ``docs/interface.md``.
"""

import logging
import math
import tempfile
import warnings
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
from upperson_export.passes.after_export import NameByModule, ShapeAfterCast
from upperson_export.passes.half import ERROR, FloatSums, ShowSumErrors, SimulateHalf, half_products
from upperson_export.plain import PlainTower
from upperson_export.variants import VARIANTS, Tensors, VariantName
from upperson_rt.agreement import compare_embeds
from upperson_rt.backends import open_backend
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.towers import GRAPH_NAMES, SHORTEST_TEXT, Backend, Tower, run_tower

OPSET = 19
"""QuantizeLinear takes float16 since 19, which int8-fp16 needs; TensorRT 10.3 reads up to 20."""

IR_VERSION = 9
"""What opset 19 needs; ONNX Runtime 1.17 reads no later one."""

MOST_FILE_BYTES = 2**31 - 2**24
"""Of weights; protobuf writes no message of 2 GiB, and nodes and names are to fit as well."""

DYNAMIC_AXES: dict[Tower, dict[int, str]] = {
    "image": {0: "batch"},
    "text": {0: "batch", 1: "length"},
}
"""Axes of the input that may have any size, by name."""


def export_onnx(tower: PlainTower, kind: Tower, path: Path, *, example: torch.Tensor) -> TowerGraph:
    """Trace a plain tower and write one self-contained ONNX file.

    Args:
        tower: A plain image or text tower in evaluation mode.
        kind: Which of the two it is.
        path: Where to write.
        example: An input of batch 2 or more; dynamic axes must not be 1 or the context length.

    Returns:
        The file, with the description of the Linears that int8 covers.

    Raises:
        IntegrityError: The exporter changed one of those Linears.
    """
    input_name, output_name = GRAPH_NAMES[kind]
    dims = {"batch": Dim("batch", min=1)}
    if kind == "text":
        dims["length"] = Dim("length", min=SHORTEST_TEXT, max=len(tower.get_parameter("positions")))
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter warns about its own internals; a wrong graph is caught by parity instead.
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
    """Raise InputError if a tower's weights do not fit into one file of ONNX, in float32."""
    size_bytes = sum(weight.numel() * weight.element_size() for weight in tower.parameters())
    if size_bytes > MOST_FILE_BYTES:
        raise InputError(
            f"the {kind} tower has {size_bytes / 2**30:.1f} GiB of weights in float32, and a file "
            "of ONNX holds 2 GiB: choose a smaller base"
        )


def write_with_weights(graph: TowerGraph, tower: PlainTower, path: Path) -> TowerGraph | None:
    """Write a copy of a graph with the weights of another tower of the same structure.

    That is what `export_onnx` would write, without a trace, which takes most of an export's time.

    Returns:
        The copy; None if the exporter merged or renamed a weight, so that it cannot be exchanged.
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

    Args:
        graph: As `export_onnx` gave it.
        variant: What to make.
        amax: For int8: calibrated range by the name of the tensor that enters a block Linear.
        keep_float: Names of block Linears' MatMul nodes that int8 leaves alone.
        largest: For float16: largest absolute value seen of any float tensor, by name. Where it
            comes near the range of float16, the nodes around compute in float32.

    Raises:
        InputError: A range is missing or not usable, or ``keep_float`` names no block Linear.
    """
    if VARIANTS[variant].int8 and amax is None:
        raise InputError(f"the variant '{variant}' needs calibrated ranges: calibrate first")
    linears = [linear.node for linear in graph.linears]
    if unknown := sorted(set(keep_float) - set(linears)):
        raise InputError(
            f"no block Linear is named {', '.join(unknown)}: the graph has {', '.join(linears)}"
        )
    given = Tensors(
        linears=[name for name in linears if name not in keep_float],
        amax=amax or {},
        largest=largest,
    )
    changes = (*VARIANTS[variant].passes(given), common.RemoveUnusedNodesPass())
    return _changed(graph.load(), *changes)


def simulate_half(typed: ir.Model, half_sums: Collection[str] = ()) -> ir.Model:
    """Turn a typed graph into one that a CPU computes with float16's range and rounding.

    Args:
        typed: The graph.
        half_sums: Products that add up in float16; see `SimulateHalf`.
    """
    return _changed(typed, SimulateHalf(half_sums))


def open_simulated(
    path: Path, threads: int | None = None, half_sums: Collection[str] = ()
) -> Backend:
    """Open a typed graph in ONNX Runtime with float16's range and rounding."""
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder, path.name)
        ir.save(simulate_half(ir.load(path), half_sums), half)
        return open_backend(half, "onnxruntime", threads=threads)


def float_type_of(backend: Backend) -> str:
    """Return what it computes floats in, such as ``f32`` or ``bf16``; ONNX Runtime has only f32."""
    return str(getattr(backend, "float_type", "f32"))


def _changed(model: ir.Model, *passes: ir.passes.InPlacePass) -> ir.Model:
    for change in passes:
        change(model)
    _check(model)
    return model


def _check(model: ir.Model) -> None:
    """Ask ONNX whether a graph is valid; a copy, because large initializers lose their order."""
    common.CheckerPass()(model.clone())


def described_linears(model: ir.Model, tower: PlainTower) -> tuple[BlockLinear, ...]:
    """Find the Linears of blocks that a tower says it has in its graph, in graph order.

    Raises:
        IntegrityError: One is not there.
    """
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


# --- Sums in float16: what a typed tower loses by them, and casts where that is too much
#
# TensorRT picks the fastest of its float16 kernels. Some add products up in float32, as cuBLAS
# does, others in float16: its release notes promise float32 inside a fused attention only where
# queries, keys and values are cast up. So the worst case is simulated, on a few samples since it is
# slow.

SAMPLES = 4
"""Evenly among those given: ten times as slow as float32, and ViT-B/16 has 123 such products."""

_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
"""Of all products, those that err most on their own: tried in turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfSums:
    """What sums in float16 do to a typed tower in the worst case."""

    cosine: float
    """Lowest one to what ONNX Runtime makes of the same file, which is what an engine is compared
    with; 0 if a sum overflows."""

    min_cosine: float
    """What it has to reach, or products get casts."""

    float_sums: tuple[str, ...] = ()
    """MatMul nodes that got casts, because the tower would lose too much without, worst first."""


def with_safe_sums(
    path: Path, tower: Tower, inputs: npt.NDArray[Any], canary_min_cosine: float
) -> HalfSums:
    """Put casts around as few products of a typed file as it takes to bear sums in float16.

    Args:
        path: The file; it is written again if there is anything to change.
        tower: Which tower it is.
        inputs: Samples: uint8 [N, H, W, 3] or zero-padded int32 [N, L].
        canary_min_cosine: Where an engine would be refused. Half of that loss is left for all else.
    """
    few = inputs[:: max(1, len(inputs) // SAMPLES)][:SAMPLES]
    expected = run_tower(open_backend(path, "onnxruntime"), tower, few)
    products = half_products(ir.load(path).graph)
    wanted = (1 + canary_min_cosine) / 2

    def cosine(half_sums: Collection[str]) -> float:
        found = run_tower(open_simulated(path, half_sums=half_sums), tower, few)
        return compare_embeds(expected, found).min_cosine

    worst = cosine(products)
    if worst >= wanted:
        return HalfSums(cosine=worst, min_cosine=wanted)
    errors = _errors(path, tower, few, products)
    ranked = sorted(products, key=errors.__getitem__, reverse=True)
    for share in _SHARES:
        count = math.ceil(len(products) * share)
        worst = cosine(ranked[count:])
        if worst >= wanted:
            break
    typed = ir.load(path)
    FloatSums(ranked[:count])(typed)
    ir.save(typed, path)
    return HalfSums(cosine=worst, min_cosine=wanted, float_sums=tuple(ranked[:count]))


def _errors(
    path: Path, tower: Tower, inputs: npt.NDArray[Any], products: Collection[str]
) -> dict[str, float]:
    """Return the relative error of each product's own sums; infinite where one overflows."""
    graph = simulate_half(ir.load(path))
    ShowSumErrors(products)(graph)
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder, path.name)
        ir.save(graph, shown)
        found = open_backend(shown, "onnxruntime").run({GRAPH_NAMES[tower][0]: inputs})
    return {name: float(np.nan_to_num(found[name + ERROR], nan=np.inf)) for name in products}
