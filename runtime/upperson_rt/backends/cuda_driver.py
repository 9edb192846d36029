"""A look at the NVIDIA driver through its own library, without loading CUDA or TensorRT.

TensorRT can crash the process on a machine without a driver, so this comes first.
"""

import ctypes
from dataclasses import dataclass

__all__ = ["CudaDriver", "probe_cuda_driver"]


@dataclass(frozen=True)
class CudaDriver:
    """A driver that answered, or the reason why none did."""

    version: str | None
    """Highest CUDA version it supports, such as ``12.6``; None when it does not work."""
    devices: tuple[str, ...] = ()
    """Names of the GPUs."""
    problem: str | None = None
    """Why `version` is None."""


def probe_cuda_driver() -> CudaDriver:
    """Ask the driver for its version and GPUs; never raises."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return CudaDriver(None, problem="no NVIDIA driver (libcuda.so.1 is not there)")
    status = cuda.cuInit(0)
    if status != 0:
        return CudaDriver(None, problem=f"the NVIDIA driver does not start (cuInit gave {status})")
    version = ctypes.c_int()
    count = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return CudaDriver(None, problem="the NVIDIA driver does not answer")
    names = []
    for index in range(count.value):
        device = ctypes.c_int()
        name = ctypes.create_string_buffer(128)
        failed = cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDeviceGetName(
            name, len(name), device
        )
        names.append("unknown GPU" if failed else name.value.decode("utf-8", "replace"))
    major, minor = version.value // 1000, version.value % 1000 // 10
    return CudaDriver(f"{major}.{minor}", tuple(names))
