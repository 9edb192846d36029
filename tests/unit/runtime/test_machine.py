"""The processor and the driver."""

import pytest

from upperson_machine import int8
from upperson_machine.description import describe_machine
from upperson_rt import machine
from upperson_rt.machine import Processor


def test_instruction_sets_are_those_of_the_architecture_and_never_guessed(tmp_path, monkeypatch):
    info, architecture = tmp_path / "cpuinfo", "aarch64"
    monkeypatch.setattr(machine, "_CPUINFO", info)
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")

    def found():
        description = describe_machine()
        assert description["cpus_available"] >= 1
        sets = description["instruction_sets"]
        return description["cpu"], sets and {name for name, there in sets.items() if there}

    assert found() == ("arm", None)
    info.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert found() == ("arm", {"asimddp", "i8mm"})
    architecture = "x86_64"
    info.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_tile\n")
    assert found() == ("Some CPU", {"avx2", "avx512f", "amx_tile"})


@pytest.mark.parametrize(
    ("architecture", "flags", "has_bf16", "saturates"),
    [
        ("x86_64", {"avx2", "avx512f"}, False, True),
        ("x86_64", {"avx2", "avx512_vnni"}, False, False),
        ("x86_64", {"avx2", "avx_vnni"}, False, False),
        ("x86_64", {"avx2", "avx512_bf16"}, True, True),
        ("x86_64", {"amx_int8", "amx_bf16"}, True, False),
        ("aarch64", {"asimddp"}, False, False),
        ("aarch64", {"bf16"}, True, False),
        ("x86_64", None, True, False),  # Where the system does not tell, the library may.
    ],
)
def test_bf16_and_int8_sums_that_saturate_are_known_by_the_instructions(
    monkeypatch, architecture, flags, has_bf16, saturates
):
    found = Processor("x", None if flags is None else frozenset(flags))
    monkeypatch.setattr(int8, "processor", lambda: found)
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    assert (found.has_bf16, int8.int8_sums_saturate()) == (has_bf16, saturates)
