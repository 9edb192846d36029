"""NVIDIA's driver library and its GPUs."""

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong
from ctypes import c_void_p as c_handle
from dataclasses import dataclass
from typing import Any

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_handle), c_int),
    "cuCtxPushCurrent_v2": (c_handle,),
    "cuCtxPopCurrent_v2": (POINTER(c_handle),),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (POINTER(c_handle), c_size_t, c_uint),
    "cuMemFreeHost": (c_handle,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_handle, c_uint),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_handle, c_size_t, c_handle),
    "cuMemcpyDtoHAsync_v2": (c_handle, c_uint64, c_size_t, c_handle),
    "cuStreamCreate": (POINTER(c_handle), c_uint),
    "cuStreamDestroy_v2": (c_handle,),
    "cuStreamSynchronize": (c_handle,),
    "cuStreamBeginCapture_v2": (c_handle, c_int),
    "cuStreamEndCapture": (c_handle, POINTER(c_handle)),
    "cuGraphInstantiateWithFlags": (POINTER(c_handle), c_handle, c_ulonglong),
    "cuGraphLaunch": (c_handle, c_handle),
    "cuGraphExecDestroy": (c_handle,),
    "cuGraphDestroy": (c_handle,),
}
"""Types of the arguments of each function used; every one returns a CUresult, an int."""


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
    """Query the driver for its version and GPUs; never raises.

    It loads neither CUDA nor TensorRT, which can crash the process on a machine without a driver.
    """
    try:
        cuda = bound_library()
    except OSError:
        return CudaDriver(None, problem="no NVIDIA driver (libcuda.so.1 is not there)")
    except AttributeError as error:
        return CudaDriver(None, problem=f"the NVIDIA driver is older than CUDA 11.4 ({error})")
    status = cuda.cuInit(0)
    if status != 0:
        return CudaDriver(None, problem=f"the NVIDIA driver does not start (cuInit gave {status})")
    version, count = c_int(), c_int()
    if cuda.cuDriverGetVersion(byref(version)) or cuda.cuDeviceGetCount(byref(count)):
        return CudaDriver(None, problem="the NVIDIA driver does not answer")
    names = []
    for index in range(count.value):
        device, name = c_int(), ctypes.create_string_buffer(128)
        failed = cuda.cuDeviceGet(byref(device), index) or cuda.cuDeviceGetName(
            name, len(name), device
        )
        names.append("unknown GPU" if failed else name.value.decode("utf-8", "replace"))
    release = f"{version.value // 1000}.{version.value % 1000 // 10}"  # CUDA's 12060 is 12.6.
    return CudaDriver(release, tuple(names))


def bound_library() -> ctypes.CDLL:
    """Load libcuda with its `SIGNATURES`.

    Raises OSError without a driver, AttributeError on an old one.
    """
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, c_int
    return library
