"""TensorRT on an NVIDIA GPU, with an engine that `upperson-rt compile` has built and compared."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from upperson_rt.errors import BackendError, UsageError

__all__ = ["TensorRtBackend"]


class TensorRtBackend:
    """The latest engine in the cache that fits the ONNX file, this GPU and this TensorRT.

    Nothing is built here: a build takes minutes and its result has to be compared with ONNX
    Runtime.
    """

    name = "tensorrt"
    max_batch: int | None = None
    """Larger batches than the engine's go through it in pieces that overlap."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "cuda",
        cache: Path | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        """Find the engine, check its hash and load it.

        Args:
            path: The ONNX file that the engine was built from.
            device: ``cuda`` or ``cuda:1``.
            cache: See `cache_folder`, the default.
            cuda_graphs: See `EngineSession`; None does what `$UPPERSON_CUDA_GRAPHS` says.

        Raises:
            UsageError: The variable is neither 0 nor 1.
            BackendError: No driver or GPU, TensorRT missing, or no engine that fits.
            IntegrityError: The engine was changed.
        """
        from upperson_rt.files import sha256_of_file
        from upperson_tensorrt.bindings import device_index, import_tensorrt, open_gpu
        from upperson_tensorrt.cache import EngineCache, Target
        from upperson_tensorrt.session import EngineSession

        if cuda_graphs is None:
            cuda_graphs = _cuda_graphs_wanted()
        self.device = f"cuda:{device_index(device)}"
        cuda = open_gpu(device)  # First: TensorRT can crash the process without a driver.
        trt = import_tensorrt()
        self.version: str = trt.__version__
        store, target = EngineCache(cache), Target.here(trt, cuda)
        try:
            onnx_sha256 = sha256_of_file(path)
        except OSError as error:
            raise BackendError(f"cannot load {os.fspath(path)}: {error.strerror}") from error
        self.record = store.find(Path(path), onnx_sha256, target)
        """What is known about the engine."""
        self._session = EngineSession(trt, cuda, store.load(self.record), cuda_graphs)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engine; see `Backend.run`. Batches may be of any size."""
        expected = self._session.input_name
        if list(inputs) != [expected]:
            raise BackendError(
                f"TensorRT failed: the engine's one input is '{expected}', found "
                f"{', '.join(inputs) or 'none'}"
            )
        return {self._session.output_name: self._session.run(inputs[expected])}


def _cuda_graphs_wanted() -> bool:
    said = os.environ.get("UPPERSON_CUDA_GRAPHS", "0")
    if said not in ("0", "1", ""):
        raise UsageError(f"$UPPERSON_CUDA_GRAPHS must be 1 (on) or 0 (off), found '{said}'")
    return said == "1"
