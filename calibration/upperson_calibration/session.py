"""Open a changed float32 graph in ONNX Runtime without a second copy of its weights."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from upperson_rt.tokenizer import token_lengths


def open_session(
    model: onnx.ModelProto, folder: Path, threads: int | None
) -> "onnxruntime.InferenceSession":
    """Open a model on the CPU.

    Args:
        model: Emptied on the way, to free its weights before the session takes its own.
        folder: Where a temporary file may lie for a moment.
        threads: CPU threads; None lets ONNX Runtime choose.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Its arena would keep the largest batch's memory several times over.
    options.enable_cpu_mem_arena = False
    # Its default order runs reductions of inner tensors last, and keeps all of them until then.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if threads is not None:
        options.intra_op_num_threads = threads
    handle, name = tempfile.mkstemp(suffix=".onnx", dir=folder, prefix=".calibration.")
    os.close(handle)
    try:
        onnx.save(model, name)
        model.Clear()
        return onnxruntime.InferenceSession(name, options, providers=["CPUExecutionProvider"])
    finally:
        Path(name).unlink(missing_ok=True)


def batches(
    inputs: NDArray[Any], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any], NDArray[np.int64] | None]]:
    """Cut samples into batches; captions sorted by length, so that little padding is computed.

    Args:
        inputs: uint8 [N, H, W, 3] or zero-padded int32 [N, L].
        batch_size: Samples of a batch.

    Yields:
        Indices of the samples, the batch, and each caption's number of tokens (None for pictures).
    """
    if inputs.ndim != 2:
        for start in range(0, len(inputs), batch_size):
            batch = inputs[start : start + batch_size]
            yield np.arange(start, start + len(batch)), batch, None
        return
    lengths = token_lengths(inputs)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(inputs), batch_size):
        samples = order[start : start + batch_size]
        yield samples, inputs[samples, : lengths[samples].max()], lengths[samples]
