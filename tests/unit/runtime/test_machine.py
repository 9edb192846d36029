import numpy as np
import pytest

from upperson_rt import machine
from upperson_rt.machine import Processor, describe_machine, machine_lines


@pytest.mark.parametrize(
    ("architecture", "cpuinfo", "cpu", "sets"),
    [
        (
            "x86_64",
            "model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_tile\n",
            "Some CPU",
            {"avx2", "avx512f", "amx_tile"},
        ),
        (
            "aarch64",
            "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n",
            "arm",
            {"asimddp", "i8mm"},
        ),
    ],
)
def test_instruction_sets_are_those_of_the_architecture(
    tmp_path, monkeypatch, architecture, cpuinfo, cpu, sets
):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    found = describe_machine()
    assert found["cpu"] == cpu
    assert {name for name, there in found["instruction_sets"].items() if there} == sets
    assert not all(found["instruction_sets"].values())
    assert found["cpus_available"] >= 1


def test_a_system_that_does_not_tell_is_not_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "absent")
    assert describe_machine()["instruction_sets"] is None


def test_bf16_is_known_by_its_instructions():
    for flag in ("avx512_bf16", "amx_bf16", "bf16"):
        assert Processor("x", frozenset({"avx2", flag})).has_bf16
    assert not Processor("x", frozenset({"avx2", "avx512f"})).has_bf16
    assert Processor("x", None).has_bf16, "where the system does not tell, the library may"


def test_two_lines_say_on_what_and_with_what_it_ran():
    machine = describe_machine("numpy", "not-installed") | {
        "cpu": "Some CPU", "cpus_available": 4, "load_average": 0.5,
        "instruction_sets": {"avx2": True, "amx_tile": False},
    }  # fmt: skip
    hardware, software = machine_lines(machine, 2).split("\n")
    assert hardware == "Some CPU, 2 threads, 4 CPUs, load 0.5, avx2 yes, amx_tile no"
    assert ", 1 thread, 4 CPUs" in machine_lines(machine, 1)
    assert software.startswith("upperson ")
    assert software.endswith(f", numpy {np.__version__}, not-installed absent")
    unknown = machine | {"load_average": None, "instruction_sets": None}
    assert machine_lines(unknown, None).startswith(
        "Some CPU, default threads, 4 CPUs, load unknown\n"
    )
