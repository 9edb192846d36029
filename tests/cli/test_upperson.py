"""``upperson``: refusals of its commands, tampered runs, and the quick demo."""

import dataclasses
import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import upperson.train
from tests.helpers.command_line import run_program
from tests.helpers.invoke import run, run_failing, run_json, run_rt_json, snapshot
from tests.helpers.traces import as_in
from upperson import pretrain
from upperson.config import read_config
from upperson.demo_page import STAGES
from upperson.model import base
from upperson_rt.bundle import Bundle
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery
from upperson_rt.retriever import Retriever

METRICS = ["R@1", "R@5", "R@10", "mAP", "mINP"]
MODELS = ["zero_shot", "fine_tuned", "onnx_fp32", "onnx_int8"]
PARTS = {"answer.png", "bundle", "gallery", "people", "report.html", "run", "summary.json"}
ONE_QUERY = 100 / 160
"""Points that one query of the quick demo is worth: ties may fall either way."""


def test_refusals_touch_nothing_of_the_users(work, demo_folder, people):
    (work / "holiday").mkdir()
    (work / "holiday/photo.txt").write_text("mine")
    run_of_demo = demo_folder / "run"
    for exit_code, code, *arguments in (
        (3, "dataset_not_found", "train", "--root", "nowhere"),
        (3, "run_not_empty", "train", "--root", people, "--output", "holiday"),
        (3, "run_not_empty", "train", "--root", people, "--output", "holiday", "--seeds", 2),
        (3, "neither_run_nor_bundle", "evaluate", "run", "--root", "nowhere"),
        (3, "not_a_run", "export", "nowhere"),
        (3, "not_a_run", "export", "holiday"),
        (3, None, "export", run_of_demo, "--output", "holiday", "--no-int8"),
        (3, "not_a_demo", "demo", "--output", "holiday"),
        (3, "not_a_folder", "demo", "--output", "holiday/photo.txt"),
        (3, "not_synthetic", "data", "synthesize", "holiday"),
        (2, "setting_out_of_range", "data", "synthesize", "new", "--look", "beach"),
        (2, "output_wrong", "pretrain-small", "--output", "base.txt"),
        (2, "output_wrong", "pretrain-small", "--output", "no/base.safetensors"),
        (2, None, "train", "--root", "people", "--epochs", "many"),
        (2, None, "data", "check"),
    ):
        run_failing(exit_code, code, *arguments)
        assert snapshot(work) == {"holiday/photo.txt": b"mine"}, arguments
        assert list(work.iterdir()) == [work / "holiday"], arguments


