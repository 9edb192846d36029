"""A stand-in for libcuda.so.1: real C functions over host memory, streams that run when waited for.

Prototypes are those of the binding, which tests compare with ``cuda.h``. Calls with wrong types,
without a current context or with an address of the wrong side fail.
"""

import ctypes
import itertools
import mmap
import os
import threading
from functools import partial

from upperson_machine.nvidia import SIGNATURES
from upperson_tensorrt.cuda import CONSTANTS

ERRORS = {
    1: b"CUDA_ERROR_INVALID_VALUE",
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    100: b"CUDA_ERROR_NO_DEVICE",
    101: b"CUDA_ERROR_INVALID_DEVICE",
    201: b"CUDA_ERROR_INVALID_CONTEXT",
    400: b"CUDA_ERROR_INVALID_HANDLE",
    901: b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
}  # They must stay alive.


def _as_address(kind):
    # A callback would get the text behind a char*, but has to write to it.
    return ctypes.c_void_p if kind is ctypes.c_char_p else kind


def put(place, value, status=0):
    place[0] = value
    return status


def destroyed(kind, handle):
    return 400 if kind.pop(handle, None) is None else 0


class Memory:
    """Memory that the host sees at one address and the device, where it may, at another."""

    def __init__(self, nbytes, host, device):
        file = os.memfd_create("fake-gpu")
        os.truncate(file, nbytes)
        self.nbytes = nbytes
        self._views = [mmap.mmap(file, nbytes) if wanted else None for wanted in (host, device)]
        os.close(file)
        self.host, self.device = (
            view and ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in self._views
        )
        next(filter(None, self._views))[:] = b"\xee" * nbytes


