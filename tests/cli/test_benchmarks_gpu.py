"""``python -m benchmarks.gpu``: nothing without a GPU; its code on a CPU and on the stand-ins.

The same functions run here as on a GPU: torch and ONNX Runtime on the CPU, TensorRT as its fake.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import gpu, gpu_libraries, tower_graphs
from benchmarks.contenders import FOLDED, GRAPHS
from benchmarks.random_model import ModelSpec
from tests.helpers.alone import found_alone
from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from tests.helpers.toy_bases import write_base
from tests.helpers.traces import once_in

QUICK = {"rounds": 1, "warmup": 1, "steps": 2, "workers": 0}

SUMMARY = """\
[11/25/2026-10:00:00] [I] === Performance summary ===
[11/25/2026-10:00:00] [I] Throughput: 1995.29 qps
[11/25/2026-10:00:00] [I] Latency: min = 0.4 ms, max = 0.6 ms, mean = 0.5 ms, median = 0.9 ms
[11/25/2026-10:00:00] [I] Enqueue Time: min = 0.0009 ms, max = 0.01 ms, mean = 0.001 ms, median = \
1.5e-03 ms, percentile(90%) = 0.001 ms, percentile(95%) = 0.002 ms, percentile(99%) = 0.004 ms
[11/25/2026-10:00:00] [I] GPU Compute Time: min = 0.4 ms, max = 0.5 ms, mean = 0.4 ms, median = \
0.498 ms, percentile(90%) = 0.5 ms, percentile(95%) = 0.501 ms, percentile(99%) = 0.503 ms
[11/25/2026-10:00:00] [I] Total Host Walltime: 3.00106 s
[11/25/2026-10:00:00] [I] Total GPU Compute Time: 2.98676 s
"""


def fake_trtexec(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program onto the PATH that prints a summary."""
    (folder / "text").write_text(SUMMARY)
    program = folder / "trtexec"
    program.write_text(f"#!/bin/sh\ncat {folder}/text\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def measure(folder: Path, traces: Path) -> dict[str, Any]:
    """Measure all of it at the smallest size, by functions and stand-ins."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        install_fake_tensorrt(monkeypatch, VERSIONS[-1])
        monkeypatch.setattr(tower_graphs, "export_onnx", once_in(traces))
        fake_trtexec(folder, monkeypatch)
        base, _ = write_base(folder / "base", "clip")
        spec = ModelSpec(base=str(base), height_px=48, width_px=32, batch_size=4)
        missing = dict.fromkeys(gpu_libraries.LIBRARIES, "")
        return gpu.measure(spec, (1, 3), missing, device="cpu", **QUICK)


@pytest.fixture(scope="module")
def measured(shared_folder: Path) -> Any:
    """What was measured; that takes more than 1 GB."""
    return found_alone(shared_folder, measure, shared_folder / "traces")


def test_all_contenders_agree_and_are_measured(measured: dict[str, Any]) -> None:
    assert measured["skipped"] == {
        "training in fp16": "precision fp16 needs a CUDA device: use bf16 or fp32 on a CPU"
    }
    variants = ("fp32", "fp16", "int8-fp16")
    contenders = {
        *(f"torch {name}" for name in ("fp32", "bf16", "fp16")),
        *(f"ONNX Runtime {name}" for name in ("fp32", "fp16")),
        *(f"TensorRT {name}{suffix}" for name in variants for suffix in ("", GRAPHS)),
        *(f"trtexec {name}" for name in variants),
    }
    for tower in ("image", "text"):
        found = measured["towers"][tower]
        assert list(found["batches"]) == ["1", "3"]
        for batch, rows in found["batches"].items():
            assert rows.keys() == contenders
            for name, row in rows.items():
                gflop = found["gflop_per_item"] * int(batch)
                assert row["gflops"] == pytest.approx(1000 * gflop / row["p50_ms"]), name
                queued = name.startswith(("torch", "trtexec"))
                assert (row["host_ms"] is not None) == queued, name
            assert rows[FOLDED]["speedup"] == 1
            assert rows["torch fp16"]["min_cosine"] < rows[FOLDED]["min_cosine"]
            assert rows["trtexec fp16"]["p99_ms"] == 0.503
            assert rows["trtexec fp16"]["host_ms"] == 0.0015
    assert measured["training"].keys() == {"fp32", "bf16"}
    for row in measured["training"].values():
        assert row["steps"] == 2
        assert row["share_in_step"] > 0
        assert row["images_per_s"] > 0
    assert measured["card"]["name"] == "Orin"


def test_the_command_prints_tables_and_json_and_writes_the_same_into_the_page(
    measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_tensorrt(monkeypatch, VERSIONS[-1], ("NVIDIA H100 80GB HBM3", 9, 0, 132))
    found = dict.fromkeys(gpu_libraries.LIBRARIES, lambda: "")
    monkeypatch.setattr(gpu_libraries, "LIBRARIES", found)
    card = {"card": measured["card"] | {"name": "NVIDIA H100 80GB HBM3"}}
    monkeypatch.setattr(gpu, "measure", lambda *_, **__: measured | card)
    result = CliRunner().invoke(gpu.app, ["--output", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    *_, last = result.stdout.splitlines()
    assert json.loads(last)["benchmark"] == "gpu"
    file = tmp_path / "gpu-nvidia-h100-80gb-hbm3.md"
    assert result.stderr.endswith(f"wrote {file}\n")
    page = file.read_text()
    rows = [line for line in page.splitlines() if line.startswith("| TensorRT fp16 |")]
    assert len(rows) == 4
    for text in (result.stdout, page):
        assert "skipped: training in fp16: precision fp16 needs a CUDA device" in text


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gpu_libraries, "missing_gpu", lambda: "no NVIDIA driver")
        for options in ([], ["--check"]):
            result = CliRunner().invoke(gpu.app, options)
            assert (result.exit_code, result.stdout) == (5, "")
            assert len(result.stderr.splitlines()) == 1
    install_fake_tensorrt(monkeypatch, VERSIONS[-1])
    monkeypatch.setattr(gpu_libraries, "_TRTEXEC", Path("/nowhere/trtexec"))
    monkeypatch.setenv("PATH", "/nowhere")
    result = CliRunner().invoke(gpu.app, ["--check"])
    assert result.exit_code == 0, result.stderr
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert lines.keys() == gpu_libraries.LIBRARIES.keys()
    assert lines["TensorRT"] == "is there"
    assert lines["trtexec"].startswith("skipped: ")
