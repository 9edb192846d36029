"""Sums in float16: what a typed tower loses by them, and casts where that is too much.

TensorRT picks the fastest of its float16 kernels. Some add products up in float32, as cuBLAS does,
others in float16: its release notes promise float32 inside a fused attention only where queries,
keys and values are cast up. So the worst case is simulated, on a few samples since it is slow.
"""

import math
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from upperson_export.graphs import open_simulated, simulate_half
from upperson_export.passes.half import ERROR, FloatSums, ShowSumErrors, half_products
from upperson_rt.agreement import compare_embeds
from upperson_rt.backends import open_backend
from upperson_rt.towers import GRAPH_NAMES, Tower, run_tower

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
