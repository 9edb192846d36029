import ctypes
import re
import threading
from importlib import metadata

import numpy as np
import pytest

from tests.helpers.fake_cuda import FakeDriver
from upperson_rt.errors import BackendError
from upperson_rt.tensorrt import cuda as cuda_module
from upperson_rt.tensorrt.cuda import SIGNATURES, Cuda, Gpu


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
CONSTANTS = {
    "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": "_ATTRIBUTE_MULTIPROCESSORS",
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": "_ATTRIBUTE_CAPABILITY_MAJOR",
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": "_ATTRIBUTE_CAPABILITY_MINOR",
    "CU_STREAM_NON_BLOCKING": "_STREAM_NON_BLOCKING",
    "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": "_CAPTURE_THREAD_LOCAL",
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
    value = re.search(rf"\b{name} *= *(\w+)", header)[1]
    assert int(value, 0) == getattr(cuda_module, CONSTANTS[name])


def test_a_gpu_is_described(driver):
    assert Cuda(1).gpu == Gpu(1, "NVIDIA L4", "8.9", 58, "12.6")
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
    assert bytes(driver.memory[buffer.device_address]) == b"\x01\x02\x03\xee"
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
        assert bytes(driver.memory[buffer.device_address]) == bytes([value, value])
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
    assert not driver.is_capturing(stream)
    assert driver.graphs == {}
    buffer.host[:] = np.uint8(5)
    cuda.upload(buffer, 1, stream)
    cuda.synchronize(stream)
    assert bytes(driver.memory[buffer.device_address]) == b"\x05"
