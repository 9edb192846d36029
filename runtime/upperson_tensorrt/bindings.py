"""The `tensorrt` package: loaded only where it can work, and explained where it cannot."""

import ctypes
import functools
import os
import platform
import re
import signal
import subprocess
import sys
from collections import deque
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from upperson_machine.nvidia import probe_cuda_driver
from upperson_rt.errors import JETPACK_ADVICE, BackendError, jetson_line
from upperson_rt.printable import one_line, safe_repr
from upperson_tensorrt.cuda import Cuda

OLDEST_VERSION = (10, 3)
"""JetPack 6 has this one."""

_START_SECONDS = 60


def import_tensorrt() -> ModuleType:
    """Import the bindings. Safe without a driver, as long as nothing of them is then used."""
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise BackendError(
                f"the tensorrt package is incomplete ({error}): {install_hint()}",
                code="tensorrt_incomplete",
            ) from error
        message = f"TensorRT is not installed: {install_hint()}"
        raise BackendError(message, code="tensorrt_missing") from error
    except (ImportError, OSError) as error:  # The bindings are there, the library is not.
        problem = one_line(error)
        raise BackendError(
            f"TensorRT is installed but does not load ({problem}): {install_hint()}",
            code="tensorrt_not_loaded",
        ) from error
    version = getattr(tensorrt, "__version__", None)
    if version is None:  # A folder of that name, or what an uninstall left behind.
        message = f"the package 'tensorrt' found here is not TensorRT's: {install_hint()}"
        raise BackendError(message, code="tensorrt_incomplete")
    numbers = version.split(".")
    if tuple(int(n) if n.isdigit() else 0 for n in numbers[:2]) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise BackendError(
            f"TensorRT {version} is too old, {oldest} or later is needed (JetPack 6.1 has it): "
            f"{install_hint()}",
            code="tensorrt_too_old",
            version=version,
        )
    _require_cuda(version)
    module: ModuleType = tensorrt
    return module


def install_hint() -> str:
    """Return the command for the TensorRT that suits this machine and its driver."""
    if jetson_line() is not None:
        return JETPACK_ADVICE
    cuda = _driver_cuda()
    package = "tensorrt-cu13" if cuda is not None and cuda >= 13 else "tensorrt-cu12"
    hint = f"pip install {package}"
    if cuda is None:
        hint += "  (tensorrt-cu13 for a driver of CUDA 13 or later)"
    return f"{hint}; on a Jetson {JETPACK_ADVICE}" if platform.machine() == "aarch64" else hint


def _driver_cuda() -> int | None:
    version = probe_cuda_driver().version
    return None if version is None else int(version.partition(".")[0])


def _require_cuda(version: str) -> None:
    """Refuse a TensorRT for a newer CUDA than the driver's; JetPack's own belongs to the driver."""
    cuda = _driver_cuda()
    found = []
    for n in (12, 13):
        with suppress(metadata.PackageNotFoundError):
            metadata.version(f"tensorrt-cu{n}-bindings")
            found.append(n)
    if len(found) > 1:
        raise BackendError(
            "TensorRT is installed for CUDA 12 and for CUDA 13, one over the other: "
            "pip uninstall both (pip list | grep tensorrt), then " + install_hint(),
            code="tensorrt_twice",
        )
    if cuda is not None and found and found[0] > cuda:
        raise BackendError(
            f"TensorRT {version} here is for CUDA {found[0]}, but the driver only goes up to CUDA "
            f"{probe_cuda_driver().version}: update the driver, or uninstall it (pip list | grep "
            f"tensorrt) and {install_hint()}",
            code="tensorrt_too_new",
            cuda=cuda,
        )


def start_problem() -> str | None:
    """Start TensorRT in a process of its own, which it may crash; return what failed, or None."""
    root = Path(__file__).parents[2]  # Where this package is, for a process that does not know.
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    code = f"from {__name__} import _start; _start()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_START_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it does not start within {_START_SECONDS} seconds"
    if done.returncode == 0:
        return None
    text = done.stdout.decode("utf-8", "replace")
    errors = re.findall(r"(?m)^(?:\[[^\]]*\] )?\[TRT\] \[[EF]\] (.*)", text)
    reason = "; ".join(dict.fromkeys(errors or text.split("\n")[-2:-1]))
    if done.returncode < 0:
        died = f"it ended its process with {signal.Signals(-done.returncode).name}"
        return f"{died} ({reason})" if reason else died
    return reason or f"exit code {done.returncode}"


def _start() -> None:
    """Only for `start_problem`: what TensorRT says goes to stdout and stderr."""
    trt = import_tensorrt()
    trt.Runtime(trt.Logger(trt.Logger.WARNING))


def device_index(device: str) -> int:
    """Return N of the device ``cuda:N``, 0 for ``cuda``."""
    kind, colon, index = device.partition(":")
    if kind != "cuda" or (colon and not index.isdigit()):
        raise BackendError(
            f"the backend 'tensorrt' has no device {safe_repr(device)}: say  --device cuda  or "
            "cuda:N",
            code="device_unknown",
            device=device,
        )
    return int(index or 0)


def open_gpu(device: str) -> Cuda:
    """Open the GPU ``cuda`` or ``cuda:N``, before TensorRT can crash for want of a driver."""
    return Cuda(device_index(device))


class TensorRtLog:
    """Where TensorRT reports: `logger` and `recorder` are what its objects are given.

    Its own logger writes to stdout, so it stays silent; a Python logger would get hundreds of
    thousands of lines of a build. Reasons of failures come through the recorder, which gets errors
    only.
    """

    def __init__(self, trt: ModuleType, layers: bool) -> None:
        self._messages: deque[str] = deque(maxlen=20)
        self.layers = ""
        """The latest table of an engine's layers, a line each; with ``layers`` alone."""
        self.logger = _layer_logger(trt, self) if layers else trt.Logger(trt.Logger.INTERNAL_ERROR)
        self.recorder = _error_recorder(trt, self._messages)
        for thing in (self.logger, self.recorder):
            # TensorRT's objects may go after this module has gone, and still use them.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))

    def take_errors(self) -> str:
        """Return the errors since the last call as one line, and forget them."""
        errors = "; ".join(dict.fromkeys(self._messages)) or "no reason given"
        self._messages.clear()
        return errors


@functools.cache
def trt_log(trt: ModuleType, layers: bool = False) -> TensorRtLog:
    """Return the process's one log of a module: TensorRT keeps the first logger that it gets."""
    return TensorRtLog(trt, layers)


def _error_recorder(trt: ModuleType, messages: deque[str]) -> Any:
    class Recorder(trt.IErrorRecorder):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._codes: deque[Any] = deque(maxlen=messages.maxlen)

        def report_error(self, code: Any, description: str) -> bool:
            self._codes.append(code)
            messages.append(" ".join(description.split()))
            return True  # The function that failed ends.

        def num_errors(self) -> int:
            return len(messages)

        def get_error_code(self, index: int) -> Any:
            return self._codes[index]

        def get_error_desc(self, index: int) -> str:
            return messages[index]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            messages.clear()

    return Recorder()


def _layer_logger(trt: ModuleType, log: TensorRtLog) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                log.layers = message

    return Logger()
