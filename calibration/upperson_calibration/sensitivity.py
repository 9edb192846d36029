"""Layer sensitivity: how much retrieval loses when one block Linear alone becomes int8.

The rest of the tower stays in float32, and rankings of captions over pictures are compared with
those of the float32 towers. Cosine losses of single Linears add up to that of the whole tower
nearly exactly, and need few samples: two dozen are enough to rank the Linears.

One session serves all Linears: weights and rounding steps are initializers that a run may replace.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from upperson_adapter.weights import LEVELS
from upperson_calibration.graph import (
    BlockLinear,
    SampleStream,
    TowerGraph,
    array_of,
    constant,
    new_node,
)
from upperson_calibration.ranges import round_weight
from upperson_rt.agreement import row_cosines
from upperson_rt.encoder import Progress
from upperson_rt.towers import Tower
from upperson_scores.rankings import top_k_overlap

_NO_STEP = 2.0**-40
"""A step that changes no activation: a power of two, far below float32's resolution."""


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """Loss of retrieval by int8 in one Linear alone."""

    node: str
    order_loss: float
    """Percent of pairs of pictures that change their order for a caption, mean over captions; 0
    for one picture."""
    overlap_loss: float
    """Percent of the first 10 pictures that change, mean over captions."""
    cosine_loss: float
    """1 - mean cosine of the tower's embeddings to those in float32."""


def rank_by_sensitivity(
    graph: TowerGraph,
    amax: Mapping[str, float],
    inputs: NDArray[Any],
    other_embeds: NDArray[np.float32],
    *,
    batch_size: int = 8,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[LayerSensitivity]:
    """Rank a tower's block Linears by their sensitivity to int8, most sensitive first.

    Takes one pass over the samples for each block Linear. ``other_embeds`` are the float32
    embeddings [M, D] of the other tower's samples; ``progress`` is called after each Linear.
    """
    weights: dict[str, NDArray[np.float32]] = {}

    def change(changed: ir.Graph) -> None:
        for linear in graph.linears:
            weights[linear.weight] = array_of(changed.initializers[linear.weight])
        _make_switchable(changed, graph.linears)

    stream = SampleStream(graph, inputs, change, batch_size=batch_size, threads=threads)
    exact = _embed(stream, len(inputs), {})
    found = []
    for done, linear in enumerate(graph.linears, 1):
        # A tensor of zeros stays zero with any step.
        step = amax[linear.activation] / LEVELS or _NO_STEP
        replaced = {
            linear.weight: round_weight(weights[linear.weight]),
            f"{linear.node}/step": np.array(step, np.float32),
            f"{linear.node}/low": np.array(-LEVELS, np.float32),
            f"{linear.node}/high": np.array(LEVELS, np.float32),
        }
        embeds = _embed(stream, len(inputs), replaced)
        found.append(_sensitivity(linear.node, graph.tower, exact, embeds, other_embeds))
        if progress is not None:
            progress(done, len(graph.linears))
    return sorted(found, key=lambda layer: (-layer.order_loss, -layer.cosine_loss))


def _make_switchable(graph: ir.Graph, linears: Sequence[BlockLinear]) -> None:
    """Round each Linear's input by a step that a run may give, and let it replace weights."""
    nodes = {node.name: node for node in graph}
    for linear in linears:
        matmul = nodes[linear.node]
        unlimited = float(np.finfo(np.float32).max)
        step, low, high = (
            constant(graph, f"{linear.node}/{name}", np.array(value, np.float32))
            for name, value in (("step", _NO_STEP), ("low", -unlimited), ("high", unlimited))
        )
        graph.inputs.extend([step, low, high])  # A run may replace what is also an input.
        value = matmul.inputs[0]
        for name, operator, others in (
            ("scaled", "Div", [step]),
            ("whole", "Round", []),
            ("clipped", "Clip", [low, high]),
            ("back", "Mul", [step]),
        ):
            node, value = new_node(operator, [value, *others], name=f"{linear.node}/{name}")
            graph.insert_before(matmul, node)
        matmul.replace_input_with(0, value)
        graph.inputs.append(graph.initializers[linear.weight])


def _embed(
    stream: SampleStream, count: int, replaced: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return the embeddings [count, D] of all samples."""
    embeds_ND = np.empty((0, 0), np.float32)
    for batch in stream.run(replaced=replaced):
        (rows,) = batch.outputs
        if not embeds_ND.size:
            embeds_ND = np.empty((count, rows.shape[1]), np.float32)
        embeds_ND[batch.samples] = rows
    return embeds_ND


def _sensitivity(
    node: str,
    tower: Tower,
    exact_ND: NDArray[np.float32],
    embeds_ND: NDArray[np.float32],
    other_MD: NDArray[np.float32],
) -> LayerSensitivity:
    def scores(embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        texts, images = (other_MD, embeds) if tower == "image" else (embeds, other_MD)
        return texts @ images.T

    exact_TI, scores_TI = scores(exact_ND), scores(embeds_ND)
    return LayerSensitivity(
        node,
        order_loss=100 * _swapped_pairs(exact_TI, scores_TI),
        overlap_loss=100 * float((1 - top_k_overlap(exact_TI, scores_TI)).mean()),
        cosine_loss=1 - float(row_cosines(exact_ND, embeds_ND).mean()),
    )


def _swapped_pairs(exact_TI: NDArray[np.float32], scores_TI: NDArray[np.float32]) -> float:
    """Return the share of picture pairs that change their order, mean over captions."""
    first, second = np.triu_indices(exact_TI.shape[1], 1)
    if not len(first):
        return 0.0
    # One caption at a time: all pairs of all captions would be large.
    swapped = [
        ((exact_I[first] > exact_I[second]) != (scores_I[first] > scores_I[second])).mean()
        for exact_I, scores_I in zip(exact_TI, scores_TI, strict=True)
    ]
    return float(np.mean(swapped))
