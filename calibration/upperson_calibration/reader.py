"""Feed calibration inputs to ONNX Runtime's calibrators batch by batch."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization import CalibrationDataReader

Progress = Callable[[int, int], None]
"""Called with (done, total) samples."""


class BatchReader(CalibrationDataReader):  # type: ignore[misc]
    """Yields ``{name: rows}`` over an array.

    Text rows are cut to the longest of their batch, so that padding, which no query at run time
    has, does not set ranges.

    Args:
        name: Input name of the graph.
        rows: Samples along the first axis.
        batch_size: Rows of a batch.
        progress: Told after each batch was taken.
    """

    def __init__(
        self,
        name: str,
        rows: npt.NDArray[Any],
        *,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> None:
        self._batches = self._iterate(name, rows, batch_size, progress)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """Return the next batch, or None at the end."""
        return next(self._batches, None)

    @staticmethod
    def _iterate(
        name: str, rows: npt.NDArray[Any], batch_size: int, progress: Progress | None
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            if batch.ndim == 2:
                batch = batch[:, : int(np.flatnonzero(batch.any(axis=0))[-1]) + 1]
            yield {name: batch}
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows))
