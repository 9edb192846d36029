"""What of a machine with an NVIDIA GPU is there: the card, and what runs on it.

Each ``missing_...`` returns why something cannot be used here, or nothing: the benchmark leaves it
out with that reason, and tests skip with it. What is there but broken is found by using it.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from upperson_machine.nvidia import probe_cuda_driver
from upperson_onnxruntime.backend import cuda_advice
from upperson_rt.errors import BackendError, missing_extra
from upperson_tensorrt.bindings import import_tensorrt

_TRTEXEC = Path("/usr/src/tensorrt/bin/trtexec")
"""Where NVIDIA's Debian packages, and with them JetPack, put it; not on the PATH."""


def missing_gpu() -> str:
    """Return why there is no GPU."""
    driver = probe_cuda_driver()
    return driver.problem or ("" if driver.devices else "the driver finds no GPU")


def missing_torch() -> str:
    """Return why torch cannot use the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of a driver that is too old.
        if torch.cuda.is_available():
            return ""
    return (
        f"torch {torch.__version__} sees no CUDA device: install a build of torch for CUDA "
        f"{probe_cuda_driver().version} or earlier"
    )


def missing_onnxruntime() -> str:
    """Return why ONNX Runtime cannot use the GPU."""
    try:
        import onnxruntime
    except ImportError:
        return str(missing_extra("onnxruntime", "gpu", "ONNX Runtime on a GPU"))
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return ""
    return f"onnxruntime {onnxruntime.__version__} has no CUDA: {cuda_advice()}"


def missing_tensorrt() -> str:
    """Return why TensorRT cannot be used."""
    try:
        import_tensorrt()
    except BackendError as error:
        return str(error)
    return ""


def find_trtexec() -> str | None:
    """Return where TensorRT's own benchmark is."""
    return shutil.which("trtexec") or (str(_TRTEXEC) if _TRTEXEC.is_file() else None)


def missing_trtexec() -> str:
    """Return why trtexec cannot be run."""
    return "" if find_trtexec() else f"neither on the PATH nor at {_TRTEXEC}"


LIBRARIES: Mapping[str, Callable[[], str]] = {
    "torch": missing_torch,
    "ONNX Runtime": missing_onnxruntime,
    "TensorRT": missing_tensorrt,
    "trtexec": missing_trtexec,
}
"""What is compared, and what says why it is not there."""
