"""``python -m benchmarks``: its names, what documents say of them, and each one at a small size."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import upperson_rt
from benchmarks import __main__ as runner
from benchmarks import cost, month, people, scores, stores, tower_graphs, towers
from benchmarks.contenders import FOLDED, LITERAL, ORT_FP32, ORT_INT8, Contender
from benchmarks.report import timed_rows
from benchmarks.towers import PADDED
from tests.helpers.alone import found_alone
from tests.helpers.command_line import ROOT
from tests.helpers.refused import refused
from tests.helpers.toy_bases import write_base
from tests.helpers.toy_bundle import make_toy_bundle
from tests.helpers.traces import once_in
from upperson_autotune.timing import Timing
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError
from upperson_rt.gallery import Gallery, Item
from upperson_scores import labelled_queries

pytestmark = pytest.mark.timeout(180)

NAMES = ("towers", "people", "gallery", "flash", "scores", "alerts", "recall", "promise")


def run(module: Any, *arguments: object) -> Any:
    return CliRunner().invoke(module.app, [*map(str, arguments)])


def values(result: Any) -> Any:
    """Return what the last line says, which is all values: conditions first."""
    assert result.exit_code == 0, result.stderr
    *shown, last = result.stdout.splitlines()
    found = json.loads(last)
    assert list(found)[:5] == ["benchmark", "machine", "threads", "batch_size", "warmup"]
    assert {"cpu", "instruction_sets", "load_average", "packages"} <= found["machine"].keys()
    assert None not in found["machine"]["packages"].values()
    assert not any(line.startswith("{") for line in shown), "tables come before it"
    return found | {"shown": "\n".join(shown)}


def test_one_is_run_by_name_and_all_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner.commands([]) == [line.split() for line in runner.DOCUMENTED]
    assert runner.names() == [*NAMES, "gpu", "month", "cost", "trials", "stores"]
    assert [line[2] for line in runner.commands(["gallery"])] == ["100000", "999000", "1000000"]
    assert runner.commands(["gallery", "--rows", "5000"]) == [["gallery", "--rows", "5000"]]
    with pytest.raises(SystemExit, match="'galery': expected one of towers"):
        runner.commands(["galery"])

    codes = iter((0, 6, 3, *[0] * len(runner.DOCUMENTED)))  # The exit code is the first failure's.
    ran = []

    def noted(command: list[str], env: dict[str, str]) -> Any:
        ran.append((command[2], env["OMP_NUM_THREADS"]))
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(runner.subprocess, "run", noted)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    with pytest.raises(SystemExit) as end:
        runner.main()
    assert end.value.code == 6
    assert ran == [(f"benchmarks.{line.split()[0]}", "1") for line in runner.DOCUMENTED]


def test_documents_make_and_benchmarks_name_one_another() -> None:
    """The log and the changelog may name benchmarks that are gone."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")]
    text = "\n".join(page.read_text("utf-8") for page in pages if page.name != "log.md")
    for name in re.findall(r"(?:-m benchmarks\.|NAME=|benchmarks/)(\w+)\b(?!\.(?:md|json))", text):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name
    written = re.findall(r"python -m benchmarks\.([a-z]+(?: --?[\w-]+(?: [\w/-]+)?)*)", text)
    sizes = {re.sub(r"\d{3,}", "N", line) for line in written}
    for line in runner.DOCUMENTED:
        name, *options = shlex.split(line)
        app = importlib.import_module(f"benchmarks.{name}").app
        typer.main.get_command(app).make_context(name, options)
        assert re.sub(r"\d{3,}", "N", line) in sizes
        help_text = run(importlib.import_module(f"benchmarks.{name}"), "--help").stdout
        assert f"Example: python -m benchmarks.{name}" in help_text


SMALL_RUNS: dict[str, tuple[str, Any]] = {
    "alerts": (
        "--sentences 30 --rows 5000 --commits 40 --every 0",
        lambda found: found["times"]["commit with alerts"]["runs"] == 40,
    ),
    "scores": (
        "--fit 1 --fit 2 --check 3 --people 40",
        lambda found: found["rows"]["these sets, all"]["auroc"] > 80 and len(found["shifts"]) == 2,
    ),
    "recall": (
        "--set 1 --set 2 --set 3 --tested 1 --people 60 --among 50",  # 20 in 1,000 are meant.
        lambda found: all(5 < one["false in 1,000"] < 60 for one in found["rows"].values()),
    ),
    "promise": (
        "--sites 2 --shifting 1 --sentences 10 --days 6 --visits 60 --people 40 --rate 3 "
        "--workers 1",
        lambda found: found["rows"]["site 2"]["inside %"] >= 50,
    ),
    "people": (
        "--people 8 --test-people 12 --passes 1",
        lambda found: all(
            row["R@1 low"] <= row["R@1 points"] <= row["R@1 high"] for row in found["rows"].values()
        ),
    ),
    "gallery": (
        "--rows 1500 --dim 32 --seconds 0.05 --folder .",
        lambda found: (
            (found["recall_at_10"], [*found["batch"]]) == (1, ["gallery", "faiss flat fp16 alone"])
        ),
    ),
    "flash": (
        "--rows 1000 --dim 32 --batch 100 --batch 500 --folder .",
        lambda found: all(
            row["factor"] == pytest.approx(row["total"] / row["row_bytes"])
            for row in found["batches"].values()
        ),
    ),
}


