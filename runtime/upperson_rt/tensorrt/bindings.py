"""The `tensorrt` package: loaded only where it can work, and explained where it cannot."""

import functools
import logging
from collections import deque
from types import ModuleType
from typing import Any

from upperson_rt.errors import BackendError
from upperson_rt.tensorrt.cuda import Cuda, probe_cuda_driver

__all__ = [
    "OLDEST_VERSION",
    "TensorRtLog",
    "device_index",
    "import_tensorrt",
    "open_gpu",
    "trt_log",
]

OLDEST_VERSION = (10, 3)
"""Of JetPack 6."""

_INSTALL = (
    "on a Jetson install JetPack's own (sudo apt install python3-libnvinfer, and make the virtual "
    "environment with --system-site-packages); elsewhere run  pip install tensorrt "
    "--extra-index-url https://pypi.nvidia.com"
)


def import_tensorrt() -> ModuleType:
    """Import the bindings. Safe without a driver, as long as nothing of them is then used.

    Raises:
        BackendError: They are not installed, do not load, or are older than 10.3.
    """
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise BackendError(
                f"the tensorrt package is incomplete ({error}): {_INSTALL}"
            ) from error
        raise BackendError(f"TensorRT is not installed: {_INSTALL}") from error
    except (ImportError, OSError) as error:  # The bindings are there, the library is not.
        problem = " ".join(str(error).split())
        raise BackendError(
            f"TensorRT is installed but does not load ({problem}): {_INSTALL}"
        ) from error
    version = getattr(tensorrt, "__version__", None)
    if version is None:  # A folder of that name, or what an uninstall left behind.
        raise BackendError(f"the package 'tensorrt' found here is not TensorRT's: {_INSTALL}")
    numbers = version.split(".")
    if tuple(int(n) if n.isdigit() else 0 for n in numbers[:2]) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise BackendError(
            f"TensorRT {version} is too old, {oldest} or later is needed (JetPack 6.1 has it): "
            f"{_INSTALL}"
        )
    module: ModuleType = tensorrt
    return module


def device_index(device: str) -> int:
    """Return N of the device ``cuda:N``, 0 for ``cuda``.

    Raises:
        BackendError: Anything else.
    """
    kind, colon, index = device.partition(":")
    if kind != "cuda" or (colon and not index.isdigit()):
        raise BackendError(
            f"the backend 'tensorrt' has no device '{device}': say  --device cuda  or cuda:N"
        )
    return int(index or 0)


def open_gpu(device: str) -> Cuda:
    """Open a GPU. Comes before any use of TensorRT, which can crash the process without a driver.

    Args:
        device: ``cuda`` or ``cuda:N``.

    Raises:
        BackendError: There is no such device, or no working driver.
    """
    index = device_index(device)
    driver = probe_cuda_driver()
    if driver.problem is not None:
        raise BackendError(
            f"TensorRT needs an NVIDIA GPU, but {driver.problem}: install the driver, or run the "
            "container with --gpus all"
        )
    if index >= len(driver.devices):
        found = ", ".join(f"cuda:{i} {name}" for i, name in enumerate(driver.devices)) or "none"
        raise BackendError(f"device '{device}' is not there; GPUs found: {found}")
    return Cuda(index)


class TensorRtLog:
    """The latest warnings and errors of TensorRT, which reports the reason of a failure there."""

    def __init__(self) -> None:
        """Start empty."""
        self._messages: deque[str] = deque(maxlen=20)
        self.layers = ""
        """The latest table of an engine's layers, a line each; TensorRT for RTX logs it."""

    def add(self, message: str, is_error: bool) -> None:
        """Keep an error; hand a warning on to logging."""
        text = " ".join(message.split())
        logging.getLogger("upperson_rt.tensorrt").info("%s", text)
        if is_error:
            self._messages.append(text)

    def take_errors(self) -> str:
        """Return the errors since the last call as one line, and forget them."""
        errors = "; ".join(dict.fromkeys(self._messages)) or "no reason given"
        self._messages.clear()
        return errors


@functools.cache
def trt_log(trt: ModuleType) -> tuple[Any, TensorRtLog]:
    """Return the process's one logger for TensorRT, which keeps the first it gets, and its log."""
    log = TensorRtLog()

    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                log.add(message, is_error=True)
            elif severity == trt.ILogger.WARNING:
                log.add(message, is_error=False)
            elif message.startswith("Layers:"):
                log.layers = message

    return Logger(), log
