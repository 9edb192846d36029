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

NEEDS_NO_CONTEXT = (
    "cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuDeviceGetCount",
    "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2",
)  # fmt: skip


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
        next(view for view in self._views if view)[:] = b"\xee" * nbytes

    def __bytes__(self):
        return bytes(next(view for view in self._views if view))


class FakeDriver:
    """A driver with GPUs of 1 GiB each; `install` puts it in the place of libcuda.so.1."""

    def __init__(self, *gpus, version=12060, integrated=False):
        self.gpus = gpus or (("Orin", 8, 7, 16),)
        """Name, compute capability, multiprocessors."""
        self.version = version
        self.integrated = integrated
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
        real = ctypes.CDLL
        monkeypatch.setattr(
            ctypes,
            "CDLL",
            lambda name, *a, **k: self if name == "libcuda.so.1" else real(name, *a, **k),
        )
        return self

    def __getattr__(self, name):
        if name in self.__dict__.get("_functions", {}):
            return self._functions[name]
        raise AttributeError(name)

    @property
    def stack(self):
        if not hasattr(self._current, "stack"):
            self._current.stack = []
        return self._current.stack

    @property
    def current_gpu(self):
        return self.stack[-1] - 1 if self.stack else None

    def device_memory(self, address):
        """Return what lies at an address of the device; None for host addresses."""
        return next((m for m in self.memory.values() if address and m.device == address), None)

    def enqueue(self, stream, work):
        """Queue work as a kernel launch does: captured, or run when the stream is waited for."""
        if stream in self.captures:
            self.captures[stream].append(work)
        elif self.eager:
            work()
        else:
            self.streams[stream].append(work)

    def is_capturing(self, stream):
        return stream in self.captures

    def _entry(self, name):
        method = getattr(self, f"_{name}")

        def call(*arguments):
            self.calls.append(name)
            if name in self.fail:
                if name == "cuStreamSynchronize":
                    self.streams[arguments[0]].clear()
                return self.fail[name]
            if not self.stack and name not in NEEDS_NO_CONTEXT:
                return 201
            return method(*arguments) or 0

        return call

    def _allocate(self, nbytes, **sides):
        if nbytes > self.free_bytes:
            return None, 2
        block = Memory(nbytes, **sides)
        self.memory[block.host or block.device] = block
        return block, 0

    def _cuInit(self, flags):  # noqa: N802
        return 0 if self.gpus else 100

    def _cuDriverGetVersion(self, version):  # noqa: N802
        version[0] = self.version

    def _cuGetErrorName(self, status, text):  # noqa: N802
        text[0] = ERRORS[status]

    def _cuGetErrorString(self, status, text):  # noqa: N802
        text[0] = TEXTS[status]

    def _cuDeviceGetCount(self, count):  # noqa: N802
        count[0] = len(self.gpus)

    def _cuDeviceGet(self, device, index):  # noqa: N802
        device[0] = index
        return 0 if index < len(self.gpus) else 101

    def _cuDeviceGetName(self, address, size, device):  # noqa: N802
        name = self.gpus[device][0].encode() + b"\0"
        ctypes.memmove(address, name, len(name))

    def _cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        _, major, minor, multiprocessors = self.gpus[device]
        value[0] = {75: major, 76: minor, 16: multiprocessors, 18: self.integrated}[attribute]

    def _cuDevicePrimaryCtxRetain(self, context, device):  # noqa: N802
        context[0] = device + 1

    def _cuCtxPushCurrent_v2(self, context):  # noqa: N802
        self.stack.append(context)

    def _cuCtxPopCurrent_v2(self, context):  # noqa: N802
        context[0] = self.stack.pop()

    def _cuMemAlloc_v2(self, address, nbytes):  # noqa: N802
        found, status = self._allocate(nbytes, host=False, device=True)
        address[0] = found.device if found else 0
        return status

    def _cuMemHostAlloc(self, address, nbytes, flags):  # noqa: N802
        mapped = bool(flags & CONSTANTS["CU_MEMHOSTALLOC_DEVICEMAP"])
        found, status = self._allocate(nbytes, host=True, device=mapped)
        address[0] = found.host if found else None
        return status

    def _cuMemHostGetDevicePointer_v2(self, address, host, flags):  # noqa: N802
        found = self.memory.get(host)
        if found is None or found.device is None or flags:
            return 1
        address[0] = found.device
        return 0

    def _cuMemFree_v2(self, address):  # noqa: N802
        found = self.memory.get(address)
        return 1 if found is None or found.host or not self.memory.pop(address) else 0

    def _cuMemFreeHost(self, address):  # noqa: N802
        found = self.memory.get(address)
        return 1 if found is None or not found.host or not self.memory.pop(address) else 0

    def _cuMemcpyHtoDAsync_v2(self, device, host, nbytes, stream):  # noqa: N802
        return self._copy(device, device, host, nbytes, stream)

    def _cuMemcpyDtoHAsync_v2(self, host, device, nbytes, stream):  # noqa: N802
        return self._copy(host, device, host, nbytes, stream)

    def _copy(self, to, device, host, nbytes, stream):
        on_device, on_host = self.device_memory(device), self.memory.get(host)
        if on_device is None or on_host is None or not on_host.host:
            return 1
        if min(on_device.nbytes, on_host.nbytes) < nbytes or stream not in self.streams:
            return 1
        start = host if to == device else device
        self.enqueue(stream, lambda: ctypes.memmove(to, start, nbytes))
        return 0

    def _cuStreamCreate(self, stream, flags):  # noqa: N802
        stream[0] = next(self._handles)
        self.streams[stream[0]] = []

    def _cuStreamDestroy_v2(self, stream):  # noqa: N802
        return 400 if self.streams.pop(stream, None) is None else 0

    def _cuStreamSynchronize(self, stream):  # noqa: N802
        if stream not in self.streams:
            return 400
        queued, self.streams[stream] = self.streams[stream], []
        for work in queued:
            work()
        return 0

    def _cuStreamBeginCapture_v2(self, stream, mode):  # noqa: N802
        self.captures[stream] = []

    def _cuStreamEndCapture(self, stream, graph):  # noqa: N802
        captured = self.captures.pop(stream)
        if not captured:
            return 901
        graph[0] = next(self._handles)
        self.graphs[graph[0]] = captured
        return 0

    def _cuGraphInstantiateWithFlags(self, executable, graph, flags):  # noqa: N802
        executable[0] = next(self._handles)
        self.executables[executable[0]] = self.graphs[graph]

    def _cuGraphLaunch(self, executable, stream):  # noqa: N802
        if executable not in self.executables or stream not in self.streams:
            return 400
        for work in self.executables[executable]:
            self.enqueue(stream, work)
        return 0

    def _cuGraphExecDestroy(self, executable):  # noqa: N802
        return 400 if self.executables.pop(executable, None) is None else 0

    def _cuGraphDestroy(self, graph):  # noqa: N802
        return 400 if self.graphs.pop(graph, None) is None else 0
