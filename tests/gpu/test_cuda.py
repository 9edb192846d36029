"""Our ``Cuda`` on the real driver, alone and beside torch in the device's one context."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

COUNT = 1 << 16


class OnDevice:
    """The device's side of a buffer as float32, for torch; without a copy."""

    def __init__(self, buffer):
        self.__cuda_array_interface__ = {
            "shape": (COUNT,),
            "typestr": "<f4",
            "data": (buffer.device_address, False),
            "version": 3,
        }


class Work:
    """A stream, a buffer of float32, and what goes in and comes out."""

    def __init__(self, cuda):
        self.cuda = cuda
        self.buffer = cuda.staged_buffer(4 * COUNT)
        self.stream = cuda.new_stream()
        self.host = self.buffer.host[: 4 * COUNT].view(np.float32)

    def put(self, values):
        self.host[:] = values
        self.cuda.upload(self.buffer, 4 * COUNT, self.stream)
        self.cuda.synchronize(self.stream)

    def get(self):
        if not self.buffer.mapped:
            self.host[:] = -1
        self.cuda.download(self.buffer, 4 * COUNT, self.stream)
        self.cuda.synchronize(self.stream)
        return self.host.copy()


@pytest.fixture
def work(cuda):
    found = Work(cuda)
    yield found
    cuda.release([found.buffer], [found.stream], [])


def numbers(seed=0):
    return np.random.default_rng(seed).normal(size=COUNT).astype(np.float32)


@pytest.mark.parametrize("current", [False, True])
def test_what_goes_in_comes_out(cuda, work, current):
    with cuda.current() if current else nullcontext():
        work.put(numbers())
        np.testing.assert_array_equal(work.get(), numbers())


def test_eight_threads_have_the_device_without_a_word(cuda):
    wrong = []

    def loop(seed):
        mine = Work(cuda)
        for turn in range(20):
            expected = numbers(100 * seed + turn)
            mine.put(expected)
            if not np.array_equal(mine.get(), expected):
                wrong.append(seed)
        cuda.release([mine.buffer], [mine.stream], [])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(loop, range(8)))
    assert wrong == []


@pytest.mark.parametrize("current", [False, True])
def test_torch_and_we_share_one_context(cuda, work, torch_gpu, current):
    with cuda.current() if current else nullcontext():
        ours = torch_gpu.as_tensor(OnDevice(work.buffer), device="cuda")
        work.put(numbers())
        with torch_gpu.cuda.stream(torch_gpu.cuda.ExternalStream(work.stream)):
            ours.mul_(2)
        np.testing.assert_array_equal(work.get(), 2 * numbers())
        # The other way round: memory of torch's own, copied by us.
        theirs = torch_gpu.arange(COUNT, device="cuda", dtype=torch_gpu.float32)
        torch_gpu.cuda.synchronize()
        address = theirs.data_ptr()
        cuda.download(
            replace(work.buffer, device_address=address, mapped=False), 4 * COUNT, work.stream
        )
        cuda.synchronize(work.stream)
        np.testing.assert_array_equal(work.host, np.arange(COUNT, dtype=np.float32))
    assert float(torch_gpu.ones(3, device="cuda").sum()) == 3


def test_kernels_of_torch_are_captured_and_launched(cuda, work, torch_gpu):
    ours = torch_gpu.as_tensor(OnDevice(work.buffer), device="cuda")
    external = torch_gpu.cuda.ExternalStream(work.stream)

    def double():
        with torch_gpu.cuda.stream(external):
            ours.mul_(2)

    work.put(numbers())
    double()  # Kernels load at their first launch, which cannot be captured.
    graph = cuda.capture(work.stream, double)
    np.testing.assert_array_equal(work.get(), 2 * numbers())  # It was recorded, not run.
    for _ in range(3):
        cuda.launch(graph, work.stream)
    np.testing.assert_array_equal(work.get(), 16 * numbers())
    cuda.release([], [], [graph])