class FakeDriver:
    """A driver of GPUs (name, compute capability in two numbers, multiprocessors) of 1 GiB each."""

    def __init__(self, *gpus, version=12060, integrated=False):
        self.gpus = gpus or (("Orin", 8, 7, 16),)
        self.version, self.integrated = version, integrated
        self.free_bytes = 1 << 30
        self.fail = {}  # Status to return by function name.
        # Run what is queued at once, or when the stream is waited for: a wrong order shows in one.
        self.eager = False
        self.calls = []
        self.memory, self.streams, self.captures, self.graphs, self.executables = {}, {}, {}, {}, {}
        self._handles = itertools.count(1000)
        self._current = threading.local()
        entries = self._entries()
        self._functions = {
            name: ctypes.CFUNCTYPE(ctypes.c_int, *map(_as_address, types))(entry)
            for name, types in SIGNATURES.items()
            for entry in [partial(self._call, name, entries[name])]
        }

    def install(self, monkeypatch):
        """Put it in the place of libcuda.so.1."""

        def load(name, *arguments, real=ctypes.CDLL, **options):
            return self if name == "libcuda.so.1" else real(name, *arguments, **options)

        monkeypatch.setattr(ctypes, "CDLL", load)
        return self

    def __getattr__(self, name):
        if name in self.__dict__.get("_functions", {}):
            return self._functions[name]
        raise AttributeError(name)

    @property
    def stack(self):
        return self._current.__dict__.setdefault("stack", [])

    @property
    def current_gpu(self):
        return self.stack[-1] - 1 if self.stack else None

    def device_memory(self, address):
        """Return what lies at an address of the device; None for host addresses."""
        return next((m for m in self.memory.values() if address and m.device == address), None)

    def enqueue(self, stream, work):
        """Queue work as a kernel launch does: captured, or run when the stream is waited for."""
        if self.eager and stream not in self.captures:
            work()
        else:
            self.captures.get(stream, self.streams[stream]).append(work)

    def _call(self, name, function, *arguments):
        self.calls.append(name)
        if name in self.fail:
            if name == "cuStreamSynchronize":
                self.streams[arguments[0]].clear()
            return self.fail[name]
        free = ("cuInit", "cuDriver", "cuGet", "cuDevice", "cuCtxPush", "cuCtxPop")
        return function(*arguments) or 0 if self.stack or name.startswith(free) else 201

    def _entries(self):
        """Return the functions by name; what returns None has worked."""
        return {
            "cuInit": lambda flags: 0 if self.gpus else 100,
            "cuDriverGetVersion": lambda version: put(version, self.version),
            "cuGetErrorName": lambda status, text: put(text, ERRORS[status]),
            "cuGetErrorString": lambda status, text: put(text, ERRORS[status]),
            "cuDeviceGetCount": lambda count: put(count, len(self.gpus)),
            "cuDeviceGet": lambda device, i: put(device, i, 0 if i < len(self.gpus) else 101),
            "cuDeviceGetName": self._device_name,
            "cuDeviceGetAttribute": self._device_attribute,
            "cuDevicePrimaryCtxRetain": lambda context, device: put(context, device + 1),
            "cuCtxPushCurrent_v2": lambda context: self.stack.append(context),
            "cuCtxPopCurrent_v2": lambda context: put(context, self.stack.pop()),
            "cuMemAlloc_v2": lambda address, nbytes: self._allocate(address, nbytes, False, True),
            "cuMemHostAlloc": lambda address, nbytes, flags: self._allocate(
                address, nbytes, True, bool(flags & CONSTANTS["CU_MEMHOSTALLOC_DEVICEMAP"])
            ),
            "cuMemHostGetDevicePointer_v2": self._device_pointer,
            "cuMemFree_v2": lambda address: self._free(address, on_host=False),
            "cuMemFreeHost": lambda address: self._free(address, on_host=True),
            "cuMemcpyHtoDAsync_v2": lambda to, host, *more: self._copy(to, host, to, host, *more),
            "cuMemcpyDtoHAsync_v2": lambda to, device, *more: self._copy(
                to, device, device, to, *more
            ),
            "cuStreamCreate": lambda stream, flags: self._new(stream, self.streams, []),
            "cuStreamDestroy_v2": lambda stream: destroyed(self.streams, stream),
            "cuStreamSynchronize": self._synchronize,
            "cuStreamBeginCapture_v2": lambda stream, mode: self.captures.update({stream: []}),
            "cuStreamEndCapture": self._end_capture,
            "cuGraphInstantiateWithFlags": lambda handle, graph, flags: self._new(
                handle, self.executables, self.graphs[graph]
            ),
            "cuGraphLaunch": self._launch,
            "cuGraphExecDestroy": lambda graph: destroyed(self.executables, graph),
            "cuGraphDestroy": lambda graph: destroyed(self.graphs, graph),
        }

    def _new(self, handle, kind, thing):
        handle[0] = next(self._handles)
        kind[handle[0]] = thing

    def _device_name(self, address, size, device):
        name = self.gpus[device][0].encode() + b"\0"
        ctypes.memmove(address, name, len(name))

    def _device_attribute(self, value, attribute, device):
        _, major, minor, multiprocessors = self.gpus[device]
        value[0] = {75: major, 76: minor, 16: multiprocessors, 18: self.integrated}[attribute]

    def _allocate(self, address, nbytes, host, device):
        if nbytes > self.free_bytes:
            return 2
        block = Memory(nbytes, host, device)
        address[0] = block.host or block.device
        self.memory[address[0]] = block
        return 0

    def _device_pointer(self, address, host, flags):
        found = self.memory.get(host)
        if found is None or found.device is None or flags:
            return 1
        return put(address, found.device)

    def _free(self, address, on_host):
        found = self.memory.get(address)
        if found is None or bool(found.host) != on_host:
            return 1
        return destroyed(self.memory, address)

    def _copy(self, to, start, device, host, nbytes, stream):
        on_device, on_host = self.device_memory(device), self.memory.get(host)
        if on_device is None or on_host is None or not on_host.host:
            return 1
        if min(on_device.nbytes, on_host.nbytes) < nbytes or stream not in self.streams:
            return 1
        return self.enqueue(stream, lambda: ctypes.memmove(to, start, nbytes))

    def _synchronize(self, stream):
        if stream not in self.streams:
            return 400
        queued, self.streams[stream] = self.streams[stream], []
        for work in queued:
            work()
        return 0

    def _end_capture(self, stream, graph):
        captured = self.captures.pop(stream)
        return self._new(graph, self.graphs, captured) if captured else 901

    def _launch(self, executable, stream):
        if executable not in self.executables or stream not in self.streams:
            return 400
        for work in self.executables[executable]:
            self.enqueue(stream, work)
        return 0
