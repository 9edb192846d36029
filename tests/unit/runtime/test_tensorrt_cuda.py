import ctypes
import threading

import numpy as np
import pytest

from tests.helpers.fake_cuda import FakeDriver, signatures
from upperson_rt.errors import BackendError
from upperson_rt.tensorrt.cuda import SIGNATURES, Cuda, Gpu


@pytest.fixture
def driver(monkeypatch):
    return FakeDriver(("Orin", 8, 7, 16), ("NVIDIA L4", 8, 9, 58)).install(monkeypatch)


def test_the_types_are_those_of_the_header():
    header = signatures()
    assert {name: header[name] for name in SIGNATURES} == SIGNATURES


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
