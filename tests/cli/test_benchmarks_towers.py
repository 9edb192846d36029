"""``python -m benchmarks.towers`` on a toy, one round."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gemm, tower_graphs, towers
from benchmarks.towers import LITERAL, ORT_FP32, ORT_INT8, PADDED
from tests.helpers.alone import found_alone
from tests.helpers.toy_bases import write_base
from tests.helpers.traces import once_in
from upperson_rt.backends.measurement import Timing
from upperson_rt.errors import IntegrityError
from upperson_rt.machine import Processor

QUICK = ("--batch-size", "3", "--rounds", "1", "--warmup", "0", "--threads", "1")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(towers.app, arguments)


pytestmark = pytest.mark.timeout(120, func_only=True)


def measured(folder: Path, traces: Path) -> tuple[int, str, str]:
    """Measure both towers of a toy in this process; return exit code, stdout and stderr."""
    base, _ = write_base(folder / "base", "clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower_graphs, "export_onnx", once_in(traces))
        result = run("--base", str(base), "--height", "48", "--width", "32", *QUICK, "--json")
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def printed(shared_folder: Path) -> SimpleNamespace:
    """What the command ended with; two exports and all contenders take 0.6 GB."""
    code, stdout, stderr = found_alone(shared_folder, measured, shared_folder / "traces")
    return SimpleNamespace(exit_code=code, stdout=stdout, stderr=stderr)


def test_people_get_tables_and_machines_json(
    printed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed.exit_code == 0, printed.stderr
    found = json.loads(printed.stdout)
    towers._show(found)
    shown = capsys.readouterr().out
    assert any(line.startswith(LITERAL) and "1.00x" in line for line in shown.splitlines())
    has_amx = (found["machine"]["instruction_sets"] or {}).get("amx_bf16", False)
    assert ("no AMX here" in shown) != has_amx
    assert (found["spec"]["batch_size"], found["spec"]["threads"]) == (3, 1)
    assert {"onnxruntime", "openvino", "torch"} <= found["machine"]["packages"].keys()
    assert "load_average" in found["machine"]


def test_every_contender_agrees_and_is_measured(printed: Any) -> None:
    found = json.loads(printed.stdout)
    image, text = (found["towers"][kind]["contenders"] for kind in ("image", "text"))
    assert {LITERAL, ORT_FP32, ORT_INT8} <= image.keys()
    assert not any(name.endswith(PADDED) for name in image)
    assert set(text) == set(image) | {name + PADDED for name in image if name != LITERAL}
    for rows in (image, text):
        assert rows[LITERAL]["speedup"] == 1
        for name, row in rows.items():
            assert row["runs"] == len(row["seconds"]) == len(row["cpu_seconds"]) == 1
            low = "int8" in name or "bf16" in name
            assert row["min_cosine"] >= (0.99 if low else 0.9999), name
            assert row["gemm_share"] > 0
            assert row["own_share"] > 0
        # int8 that equals float32 to the last bits would not have been quantized.
        assert rows[ORT_INT8]["min_cosine"] < rows[ORT_FP32]["min_cosine"]
    assert text[ORT_FP32]["gflop_per_item"] < text[ORT_FP32 + PADDED]["gflop_per_item"]
    assert text[LITERAL]["gflop_per_item"] == text[ORT_FP32 + PADDED]["gflop_per_item"]
    assert text[ORT_FP32]["padded_ratio"] > 0
    assert "padded_ratio" not in text[LITERAL]
    assert found["summary"]["image_int8"] in image
    assert found["summary"]["image_int8_over_literal"] > 0
    for peak in found["towers"]["image"]["peaks"].values():
        assert peak["flops"] > 0
        assert peak["cpu_flops"] > 0


def test_a_contender_that_embeds_something_else_ends_the_benchmark() -> None:
    expected = np.eye(3, 8, dtype=np.float32)
    assert towers.min_cosine("x", expected, expected) == 1
    with pytest.raises(IntegrityError, match=r"'x' does not embed as 'literal torch fp32'"):
        towers.min_cosine("x", expected[::-1].copy(), expected)
    with pytest.raises(IntegrityError, match="rows that are not finite"):
        towers.min_cosine("x", expected * np.float32("nan"), expected)
    # Nearly equal items pass any floor, even when they are exchanged.
    alike = expected + 100
    alike /= np.linalg.norm(alike, axis=1, keepdims=True)
    assert towers.min_cosine("x", alike, alike) > 0.9999
    with pytest.raises(IntegrityError, match="items exchanged"):
        towers.min_cosine("x", alike[[1, 0, 2]], alike)


def test_flop_are_counted_on_the_tower_itself() -> None:
    tower = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    item = np.zeros((4, 7), np.float32)
    assert towers.flop_of(tower, item) == 2 * 4 * (7 * 5 + 5 * 3)


def test_peaks_are_the_best_run_of_any_shape() -> None:
    timings = {
        ("fp32", (2, 3, 5)): Timing(seconds=[2.0, 1.0], cpu_seconds=[4.0, 8.0]),
        ("fp32", (2, 3, 50)): Timing(seconds=[20.0], cpu_seconds=[20.0]),
        ("bf16", (2, 3, 5)): Timing(seconds=[0.5], cpu_seconds=[0.5]),
    }
    flop = 20 * (2 * 2 * 3 * 5)  # Of twenty small products, or of two large ones.
    assert gemm.peaks(timings, flop) == {
        "fp32": {"flops": flop, "cpu_flops": flop / 4, "p50_flops": flop / 1.5},
        "bf16": {"flops": flop * 2, "cpu_flops": flop * 2, "p50_flops": flop * 2},
    }


def test_equal_shapes_of_products_run_once() -> None:
    runs = gemm.gemm_contenders(4, [(8, 8), (8, 8), (8, 16)], 4096)
    assert list(runs) == [
        (kind, (4, 8, outputs)) for outputs in (8, 16) for kind in gemm.float_types()
    ]
    repeats = {shape: len(run.args[0]) for (_, shape), run in runs.items()}
    assert repeats == {(4, 8, 8): 8, (4, 8, 16): 4}, "all do the same work"
    for product in runs.values():
        product()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "nothing"), "base 'nothing' is unknown"),
        (("--base", "upperson-small", "--height", "100", "--width", "32"), "image size 100x32"),
    ],
)
def test_what_cannot_be_built_is_a_usage_error(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_own_products_are_those_of_every_linear_in_order() -> None:
    weights = [torch.zeros(24, 8), torch.zeros(8, 8), torch.zeros(32, 8), torch.zeros(8, 32)] * 2
    run, flop = gemm.own_products(5, weights)
    assert flop == 2 * 5 * 2 * (24 * 8 + 8 * 8 + 2 * 32 * 8)
    assert [tuple(weight.shape) for _, weight in run.args[0]] == [tuple(w.shape) for w in weights]
    assert {x.dtype for x, _ in run.args[0]} == {gemm.FLOAT_TYPES[gemm.float_types()[-1]]}
    run()


@pytest.fixture
def no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without instructions for it, where a product takes minutes."""
    avx2 = Processor("EPYC", frozenset({"avx2"}))
    monkeypatch.setattr(gemm, "processor", lambda: avx2)


@pytest.mark.usefixtures("no_bf16")
def test_without_instructions_for_bf16_nothing_is_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(8, 8)
    multiplied = []
    linear = torch.nn.functional.linear

    def noted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        multiplied.append(x.dtype)
        return linear(x, w)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    embeds = np.eye(3, 8, dtype=np.float32)
    contender = towers.Contender(run=lambda: embeds, flop=1000)
    names = (LITERAL, ORT_FP32, ORT_INT8)
    found = towers.measure(
        dict.fromkeys(names, contender), [weight], rows=4, batch_size=3, rounds=1, warmup=0,
        progress=lambda done, total: None,
    )  # fmt: skip
    assert list(found["peaks"]) == ["fp32"]
    assert set(multiplied) == {torch.float32}
    assert found["contenders"][ORT_INT8]["gemm_share"] > 0


@pytest.mark.usefixtures("no_bf16")
def test_without_instructions_for_bf16_that_is_said(
    printed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(printed.stdout)
    for tower in found["towers"].values():
        tower["peaks"].pop("bf16", None)
    towers._show(found)
    shown = capsys.readouterr().out
    assert "no instructions for bf16 here: what is in bf16 is left out" in shown
    assert "of fp32 peak" in shown
