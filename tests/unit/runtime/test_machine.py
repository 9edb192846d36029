"""The processor, the driver, and memory that threads have freed: it goes back to the system."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.helpers.refused import refused
from upperson_machine import int8, nvidia
from upperson_machine.description import describe_machine
from upperson_rt import machine
from upperson_rt.arguments import check_number
from upperson_rt.errors import UsageError
from upperson_rt.machine import Processor


@pytest.mark.parametrize(
    ("architecture", "cpuinfo", "cpu", "sets"),
    [
        ("x86_64", "model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_tile\n", "Some CPU",
         {"avx2", "avx512f", "amx_tile"}),
        ("aarch64", "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n", "arm",
         {"asimddp", "i8mm"}),
        ("aarch64", None, "arm", None),
    ],
)  # fmt: skip
def test_instruction_sets_are_those_of_the_architecture_and_never_guessed(
    tmp_path, monkeypatch, architecture, cpuinfo, cpu, sets
):
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    found = describe_machine()
    assert found["cpu"] == cpu
    assert found["cpus_available"] >= 1
    if sets is None:
        assert found["instruction_sets"] is None
    else:
        assert {name for name, there in found["instruction_sets"].items() if there} == sets
        assert not all(found["instruction_sets"].values())


def test_bf16_is_known_by_its_instructions():
    for flag in ("avx512_bf16", "amx_bf16", "bf16"):
        assert Processor("x", frozenset({"avx2", flag})).has_bf16
    assert not Processor("x", frozenset({"avx2", "avx512f"})).has_bf16
    assert Processor("x", None).has_bf16, "where the system does not tell, the library may"


@pytest.mark.parametrize(
    ("architecture", "flags", "saturate"),
    [
        ("x86_64", {"avx2"}, True),
        ("x86_64", {"avx2", "avx512_vnni"}, False),
        ("AMD64", {"avx_vnni"}, False),
        ("aarch64", {"asimddp"}, False),
        ("x86_64", None, False),
    ],
)
def test_int8_sums_saturate_without_vnni_on_x86_alone(monkeypatch, architecture, flags, saturate):
    found = Processor("x", None if flags is None else frozenset(flags))
    monkeypatch.setattr(int8, "processor", lambda: found)
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    assert int8.int8_sums_saturate() is saturate


def test_the_drivers_version_is_the_highest_cuda(monkeypatch):
    def version(number):
        number._obj.value = 12110

    answers = {
        "cuInit": lambda _: 0,
        "cuDriverGetVersion": version,
        "cuDeviceGetCount": lambda _: 0,
    }
    monkeypatch.setattr(nvidia, "bound_library", lambda: SimpleNamespace(**answers))
    assert nvidia.probe_cuda_driver() == nvidia.CudaDriver("12.11")


def test_numbers_of_arguments_are_never_nan():
    for wrong in (float("nan"), 10**400, "1", None):
        with refused("out_of_range", UsageError, what="share"):
            check_number(wrong, "share", least=0)
    assert check_number(1, "share", least=0) == 1.0


PROGRAM = """
import sys, threading
from pathlib import Path
import numpy as np
from upperson_rt.machine import limit_heap

if sys.argv[1] == "little":
    limit_heap(32 << 20)
    limit_heap(1 << 20)
    limit_heap(16 << 20)  # The smallest limit wins.

def held_mb():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) >> 10

kept, done, end = [], threading.Barrier(9), threading.Event()

def work():
    for _ in range(3):
        blocks = [np.ones(4 << 20, np.uint8) for _ in range(4)]
        kept.append([np.ones(1000, np.uint8) for _ in range(100)])  # Lies behind them.
        del blocks
    done.wait()
    end.wait()

before = held_mb()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
done.wait()
print(held_mb() - before)
end.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do otherwise")
def test_large_blocks_of_threads_go_back():
    others = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # They may have said so already.
    environment = {name: os.environ[name] for name in os.environ if not name.startswith(others)}
    held_mb = {}
    for how in ("usual", "little"):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        held_mb[how] = int(done.stdout)
    assert held_mb["little"] < 10
    assert held_mb["usual"] > 40  # The test shows something.
