"""The processor and the driver."""

import pytest

from upperson_machine import int8
from upperson_machine.description import describe_machine
from upperson_rt import machine
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
        ("aarch64", {"asimddp"}, False),
        ("x86_64", None, False),
    ],
)
def test_int8_sums_saturate_without_vnni_on_x86_alone(monkeypatch, architecture, flags, saturate):
    found = Processor("x", None if flags is None else frozenset(flags))
    monkeypatch.setattr(int8, "processor", lambda: found)
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    assert int8.int8_sums_saturate() is saturate
