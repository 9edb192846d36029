"""TensorRT as a backend of the runtime; see `upperson_rt.backends.BackendPlugin`."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from upperson_machine.nvidia import probe_cuda_driver
from upperson_rt.checks import OPTIONAL, Check, fail_from_error, failed, ok, warning
from upperson_rt.errors import BackendError, UsageError

runs_any_graph = False


def open(path: str | os.PathLike[str], device: str, threads: int | None) -> "TensorRtBackend":
    """Load the engine of an ONNX file; ``threads`` has no effect."""
    return TensorRtBackend(path, device)


def require_device(device: str) -> None:
    """Raise BackendError if there is no such GPU."""
    from upperson_tensorrt.bindings import open_gpu

    open_gpu(device)


def checks() -> list[Check]:
    """Return a row for ``upperson-rt doctor``."""
    if find_spec("tensorrt") is None:
        return [ok("tensorrt", OPTIONAL)]
    return [_check()]


def _check() -> Check:
    """Check TensorRT and its engines; it is started in a process of its own, which it may crash."""
    from upperson_tensorrt.bindings import import_tensorrt, install_hint, start_problem
    from upperson_tensorrt.cache import EngineCache

    try:
        version = import_tensorrt().__version__
    except BackendError as error:
        return fail_from_error("tensorrt", error)
    facts: dict[str, Any] = {"version": version}
    driver = probe_cuda_driver()
    if not driver.devices:
        reason = driver.problem or "the driver finds no GPU"
        fix = "install the driver, or run the container with --gpus all"
        return warning("tensorrt", f"{version}, which cannot run here: {reason}", fix, **facts)
    cache = EngineCache()
    records, problems = cache.records()
    usable = [record for record in records if record.target.tensorrt == version]
    problem = start_problem()
    if problem is not None:
        advice = f"update the driver, or install TensorRT again: {install_hint()}"
        return failed("tensorrt", f"{version} does not start: {problem}", advice)
    variants = ", ".join(sorted({record.variant for record in usable})) or "none"
    found = f"{version}, engines in {cache.folder}: {len(usable)} for this version ({variants})"
    if len(records) > len(usable):
        found += f", {len(records) - len(usable)} for another"
    facts |= {"engines": len(usable), "cache": str(cache.folder)}
    if problems:
        return warning("tensorrt", f"{found}; {'; '.join(problems)}", "compile again", **facts)
    advice = "" if usable else "upperson-rt compile BUNDLE  builds them"
    return Check("tensorrt", "ok", found, advice, facts=facts)


class TensorRtBackend:
    """The latest engine in the cache that fits the ONNX file, this GPU and this TensorRT."""

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
        """Find the engine, check its hash and load it."""
        from upperson_rt.files import sha256_of_file
        from upperson_tensorrt.bindings import device_index, import_tensorrt, open_gpu
        from upperson_tensorrt.cache import EngineCache, Target
        from upperson_tensorrt.session import EngineSession

        if cuda_graphs is None:
            value = os.environ.get("UPPERSON_CUDA_GRAPHS", "0")
            if value not in ("0", "1", ""):
                message = f"$UPPERSON_CUDA_GRAPHS must be 1 (on) or 0 (off), found '{value}'"
                raise UsageError(message, code="choice_unknown", what="UPPERSON_CUDA_GRAPHS")
            cuda_graphs = value == "1"
        self.device = f"cuda:{device_index(device)}"
        cuda = open_gpu(device)  # First: TensorRT can crash the process without a driver.
        trt = import_tensorrt()
        self.version: str = trt.__version__
        store, target = EngineCache(cache), Target.here(trt, cuda)
        try:
            onnx_sha256 = sha256_of_file(path)
        except OSError as error:
            message = f"cannot load {os.fspath(path)}: {error.strerror}"
            raise BackendError(message, code="graph_not_loaded", path=os.fspath(path)) from error
        self.record = store.find(Path(path), onnx_sha256, target)
        """What is known about the engine."""
        self._session = EngineSession(trt, cuda, store.load(self.record), cuda_graphs)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engine; see `Backend.run`. Batches may be of any size."""
        expected = self._session.input_name
        if list(inputs) != [expected]:
            raise BackendError(
                f"TensorRT failed: the engine's one input is '{expected}', found "
                f"{', '.join(inputs) or 'none'}",
                code="run_failed",
            )
        return {self._session.output_name: self._session.run(inputs[expected])}