def test_a_missing_package_ends_with_5_and_the_command(work, monkeypatch):
    for without, extra, *arguments in (
        ("torch", "train", "train", "--root", "people"),
        ("yaml", "train", "evaluate", "run", "--root", "people"),
        ("torch", "train", "pretrain-small", "--output", "base.safetensors"),
        ("onnxscript", "export", "export", "run"),
        ("jinja2", "export", "parity", "run"),
        ("open_clip", "train", "import", "best.pth", "--output", "run"),
        ("torch", "train", "distill", "run"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, without, None)
            error = run_failing(5, "extra_missing", *arguments)
        assert error["fields"]["package"] == without
        assert f"pip install 'upperson[{extra}]'" in error["message"]
    done = run_program("upperson", "demo", cwd=work, without=["open_clip"])
    assert done.returncode == 5, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(work.iterdir()) == []


def test_a_run_that_was_tampered_with_is_refused(copied_run, work, monkeypatch):
    config = copied_run / "config.yaml"
    text = config.read_text()
    assert "lora_rank: 16" in text
    config.write_text(text.replace("lora_rank: 16", "lora_rank: 8"))
    run_failing(3, "adapter_does_not_fit", "export", copied_run)
    config.write_text(text.replace("weight_decay:", "weight_decoy:"))
    assert "'weight_decoy'" in run_failing(3, None, "export", copied_run)["message"]
    config.write_text(text)

    assets = shutil.copytree(base.ASSETS, work / "assets")
    weights = load_file(assets / "upperson-small.safetensors")
    weights["ln_final.bias"][0] += 1
    save_file(weights, assets / "upperson-small.safetensors")
    monkeypatch.setattr(base, "ASSETS", assets)
    run_failing(6, "base_changed", "export", copied_run)
    (assets / "upperson-small.safetensors").write_bytes(b"junk")
    run_failing(3, "weights_unreadable", "export", copied_run)
    assert not Path("bundle").exists()


def test_a_start_makes_it_the_second_stage(work, monkeypatch):
    given = []
    monkeypatch.setattr(
        pretrain, "pretrain_small", lambda *words: given.append(words) or [(0, 1.0)]
    )
    start, output = work / "first.safetensors", work / "base.safetensors"
    for more in ((), ("--start", start), ("--start", start, "--steps", 7)):
        assert run("pretrain-small", "--output", output, *more).exit_code == 0
    second = pretrain.second_stage(start)
    assert [config for config, _, _ in given] == [
        pretrain.PretrainConfig(), second, dataclasses.replace(second, steps=7),
    ]  # fmt: skip
    assert {path for _, path, _ in given} == {output}


# --- the quick demo ---


def check_summary(summary):
    assert {*MODELS, "seconds"} <= summary.keys()
    for model in MODELS:
        assert list(summary[model]) == METRICS
        values = list(summary[model].values())
        assert all(0 < value <= 100 for value in values)
        assert values[:3] == sorted(values[:3])
    for name in METRICS:  # Folding and export change nothing.
        assert abs(summary["onnx_fp32"][name] - summary["fine_tuned"][name]) <= ONE_QUERY
    words = summary["short_questions"]
    assert list(words) == ["zero_shot", "fine_tuned", "onnx_int8", "chance"]
    for shares in words.values():
        assert list(shares) == ["gender", "colour", "garment", "all"]
        assert 0 <= shares["all"] <= min(shares.values()) <= 100
    assert 0 < words["chance"]["all"] < min(list(words["chance"].values())[:3])
    stages = {"render", "zero_shot", "train", "export", "index", "query", "report"}
    assert set(summary["seconds"]) == stages
    assert all(0 <= value < 240 for value in summary["seconds"].values())


def test_the_demo_writes_its_parts_and_nothing_else(quick_demo):
    folder = quick_demo.folder
    assert {path.name for path in folder.iterdir()} == PARTS
    summary = json.loads(quick_demo.stdout)
    assert summary == json.loads((folder / "summary.json").read_text("utf-8"))
    check_summary(summary)
    config = read_config(folder / "run/config.yaml")
    assert (config.shorten_captions, config.wrong_captions, config.kept_share) == (0.5, True, 0.5)
    for stage in ("rendering people: 160/160", "training: ", "exporting the image tower"):
        assert stage in quick_demo.stderr
    with Image.open(folder / "answer.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000  # Not an empty sheet.

    html = (folder / "report.html").read_text("utf-8")  # One file, which loads nothing.
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", html)
    assert len(sources) > 10
    assert all(source.startswith("data:image/") for source in sources)
    for word in ("@import", "<script", "url("):
        assert word not in html
    for model in MODELS:
        assert f"{summary[model]['mAP']:.2f}" in html
    words = summary["short_questions"]["onnx_int8"]
    shown = ", ".join(f"{part} {value:.2f} %" for part, value in words.items())
    assert shown in " ".join(html.split())


def test_the_bundle_opens_and_the_gallery_is_searched(demo_folder, people, work):
    encoder = Bundle.open(demo_folder / "bundle").encoder()
    with Gallery.open(demo_folder / "gallery", encoder.fingerprint, encoder.embed_dim) as gallery:
        assert gallery.count() == 80
        assert gallery.verify() == []
        expected = Retriever(encoder, gallery).query("woman in red coat", k=5)
    folders = ["-b", demo_folder / "bundle", "-g", demo_folder / "gallery"]
    hits = run_rt_json("query", *folders, "woman in red coat", "-k", 5)["hits"]
    assert [hit["key"] for hit in hits] == [hit.item.key for hit in expected]
    assert all(Path(hit["source"]).is_relative_to(people) for hit in hits)
    assert all(hit["camera"].startswith("cam") for hit in hits)
    assert run_rt_json("doctor", *folders)["ok"]


@pytest.mark.timeout(120, func_only=True)
def test_train_and_export_alone(demo_folder, people, work, monkeypatch):
    monkeypatch.setattr("upperson_export.candidates.export_onnx", as_in(demo_folder / "bundle"))
    trained = run_json("train", "--root", people, "--epochs", 2, "--output", "run")
    assert (trained["run"], trained["best_epoch"], trained["val"]) == ("run", 2, None)
    assert list(trained["test"]) == METRICS
    assert {"config.yaml", "adapter.safetensors", "results.json", "metrics.csv", "curves.png"} <= {
        path.name for path in (work / "run").iterdir()
    }
    (work / "bundle").mkdir()  # An empty folder is no reason to refuse.
    exported = run_json("export", "run", "--output", "bundle", "--no-int8", "--calib-size", 24)
    assert list(exported["variants"]) == ["fp32"]
    assert exported["variants"]["fp32"]["metrics"] == pytest.approx(trained["test"], abs=ONE_QUERY)
    assert Bundle.open(work / "bundle", "fp32").variant == "fp32"
    assert {path.name for path in work.iterdir()} == {"run", "bundle"}


@pytest.mark.timeout(120, func_only=True)
def test_the_demo_runs_again_over_an_earlier_one(demo_folder, work, monkeypatch):
    folder = shutil.copytree(demo_folder, work / "demo")
    (folder / "notes.txt").write_text("mine")
    (folder / "report.html").write_text("old")
    pictures = {path: path.stat().st_mtime_ns for path in (folder / "people").rglob("*.jpg")}

    # Most of a demo's time: neither knows that there was a demo before.
    def train_as_before(config, output, *_):
        assert Path(config.root) == people
        shutil.copytree(demo_folder / "run", output)
        return SimpleNamespace(test=SimpleNamespace(as_dict=lambda: measured))

    def export_as_before(run, output, *_, **__):
        assert (run / "adapter.safetensors").is_file()
        shutil.copytree(demo_folder / "bundle", output)
        report = json.loads((output / "report.json").read_text("utf-8"))
        return SimpleNamespace(as_dict=lambda: report)

    (people,) = Path("demo/people").iterdir()
    measured = json.loads((demo_folder / "summary.json").read_text("utf-8"))["fine_tuned"]
    monkeypatch.setattr("upperson.train.train", train_as_before)
    monkeypatch.setattr(import_module("upperson.cli.exportable"), "export_run", export_as_before)
    done = run("demo", "--quick")
    assert done.exit_code == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    check_summary(summary)
    rows = [line.split() for line in done.stdout.splitlines()]
    measured_by = {model: summary[model] for model in MODELS}
    for table in (measured_by, summary["short_questions"]):
        for model, values in table.items():
            shown = [f"{value:.2f}" for value in values.values()]
            assert [*STAGES.get(model, model).split(), *shown] in rows
    assert (folder / "report.html").read_text("utf-8") != "old"
    assert {path: path.stat().st_mtime_ns for path in pictures} == pictures  # Rendered once.
    assert {path.name for path in folder.iterdir()} == {*PARTS, "notes.txt"}


def test_a_demo_that_fails_leaves_the_earlier_one(demo_folder, work, monkeypatch):
    folder = shutil.copytree(demo_folder, work / "demo")
    before = snapshot(work)
    for error, code in (
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 3),
        (KeyError("defect"), 1),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(upperson.train, "train", fail)
        assert run("demo", "--quick").exit_code == code
        assert snapshot(work) == before
        assert {path.name for path in folder.iterdir()} == PARTS

    # It renders the people of an older version anew.
    (people,) = (folder / "people").iterdir()
    document = json.loads((people / "dataset.json").read_text("utf-8"))
    (people / "dataset.json").write_text(json.dumps(document | {"format": 1}))
    (people / "annotations.jsonl").write_text("")
    assert run("demo", "--quick").exit_code == 1
    assert snapshot(work) == before


def test_only_folders_of_a_demo_are_written_to(work, monkeypatch):
    for mine in (
        "bundle/precious.txt", "people/me.jpg", "people/party/me.jpg", "summary.json", "notes.txt",
    ):  # fmt: skip
        (work / "demo/people").mkdir(parents=True)
        (work / "demo" / mine).parent.mkdir(parents=True, exist_ok=True)
        (work / "demo" / mine).write_text("[]")
        before = snapshot(work)
        run_failing(3, "not_a_demo", "demo", "--quick")
        assert snapshot(work) == before
        shutil.rmtree(work / "demo")

    # One that was killed while it put its results in place goes on: the summary comes last.
    # Without it nothing was being put in place, and the rest is the user's.
    def fail(*arguments):
        raise InputError("went on")

    monkeypatch.setattr(import_module("upperson.cli.demo"), "run_demo", fail)
    for folder in ("run", "bundle", ".building.a1b2c3d4.tmp"):
        (work / "demo" / folder).mkdir(parents=True)
    (work / "demo/.building.a1b2c3d4.tmp/answer.png").write_text("{}")
    run_failing(3, "not_a_demo", "demo", "--quick")
    (work / "demo/.building.a1b2c3d4.tmp/summary.json").write_text("{}")
    run_failing(3, "input", "demo", "--quick")
