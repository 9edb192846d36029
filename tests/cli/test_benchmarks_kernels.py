"""``python -m benchmarks.kernels``: int8 of the quick demo beside exact and plain arithmetic."""

import pytest

from benchmarks import kernels
from benchmarks.marks import data_set
from upperson_rt.errors import UsageError


def test_every_way_of_running_is_compared_with_plain(demo_folder, monkeypatch) -> None:
    def here(function, *arguments, environment):
        bounds.append(environment.get("ONEDNN_MAX_CPU_ISA"))
        function(*arguments)

    bounds: list[str | None] = []
    monkeypatch.setattr(kernels, "call_in_fresh_process", here)
    found = kernels.measured(demo_folder / "bundle", data_set(demo_folder / "people"), 4)
    assert found["people"] == 4
    assert bounds == [None] * 4 + ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", None]
    for tower in ("image", "text"):
        rows = found[tower]
        assert list(rows) == [
            "plain, last bits changed", "ONNX Runtime", "OpenVINO, AVX2", "OpenVINO, AVX-512",
            "OpenVINO, VNNI", "OpenVINO", "ONNX Runtime, to exact products",
            "OpenVINO, between these kernels",
        ]  # fmt: skip
        for row in rows.values():
            assert 0.99 < row["min"] <= row["median"] < 1.00001
            assert (row["below"] > 0) == (row["min"] <= kernels.NEAR)
        assert rows["ONNX Runtime, to exact products"]["min"] > kernels.NEAR
        assert rows["plain, last bits changed"]["min"] != 1.0, "nothing was changed"


def test_without_an_emulator_nothing_is_begun(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="there is no qemu-x86_64: apt install qemu-user"):
        kernels.measured(tmp_path / "bundle", tmp_path / "people", 2, emulate=True)
