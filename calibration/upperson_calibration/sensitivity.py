"""Which block Linears cost retrieval when they become int8: what to keep in float first.

Each Linear is rounded alone, the rest of its tower stays in float32, and rankings of captions over
pictures are compared with those of the float32 towers. Cosine losses of single Linears add up
to that of the whole tower nearly exactly, and they need few samples: two dozen are enough for an
order.

One session serves all Linears: weights and rounding steps are initializers that a run may replace.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from upperson_calibration.block_linears import BlockLinear, block_linears, weights_of
from upperson_calibration.estimators import LEVELS
from upperson_calibration.rounding import round_weight
from upperson_calibration.session import batches, open_session
from upperson_rt.agreement import row_cosines, top_k_overlap
from upperson_rt.errors import InputError
from upperson_rt.towers import Tower

Progress = Callable[[int, int], None]
"""Called with (done, total) Linears."""

_NO_STEP = 2.0**-40
"""Rounding to this changes no activation: a power of two, far below what float32 resolves."""


@dataclass(frozen=True, slots=True)
class LayerDamage:
    """What int8 in one Linear alone does to retrieval."""

    node: str
    """Name of the MatMul node."""

    order_loss: float
    """Percent of pairs of pictures that change their order for a caption, mean over captions; 0
    where there is one picture alone, which has no order."""

    overlap_loss: float
    """Percent of the first 10 pictures that are others, mean over captions."""

    cosine_loss: float
    """1 - mean cosine of the tower's embeddings to those in float32."""


def rank_by_damage(
    tower: Tower,
    graph: Path,
    amax: Mapping[str, float],
    inputs: NDArray[Any],
    other_embeds: NDArray[np.float32],
    *,
    batch_size: int = 8,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[LayerDamage]:
    """Rank a tower's block Linears by the damage of int8, most harmful first.

    Takes one pass over the samples for each block Linear.

    Args:
        tower: Which tower ``graph`` is.
        graph: Its float32 ONNX file, smoothed if it is to be shipped smoothed.
        amax: Range of each activation that enters a block Linear.
        inputs: Samples of this tower: uint8 [N, H, W, 3] or zero-padded int32 [N, L].
        other_embeds: float32 embeddings of the other tower's samples, [M, D] of unit length.
        batch_size: Samples run at a time.
        threads: CPU threads; None lets ONNX Runtime choose.
        progress: Told after each Linear.

    Raises:
        InputError: There is no sample.
    """
    model = onnx.load(graph)
    linears = block_linears(model)
    weights = weights_of(model)
    _make_switchable(model, linears)
    session = open_session(model, graph.parent, threads)
    exact = _embed(session, inputs, {}, batch_size)
    found = []
    for done, linear in enumerate(linears, 1):
        # What is zero everywhere stays zero with any step.
        step = amax[linear.activation] / LEVELS or _NO_STEP
        rounded = {
            linear.weight: round_weight(weights[linear.module]),
            f"{linear.node}/step": np.array(step, np.float32),
            f"{linear.node}/low": np.array(-LEVELS, np.float32),
            f"{linear.node}/high": np.array(LEVELS, np.float32),
        }
        embeds = _embed(session, inputs, rounded, batch_size)
        found.append(_damage(linear.node, tower, exact, embeds, other_embeds))
        if progress is not None:
            progress(done, len(linears))
    return sorted(found, key=lambda layer: (-layer.order_loss, -layer.cosine_loss))


def _make_switchable(model: onnx.ModelProto, linears: list[BlockLinear]) -> None:
    """Round each Linear's input by a step that a run may give, and let it replace weights."""
    by_node = {linear.node: linear for linear in linears}
    nodes = []
    for node in model.graph.node:
        if (linear := by_node.get(node.name)) is not None:
            step, low, high = (f"{linear.node}/{name}" for name in ("step", "low", "high"))
            scaled, whole, clipped, back = (
                f"{linear.node}/{name}" for name in ("scaled", "whole", "clipped", "back")
            )
            nodes += [
                helper.make_node("Div", [linear.activation, step], [scaled]),
                helper.make_node("Round", [scaled], [whole]),
                helper.make_node("Clip", [whole, low, high], [clipped]),
                helper.make_node("Mul", [clipped, step], [back]),
            ]
            unlimited = np.finfo(np.float32).max
            for name, value in ((step, _NO_STEP), (low, -unlimited), (high, unlimited)):
                model.graph.initializer.append(
                    numpy_helper.from_array(np.array(value, np.float32), name)
                )
                model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
            node.input[0] = back
        nodes.append(node)
    shapes = {item.name: list(item.dims) for item in model.graph.initializer}
    model.graph.input.extend(
        helper.make_tensor_value_info(linear.weight, TensorProto.FLOAT, shapes[linear.weight])
        for linear in linears
    )
    changed = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(changed)


def _embed(
    session: "onnxruntime.InferenceSession",
    inputs: NDArray[Any],
    replaced: Mapping[str, Any],
    batch_size: int,
) -> NDArray[np.float32]:
    name = session.get_inputs()[0].name
    embeds_ND: NDArray[np.float32] | None = None
    for samples, batch, _ in batches(inputs, batch_size):
        (rows,) = session.run(None, {name: batch, **replaced})
        if embeds_ND is None:
            embeds_ND = np.empty((len(inputs), rows.shape[1]), np.float32)
        embeds_ND[samples] = rows
    if embeds_ND is None:
        raise InputError("sensitivity needs at least one sample, found none")
    return embeds_ND


def _damage(
    node: str,
    tower: Tower,
    exact_ND: NDArray[np.float32],
    embeds_ND: NDArray[np.float32],
    other_MD: NDArray[np.float32],
) -> LayerDamage:
    def scores(embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        texts, images = (other_MD, embeds) if tower == "image" else (embeds, other_MD)
        return texts @ images.T

    exact_TI, scores_TI = scores(exact_ND), scores(embeds_ND)
    return LayerDamage(
        node,
        order_loss=100 * _swapped_pairs(exact_TI, scores_TI),
        overlap_loss=100 * float((1 - top_k_overlap(exact_TI, scores_TI)).mean()),
        cosine_loss=1 - float(row_cosines(exact_ND, embeds_ND).mean()),
    )


def _swapped_pairs(exact_TI: NDArray[np.float32], scores_TI: NDArray[np.float32]) -> float:
    """Return the part of picture pairs that change their order, mean over captions."""
    first, second = np.triu_indices(exact_TI.shape[1], 1)
    if not len(first):
        return 0.0
    # One caption after the other: all pairs of all captions would be large.
    swapped = [
        ((exact_I[first] > exact_I[second]) != (scores_I[first] > scores_I[second])).mean()
        for exact_I, scores_I in zip(exact_TI, scores_TI, strict=True)
    ]
    return float(np.mean(swapped))
