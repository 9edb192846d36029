import ctypes
import re
import threading
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fake_cuda import FakeDriver
from upperson_rt.errors import BackendError
from upperson_rt.tensorrt import cuda as cuda_module
from upperson_rt.tensorrt.cuda import CONSTANTS, SIGNATURES, Cuda, Gpu


@pytest.fixture
def driver(monkeypatch):
    return FakeDriver(("Orin", 8, 7, 16), ("NVIDIA L4", 8, 9, 58)).install(monkeypatch)


C_TYPES = {
    "CUcontext": ctypes.c_void_p,
    "CUdevice": ctypes.c_int,
    "CUdevice_attribute": ctypes.c_int,  # An enum.
    "CUdeviceptr": ctypes.c_uint64,
    "CUgraph": ctypes.c_void_p,
    "CUgraphExec": ctypes.c_void_p,
    "CUresult": ctypes.c_int,  # An enum.
    "CUstream": ctypes.c_void_p,
    "CUstreamCaptureMode": ctypes.c_int,  # An enum.
    "char*": ctypes.c_char_p,
    "int": ctypes.c_int,
    "size_t": ctypes.c_size_t,
    "unsigned int": ctypes.c_uint,
    "unsigned long long": ctypes.c_ulonglong,
    "void*": ctypes.c_void_p,
}


def c_type(text):
    return C_TYPES.get(text) or ctypes.POINTER(c_type(text.removesuffix("*")))


def c_argument(text):
    """The type of ``const char **pStr``."""
    words = re.sub(r"\*", " * ", text.replace("const", "")).split()
    stars = words.count("*")
    return c_type(" ".join(word for word in words if word != "*").rpartition(" ")[0] + "*" * stars)


@pytest.fixture(params=["nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime"])
def header(request):
    """NVIDIA's own ``cuda.h`` of CUDA 12 and 13."""
    try:
        files = metadata.files(request.param)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{request.param} is not installed: extra 'dev', on Linux and x86-64")
    (path,) = (file for file in files if file.name == "cuda.h")
    return path.locate().read_text()


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_prototypes_are_those_of_the_header(header, name):
    # A macro gives the API's name to the latest version: `#define cuMemAlloc cuMemAlloc_v2`.
    macro = re.search(rf"#define (\w+) +(?:__CUDA_API_PTSZ\()?{name}\b", header)
    plain = macro[1] if macro else name
    prototype = re.search(rf"^CUresult CUDAAPI {plain}\(([^)]*)\);", header, re.MULTILINE)
    assert tuple(map(c_argument, prototype[1].split(","))) == SIGNATURES[name]
    versions = re.search(rf"#define {plain} +(?:__CUDA_API_PTSZ\()?(\w+)", header)
    assert versions is None or versions[1] == name, "an older version of the function is bound"


@pytest.mark.parametrize("name", CONSTANTS)
def test_the_constants_are_those_of_the_header(header, name):
    value = re.search(rf"\b{name}(?: *=|) +(\w+)", header)[1]
    assert int(value, 0) == CONSTANTS[name]


def test_every_function_that_is_called_has_a_prototype_and_the_other_way_round():
    source = Path(cuda_module.__file__).read_text()
    named = re.findall(r'(?:"|_library\.|cuda\.)(cu[A-Z]\w+|CU_\w+)', source)
    counted = Counter(named)
    assert counted.keys() == SIGNATURES.keys() | CONSTANTS.keys()
    assert not [name for name, times in counted.items() if times == 1], "named, but not used"


@pytest.mark.parametrize("integrated", [False, True])
def test_no_method_needs_a_current_context(monkeypatch, integrated):
    """The driver refuses nearly everything in a thread without one."""
    driver = FakeDriver(integrated=integrated).install(monkeypatch)
    assert driver.cuStreamCreate(ctypes.byref(ctypes.c_void_p()), 1) == 201
    cuda = Cuda()
    assert cuda.gpu.integrated == integrated
    buffer, stream = cuda.staged_buffer(4), cuda.new_stream()
    assert buffer.mapped == integrated
    graph = cuda.capture(stream, lambda: driver.enqueue(stream, lambda: None))
    cuda.upload(buffer, 4, stream)
    cuda.launch(graph, stream)
    cuda.download(buffer, 4, stream)
    cuda.synchronize(stream)
    cuda.release([buffer], [stream], [graph])
    assert driver.current_gpu is None
    assert (driver.memory, driver.streams, driver.executables) == ({}, {}, {})


