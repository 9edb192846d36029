"""Memory, streams and graphs of an NVIDIA GPU through the driver's own library.

libcuda comes with the driver, so nothing has to be installed. It shares the device's primary
context, and with it memory and streams, with TensorRT, torch and everything else on libcudart.
Names and signatures are those of `cuda.h`; a name with ``_v2`` is what its macros stand for.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_uint64
from ctypes import c_void_p as c_handle
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_machine.nvidia import bound_library, probe_cuda_driver
from upperson_rt.errors import BackendError

CONSTANTS = {
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": 75,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": 76,
    "CU_DEVICE_ATTRIBUTE_INTEGRATED": 18,
    "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": 16,
    "CU_MEMHOSTALLOC_DEVICEMAP": 2,
    "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": 1,
    "CU_STREAM_NON_BLOCKING": 1,
}
"""Each one used, by its name in `cuda.h`."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it."""

    index: int
    name: str
    compute_capability: str
    """Such as ``8.7``."""
    multiprocessors: int
    """Boards of one name can differ in this: all Jetson Orin modules are called Orin."""
    driver: str
    """Highest CUDA version the driver supports, such as ``12.6``."""
    integrated: bool
    """It shares the memory of the processor, as on a Jetson."""


@dataclass(frozen=True)
class StagedBuffer:
    """Page-locked host memory, and device memory of the same size or the same memory again."""

    host: NDArray[np.uint8]
    """(nbytes,); a view of the page-locked memory."""
    host_address: int
    device_address: int
    mapped: bool
    """Both are one memory: there is nothing to copy."""


class Cuda:
    """One GPU. Methods may be called from any thread; they make the device current themselves."""

    def __init__(self, index: int = 0) -> None:
        """Start the driver and take the primary context, which stays until the process ends."""
        driver = probe_cuda_driver()
        if driver.version is None:
            raise BackendError(
                f"TensorRT needs an NVIDIA GPU, but {driver.problem}: install the driver, or run "
                "the container with --gpus all",
                code="no_driver",
            )
        if index >= len(driver.devices):
            found = ", ".join(f"cuda:{i} {name}" for i, name in enumerate(driver.devices)) or "none"
            message = f"device 'cuda:{index}' is not there; GPUs found: {found}"
            raise BackendError(message, code="device_missing", device=f"cuda:{index}")
        self._library = bound_library()
        device = c_int()
        self._call("cuDeviceGet", byref(device), index)
        major, minor, multiprocessors, integrated = (
            self._attribute(device, name)
            for name in (
                "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
                "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
                "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT",
                "CU_DEVICE_ATTRIBUTE_INTEGRATED",
            )
        )
        self.gpu = Gpu(
            index=index,
            name=driver.devices[index],
            compute_capability=f"{major}.{minor}",
            multiprocessors=multiprocessors,
            driver=driver.version,
            integrated=bool(integrated),
        )
        self._context = c_handle()
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device current in this thread, and what was current before afterwards."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_handle()))

    def staged_buffer(self, nbytes: int) -> StagedBuffer:
        """Allocate page-locked host and device memory, at least 1 byte.

        An integrated GPU shares one.
        """
        nbytes, mapped = max(nbytes, 1), self.gpu.integrated
        host, device = c_handle(), c_uint64()
        flags = CONSTANTS["CU_MEMHOSTALLOC_DEVICEMAP"] if mapped else 0
        with self.current():
            self._call("cuMemHostAlloc", byref(host), nbytes, flags)
            try:
                if mapped:
                    self._call("cuMemHostGetDevicePointer_v2", byref(device), host, 0)
                else:
                    self._call("cuMemAlloc_v2", byref(device), nbytes)
            except BackendError:
                self._call("cuMemFreeHost", host)
                raise
        address = host.value or 0
        view = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        return StagedBuffer(view, address, device.value, mapped)

    def new_stream(self) -> int:
        """Make a stream that does not wait for the default stream."""
        stream = c_handle()
        with self.current():
            self._call("cuStreamCreate", byref(stream), CONSTANTS["CU_STREAM_NON_BLOCKING"])
        return stream.value or 0

    def upload(self, buffer: StagedBuffer, nbytes: int, stream: int) -> None:
        """Queue a copy of the first bytes from host to device, where they are not one memory."""
        if not buffer.mapped:
            to, start = buffer.device_address, buffer.host_address
            with self.current():
                self._call("cuMemcpyHtoDAsync_v2", to, start, nbytes, stream)

    def download(self, buffer: StagedBuffer, nbytes: int, stream: int) -> None:
        """Queue a copy of the first bytes from device to host, where they are not one memory."""
        if not buffer.mapped:
            to, start = buffer.host_address, buffer.device_address
            with self.current():
                self._call("cuMemcpyDtoHAsync_v2", to, start, nbytes, stream)

    def synchronize(self, stream: int) -> None:
        """Wait until everything queued is done."""
        with self.current():
            self._call("cuStreamSynchronize", stream)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Record what ``work`` queues on a stream, without running it, as a graph to `launch`."""
        graph, executable = c_handle(), c_handle()
        # What other threads do with CUDA meanwhile is not our business.
        mode = CONSTANTS["CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"]
        with self.current():
            self._call("cuStreamBeginCapture_v2", stream, mode)
            try:
                work()
            except BaseException:
                # Leave the stream usable; what went wrong is on its way already.
                self._library.cuStreamEndCapture(stream, byref(graph))
                if graph:
                    self._library.cuGraphDestroy(graph)
                raise
            self._call("cuStreamEndCapture", stream, byref(graph))
            try:
                self._call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
            finally:
                self._call("cuGraphDestroy", graph)
        return executable.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Queue a captured graph."""
        with self.current():
            self._call("cuGraphLaunch", graph, stream)

    def release(
        self, buffers: Sequence[StagedBuffer], streams: Sequence[int], graphs: Sequence[int]
    ) -> None:
        """Give back memory, streams and graphs; nothing of it may still be in use."""
        with self.current():
            for graph in graphs:
                self._call("cuGraphExecDestroy", graph)
            for stream in streams:
                self._call("cuStreamDestroy_v2", stream)
            for buffer in buffers:
                if not buffer.mapped:
                    self._call("cuMemFree_v2", buffer.device_address)
                self._call("cuMemFreeHost", buffer.host_address)

    def _attribute(self, device: c_int, name: str) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), CONSTANTS[name], device)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            name, text = c_char_p(), c_char_p()
            self._library.cuGetErrorName(status, byref(name))
            self._library.cuGetErrorString(status, byref(text))
            error = (name.value or b"unknown error").decode("utf-8", "replace")
            detail = (text.value or b"").decode("utf-8", "replace")
            advice = (
                ": close other programs, or compile with a smaller --max-batch"
                if error == "CUDA_ERROR_OUT_OF_MEMORY"
                else ": see  upperson-rt doctor"
            )
            message = f"CUDA's {function} failed with {error} ({detail}){advice}"
            raise BackendError(message, code="cuda_failed", function=function, status=error)