@pytest.mark.parametrize("name", SMALL_RUNS)
def test_each_runs_at_a_small_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "flash" and not Path("/proc/self/io").exists():
        pytest.skip("counts what Linux counts")
    monkeypatch.chdir(tmp_path)
    if name == "scores":
        monkeypatch.setattr(labelled_queries, "_MOST", 10)
        # Others would do the same again.
        for few in ("_FEW", "_SIZES", "_SHIFTED"):
            monkeypatch.setattr(scores, few, getattr(scores, few)[:1])
        monkeypatch.setattr(scores, "SyntheticSpec", partial(scores.SyntheticSpec, views=2))
        monkeypatch.setattr(scores.Drawn, "pictures", cache(scores.Drawn.pictures))
    monkeypatch.setattr(people, "_REHEARSED", 8)
    options, is_plausible = SMALL_RUNS[name]
    found = values(run(importlib.import_module(f"benchmarks.{name}"), *options.split()))
    assert is_plausible(found), found
    assert list(tmp_path.iterdir()) == [], "nothing stays behind"


def time_towers(folder: Path, traces: Path) -> dict[str, Any]:
    """Measure both towers of a toy in this process."""
    base, _ = write_base(folder / "base", "clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower_graphs, "export_onnx", once_in(traces))
        result = run(
            towers, "--base", base, "--height", 48, "--width", 32, "--batch-size", 3,
            "--rounds", 1, "--warmup", 0, "--threads", 1,
        )  # fmt: skip
    return {"exit_code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}


def test_towers_agree_and_are_timed_in_all_forms(shared_folder: Path) -> None:
    """Two exports and all contenders take 0.6 GB, hence a process of its own."""
    done = found_alone(shared_folder, time_towers, shared_folder / "traces")
    found = values(SimpleNamespace(**done))
    image, text = (found["towers"][kind]["batches"]["3"] for kind in ("image", "text"))
    assert {LITERAL, FOLDED, ORT_FP32, ORT_INT8} <= image.keys()
    assert set(text) == set(image) | {name + PADDED for name in image if name != LITERAL}
    for kind, rows in (("image", image), ("text", text)):
        assert rows[LITERAL]["speedup"] == 1
        for name, row in rows.items():
            assert name in found["shown"]
            assert row["min_cosine"] >= (0.99 if "int8" in name else 0.9999), name
            gflop = 3 * found["towers"][kind]["gflop_per_item"]
            assert row["gflops"] == pytest.approx(1000 * gflop / row["p50_ms"])
        # int8 that equals float32 to the last bits would not have been quantized.
        assert rows[ORT_INT8]["min_cosine"] < rows[ORT_FP32]["min_cosine"]
    assert ("no AMX here" in found["shown"]) != found["machine"]["instruction_sets"]["amx_bf16"]
    summary = found["summary"]
    ratio = image[LITERAL]["p50_ms"] / image[summary["image_int8"]]["p50_ms"]
    assert summary["image_int8_over_literal"] == pytest.approx(ratio)
    assert summary["text_fp32_over_padded"] == pytest.approx(text[ORT_FP32]["padded_ratio"])


def test_other_embeddings_than_the_references_end_it_or_are_left_out_with_a_reason() -> None:
    expected = np.eye(3, 8, dtype=np.float32)
    alike = (expected + 100) / np.linalg.norm(expected + 100, axis=1, keepdims=True)
    assert towers.min_cosine("x", expected, expected, 0.9999) == 1
    for wrong, right in (
        (expected[::-1].copy(), expected),
        (expected * np.float32("nan"), expected),
        (alike[[1, 0, 2]], alike),  # Nearly equal items pass any floor, even exchanged.
    ):
        with pytest.raises(IntegrityError, match="'x' does not embed"):
            towers.min_cosine("x", wrong, right, 0.99)

    def fixed(rows: Any) -> Contender:
        return Contender(run=lambda _: rows, min_cosine=0.9999)

    def failing() -> Any:
        yield "first", fixed(expected)
        raise BackendError("the second does not build")

    def agreeing(skipped: dict[str, str] | None) -> Any:
        makers = {
            "torch": iter([(FOLDED, fixed(expected))]),
            "TensorRT": failing(),
            "other": iter([("wrong", fixed(np.eye(3, 8, 1, dtype=np.float32)))]),
        }
        return towers.agreeing(makers, {"": np.zeros(1)}, FOLDED, skipped)

    skipped: dict[str, str] = {}
    kept, cosines = agreeing(skipped)
    assert list(kept) == list(cosines) == [FOLDED, "first"]
    assert skipped.keys() == {"TensorRT", "wrong"}
    with pytest.raises(BackendError, match="the second does not build"):
        agreeing(None)


def test_flop_and_speeds() -> None:
    tower = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    assert towers.flop_of(tower, np.zeros((4, 7), np.float32)) == 2 * 4 * (7 * 5 + 5 * 3)
    slow = Timing(seconds=[3.0, 1.0, 2.0], cpu_seconds=[2.0])
    fast = Timing(seconds=[0.5], cpu_seconds=[0.0])
    row = timed_rows({"slow": slow, "fast": fast}, "slow", items=4)["fast"]
    # Ratios of medians; unknown where a run takes no time.
    assert (row["speedup"], row["cpu_speedup"], row["items_per_s"]) == (4, None, 8)


def test_boxes_of_a_cluster_come_from_lines_through_measurements(tmp_path: Path) -> None:
    measured = tmp_path / "fill.jsonl"
    steps = [
        {
            "rows": rows, "rss_bytes": 200 * rows + 1e8, "p50_ms": 10 + 4e-6 * rows,
            "database_bytes": 1300 * rows, "index_bytes": 200 * rows,
        }
        for rows in (100_000, *range(1_000_000, 11_000_000, 1_000_000))
    ]  # fmt: skip
    measured.write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    options = ("--measured", measured, "--memory", 2.11, "--price", 30, "--within", 100)
    for more, limit, boxes in (
        ((), "memory", 10),  # 10 M each.
        (("--within", 30.5), "time", 20),
        (("--disk", 7.6), "disk", 20),
        (("--queries", 99), "cores", 40),  # 20 ms of two cores each: 2.55 million rows.
    ):
        found = values(run(cost, *options, *more))["sizes"]["100 M"]
        assert (found["boxes"], found["limit"], found["cost"]) == (boxes, limit, 30 * boxes)
        assert found["boxes_low"] == found["boxes"] == found["boxes_high"]
    measured.write_text("".join(measured.read_text().splitlines(keepends=True)[:4]))
    with refused("too_few_sizes", InputError):
        cost.cost(measured)


def make_toy_demo(folder: Path) -> None:
    """Write what `Month` reads of a demo: a bundle, a gallery and captions of six people."""
    bundle = make_toy_bundle(folder / "bundle")
    encoder = upperson_rt.open(bundle)
    names = [f"{person}_{view}.jpg" for person in range(6) for view in range(2)]
    vectors = np.random.default_rng(0).standard_normal((12, encoder.embed_dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    where = (folder / "gallery", encoder.fingerprint, encoder.embed_dim)
    with Gallery.open(*where, create=True) as store:
        store.add([Item(key=name) for name in names], vectors)
    street = folder / "people" / "street-1"
    street.mkdir(parents=True)
    records = [{"image": name, "split": "test", "caption": f"person {name[0]}"} for name in names]
    (street / "annotations.jsonl").write_text("\n".join(map(json.dumps, records)))


def test_a_month_of_cameras_is_filled_and_searched(tmp_path: Path) -> None:
    make_toy_demo(tmp_path / "demo")
    options = ("--folder", tmp_path / "month", "--demo", tmp_path / "demo", "--minutes", 0.03)

    found = values(run(month, *options, "--rows", 1000, "--searches", 5))
    assert found["recall"] == found["recall_by_track"] == {"sentences": 1.0, "pictures": 1.0}
    assert [(step["rows"], step["added"]) for step in found["fill"]] == [(1000, 1000)]
    assert found["sentences"]["searches"].keys() == month.FILTERS.keys()
    assert found["live"]["commits of ten"]["count"] >= 2
    assert found["live"]["searches beside"]["count"] >= 1


def test_stores_are_filled_searched_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_toy_demo(tmp_path / "demo")
    monkeypatch.setattr(stores, "_KILLS", 1)
    monkeypatch.setattr(stores, "_KILLED_COMMITS", 3)
    options = ("--folder", tmp_path / "stores", "--demo", tmp_path / "demo", "--rows", 4096)
    found = values(run(stores, *options, "--only", "ours", "--only", "faiss IVF-SQ8"))["stores"]
    ours, faiss = found["ours"], found["faiss IVF-SQ8"]
    assert ours["recall"] == ours["filter_recall"] == 1.0
    assert ours["acknowledged"] >= 3 * 256
    assert ours["lost"] == 0
    assert faiss["acknowledged"] == faiss["lost"] >= 3 * 256
    work = tmp_path / "stores" / "4096"
    assert 0 < json.loads((work / "plan.json").read_text())["share"] < 0.03
    assert not list(work.glob("*.store"))

    assert run(stores, *options, "--only", "fiass").exit_code == UsageError.exit_code
