# ruff: noqa: N802 - A method has the name of the function that it is.
"""A stand-in for libcuda.so.1: real C functions over host memory, streams that run when waited for.

The prototypes are those of the binding, which tests compare with ``cuda.h``, so a call with wrong
types does not get through; nor does one without a current context, or with an address of the wrong
side.
"""

import ctypes
import itertools
import mmap
import os
import threading

from upperson_rt.tensorrt.cuda import CONSTANTS, SIGNATURES

ERRORS = {
    1: b"CUDA_ERROR_INVALID_VALUE",
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    100: b"CUDA_ERROR_NO_DEVICE",
    101: b"CUDA_ERROR_INVALID_DEVICE",
    201: b"CUDA_ERROR_INVALID_CONTEXT",
    400: b"CUDA_ERROR_INVALID_HANDLE",
    901: b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
}
TEXTS = {status: b"text of " + name for status, name in ERRORS.items()}  # They must stay alive.


def _as_address(kind):
    # A callback would get the text behind a char*, but has to write to it.
    return ctypes.c_void_p if kind is ctypes.c_char_p else kind


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

    def __bytes__(self):
        return bytes(next(filter(None, self._views)))


class FakeDriver:
    """A driver with GPUs of 1 GiB each; `install` puts it in the place of libcuda.so.1.

    Each GPU is its name, compute capability (two numbers) and multiprocessors.
    """

    def __init__(self, *gpus, version=12060, integrated=False):
        self.gpus = gpus or (("Orin", 8, 7, 16),)
        self.version, self.integrated = version, integrated
        self.free_bytes = 1 << 30
        self.fail = {}
        """Status to return by function name."""
        self.eager = False
        """Run what is queued at once. Otherwise it waits until someone waits for it: what is wrong
        with the order of things shows in one of the two."""
        self.calls = []
        self.memory, self.streams, self.captures, self.graphs, self.executables = {}, {}, {}, {}, {}
        self._handles = itertools.count(1000)
        self._current = threading.local()
        self._functions = {
            name: ctypes.CFUNCTYPE(ctypes.c_int, *map(_as_address, types))(self._entry(name))
            for name, types in SIGNATURES.items()
        }

    def install(self, monkeypatch):
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

    def _entry(self, name):
        method = getattr(self, f"_{name}")
        needs_context = not name.startswith(
            ("cuInit", "cuDriver", "cuGet", "cuDevice", "cuCtxPush", "cuCtxPop")
        )

        def call(*arguments):
            self.calls.append(name)
            if name in self.fail:
                if name == "cuStreamSynchronize":
                    self.streams[arguments[0]].clear()
                return self.fail[name]
            return 201 if needs_context and not self.stack else method(*arguments) or 0

        return call

    def _new(self, handle, kind, thing):
        handle[0] = next(self._handles)
        kind[handle[0]] = thing

    def _allocate(self, nbytes, **sides):
        if nbytes > self.free_bytes:
            return None, 2
        block = Memory(nbytes, **sides)
        self.memory[block.host or block.device] = block
        return block, 0

    def _free(self, address, on_host):
        found = self.memory.get(address)
        return (
            1 if found is None or bool(found.host) != on_host or not self.memory.pop(address) else 0
        )

    def _copy(self, to, start, device, host, nbytes, stream):
        on_device, on_host = self.device_memory(device), self.memory.get(host)
        if on_device is None or on_host is None or not on_host.host:
            return 1
        if min(on_device.nbytes, on_host.nbytes) < nbytes or stream not in self.streams:
            return 1
        return self.enqueue(stream, lambda: ctypes.memmove(to, start, nbytes))

    def _cuInit(self, flags):
        return 0 if self.gpus else 100

    def _cuDriverGetVersion(self, version):
        version[0] = self.version

    def _cuGetErrorName(self, status, text):
        text[0] = ERRORS[status]

    def _cuGetErrorString(self, status, text):
        text[0] = TEXTS[status]

    def _cuDeviceGetCount(self, count):
        count[0] = len(self.gpus)

    def _cuDeviceGet(self, device, index):
        device[0] = index
        return 0 if index < len(self.gpus) else 101

    def _cuDeviceGetName(self, address, size, device):
        name = self.gpus[device][0].encode() + b"\0"
        ctypes.memmove(address, name, len(name))

    def _cuDeviceGetAttribute(self, value, attribute, device):
        _, major, minor, multiprocessors = self.gpus[device]
        value[0] = {75: major, 76: minor, 16: multiprocessors, 18: self.integrated}[attribute]

    def _cuDevicePrimaryCtxRetain(self, context, device):
        context[0] = device + 1

    def _cuCtxPushCurrent_v2(self, context):
        self.stack.append(context)

    def _cuCtxPopCurrent_v2(self, context):
        context[0] = self.stack.pop()

    def _cuMemAlloc_v2(self, address, nbytes):
        found, status = self._allocate(nbytes, host=False, device=True)
        address[0] = found.device if found else 0
        return status

    def _cuMemHostAlloc(self, address, nbytes, flags):
        mapped = bool(flags & CONSTANTS["CU_MEMHOSTALLOC_DEVICEMAP"])
        found, status = self._allocate(nbytes, host=True, device=mapped)
        address[0] = found.host if found else None
        return status

    def _cuMemHostGetDevicePointer_v2(self, address, host, flags):
        found = self.memory.get(host)
        if found is None or found.device is None or flags:
            return 1
        address[0] = found.device
        return 0

    def _cuMemFree_v2(self, address):
        return self._free(address, on_host=False)

    def _cuMemFreeHost(self, address):
        return self._free(address, on_host=True)

    def _cuMemcpyHtoDAsync_v2(self, device, host, nbytes, stream):
        return self._copy(device, host, device, host, nbytes, stream)

    def _cuMemcpyDtoHAsync_v2(self, host, device, nbytes, stream):
        return self._copy(host, device, device, host, nbytes, stream)

    def _cuStreamCreate(self, stream, flags):
        self._new(stream, self.streams, [])

    def _cuStreamDestroy_v2(self, stream):
        return 400 if self.streams.pop(stream, None) is None else 0

    def _cuStreamSynchronize(self, stream):
        if stream not in self.streams:
            return 400
        queued, self.streams[stream] = self.streams[stream], []
        for work in queued:
            work()
        return 0

    def _cuStreamBeginCapture_v2(self, stream, mode):
        self.captures[stream] = []

    def _cuStreamEndCapture(self, stream, graph):
        captured = self.captures.pop(stream)
        return self._new(graph, self.graphs, captured) if captured else 901

    def _cuGraphInstantiateWithFlags(self, executable, graph, flags):
        self._new(executable, self.executables, self.graphs[graph])

    def _cuGraphLaunch(self, executable, stream):
        if executable not in self.executables or stream not in self.streams:
            return 400
        for work in self.executables[executable]:
            self.enqueue(stream, work)
        return 0

    def _cuGraphExecDestroy(self, executable):
        return 400 if self.executables.pop(executable, None) is None else 0

    def _cuGraphDestroy(self, graph):
        return 400 if self.graphs.pop(graph, None) is None else 0
