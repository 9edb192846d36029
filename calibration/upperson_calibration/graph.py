"""A tower's float32 graph for calibration: the Linears that int8 covers, and samples through it.

The exporter describes the Linears; calibration knows no names of its own.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from upperson_onnxruntime.backend import session_options
from upperson_rt.encoder import Progress
from upperson_rt.errors import InputError
from upperson_rt.tokenizer import token_lengths
from upperson_rt.towers import Tower, batch_slices


@dataclass(frozen=True, slots=True)
class BlockLinear:
    """A Linear of a transformer block; int8 covers these alone."""

    node: str
    """Name of its MatMul node."""
    activation: str
    """Name of the tensor [N, L, in] that enters."""
    weight: str
    """Name of the initializer [in, out]."""
    site: str | None
    """The producer of the activation, such as a norm and its adapter, that takes a factor for each
    channel; several Linears may share one. None: there is none."""


@dataclass(frozen=True, slots=True)
class TowerGraph:
    """A float32 ONNX file of a tower, described by the exporter."""

    tower: Tower
    file: Path
    linears: tuple[BlockLinear, ...]
    """In graph order."""
    padding_counts: bool = False
    """Whether the graph pads captions itself, and attends to the padding."""

    def load(self) -> ir.Model:
        """Read the file."""
        return ir.load(self.file)


def array_of(value: ir.Value) -> NDArray[Any]:
    """Return the values of an initializer."""
    assert value.const_value is not None  # An initializer has values.
    return value.const_value.numpy()


def constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Return the initializer of that name, adding it if it is missing."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def new_node(
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    name: str,
    result: str | None = None,
    dtype: ir.DataType | None = None,
    shape: ir.Shape | None = None,
) -> tuple[ir.Node, ir.Value]:
    """Make a node with one output, named ``result`` or as the node; the caller inserts it."""
    node = ir.node(operator, inputs, attributes, name=name)
    value = node.outputs[0]
    value.name, value.shape = result or name, shape
    if dtype is not None:
        value.dtype = dtype
    return node, value


class ObservedBatch(NamedTuple):
    """A batch of samples and the graph's outputs."""

    samples: NDArray[np.int64]
    """Their places among all samples, [B]."""
    inputs: NDArray[Any]
    """uint8 [B, H, W, 3], or int32 [B, L] padded to the longest."""
    lengths: NDArray[np.int64] | None
    """Tokens of each caption, [B]; None for pictures, and where padding counts."""
    outputs: list[NDArray[Any]]


class SampleStream:
    """Streams samples through a changed graph in ONNX Runtime on the CPU.

    Captions run sorted by length, so that little padding is computed. The file of the graph stays
    as it is: a changed copy lies beside it while it is opened. Memory is proportional to the batch.
    """

    def __init__(
        self,
        graph: TowerGraph,
        inputs: NDArray[Any],
        change: Callable[[ir.Graph], None],
        *,
        batch_size: int,
        threads: int | None,
    ) -> None:
        if not len(inputs):
            raise InputError("calibration needs at least one sample, found none", code="no_samples")
        self._inputs = inputs
        self._padding_counts = graph.padding_counts
        self._batch_size = batch_size
        options = session_options(onnxruntime, threads)
        # Its arena would keep the largest batch's memory several times over.
        options.enable_cpu_mem_arena = False
        # Its default order runs reductions of inner tensors last, and keeps all of them until then.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        with tempfile.TemporaryDirectory(dir=graph.file.parent, prefix=".calibration.") as folder:
            file = Path(folder, "graph.onnx")
            model = graph.load()
            change(model.graph)
            # Weights in a file of their own are written one by one, and the session maps them.
            ir.save(model, file, external_data="weights")
            del model  # Its weights go before a session takes its own.
            self._session = onnxruntime.InferenceSession(
                file, options, providers=["CPUExecutionProvider"]
            )

    def run(
        self,
        outputs: Sequence[str] | None = None,
        *,
        replaced: Mapping[str, NDArray[Any]] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[ObservedBatch]:
        """Run all samples, batch by batch, and compute the outputs named, by default all.

        Further inputs of the graph may be replaced.
        """
        inputs, name = self._inputs, self._session.get_inputs()[0].name
        lengths = token_lengths(inputs) if inputs.ndim == 2 else None
        order = np.arange(len(inputs)) if lengths is None else np.argsort(lengths, kind="stable")
        for rows in batch_slices(len(inputs), self._batch_size):
            samples = order[rows]
            own = None if lengths is None else lengths[samples]
            batch = inputs[rows] if own is None else inputs[samples, : own.max()]
            found = self._session.run(outputs, {name: batch, **(replaced or {})})
            yield ObservedBatch(samples, batch, None if self._padding_counts else own, found)
            if progress is not None:
                progress(rows.stop, len(inputs))