def test_an_integrated_gpu_sees_the_memory_of_the_host(monkeypatch):
    driver = FakeDriver(integrated=True).install(monkeypatch)
    cuda = Cuda()
    buffer, stream = cuda.staged_buffer(3), cuda.new_stream()
    assert buffer.host_address != buffer.device_address
    buffer.host[:] = [1, 2, 3]
    cuda.upload(buffer, 3, stream)
    assert ctypes.string_at(buffer.device_address, 3) == b"\x01\x02\x03"
    ctypes.memmove(buffer.device_address, b"\x07\x08\x09", 3)
    cuda.download(buffer, 3, stream)
    assert buffer.host.tolist() == [7, 8, 9]
    driver.fail["cuMemHostGetDevicePointer_v2"] = 1
    with pytest.raises(BackendError, match="cuMemHostGetDevicePointer_v2 failed"):
        cuda.staged_buffer(3)
    assert len(driver.memory) == 1


def test_a_gpu_is_described(driver):
    assert Cuda(1).gpu == Gpu(1, "NVIDIA L4", "8.9", 58, "12.6", False)
    with pytest.raises(BackendError, match="cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE"):
        Cuda(2)


def test_without_a_driver(monkeypatch):
    def absent(name, *arguments):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        Cuda()


def test_a_driver_that_is_too_old(driver):
    del driver._functions["cuGraphInstantiateWithFlags"]
    with pytest.raises(BackendError, match=r"too old: cuGraphInstantiateWithFlags; .*CUDA 11\.4"):
        Cuda()


def test_bytes_go_to_the_device_and_back(driver):
    cuda = Cuda()
    buffer, stream = cuda.staged_buffer(4), cuda.new_stream()
    buffer.host[:] = [1, 2, 3, 4]
    cuda.upload(buffer, 3, stream)
    cuda.synchronize(stream)
    assert bytes(driver.device_memory(buffer.device_address)) == b"\x01\x02\x03\xee"
    buffer.host[:] = 0
    cuda.download(buffer, 2, stream)
    assert buffer.host.tolist() == [0, 0, 0, 0]
    cuda.synchronize(stream)
    assert buffer.host.tolist() == [1, 2, 0, 0]

    cuda.release([buffer], [stream], [])
    assert (driver.memory, driver.streams) == ({}, {})


def test_the_device_is_current_where_it_is_used_and_only_there(driver):
    first, second = Cuda(0), Cuda(1)
    found = []

    def look():
        found.append(driver.current_gpu)
        with second.current():
            found.append(driver.current_gpu)
        found.append(driver.current_gpu)

    with first.current():
        look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [0, 1, 0, None, 1, None]


def test_a_failed_allocation_keeps_nothing_and_says_what_to_do(driver):
    cuda = Cuda()
    driver.fail["cuMemAlloc_v2"] = 2
    with pytest.raises(BackendError, match=r"OUT_OF_MEMORY \(text of .*smaller --max-batch"):
        cuda.staged_buffer(100)
    assert driver.memory == {}
    assert driver.current_gpu is None


def test_a_graph_repeats_what_was_captured(driver):
    cuda = Cuda()
    buffer, stream = cuda.staged_buffer(2), cuda.new_stream()
    graph = cuda.capture(stream, lambda: cuda.upload(buffer, 2, stream))
    for value in (7, 9):
        buffer.host[:] = value
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert bytes(driver.device_memory(buffer.device_address)) == bytes([value, value])
    assert driver.graphs == {}  # The executable graph is what is kept.


def test_a_failed_capture_leaves_the_stream_usable(driver):
    cuda = Cuda()
    buffer, stream = cuda.staged_buffer(1), cuda.new_stream()

    def fail():
        cuda.upload(buffer, 1, stream)
        raise BackendError("not capturable")

    with pytest.raises(BackendError, match="not capturable"):
        cuda.capture(stream, fail)
    with pytest.raises(BackendError, match="STREAM_CAPTURE_INVALIDATED"):
        cuda.capture(stream, lambda: None)
    assert stream not in driver.captures
    assert driver.graphs == {}
    buffer.host[:] = np.uint8(5)
    cuda.upload(buffer, 1, stream)
    cuda.synchronize(stream)
    assert bytes(driver.device_memory(buffer.device_address)) == b"\x05"
