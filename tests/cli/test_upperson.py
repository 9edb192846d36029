import dataclasses
import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import upperson_rt
import upperson_rt.cli
from tests.helpers.command_line import run_program
from tests.helpers.invoke import run, run_failing, run_json, snapshot
from tests.helpers.traces import as_in
from upperson import pretrain
from upperson.config import read_config
from upperson.demo_page import STAGES
from upperson_rt.bundle import Bundle
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery
from upperson_rt.retriever import Retriever

METRICS = ["R@1", "R@5", "R@10", "mAP", "mINP"]
MODELS = ["zero_shot", "fine_tuned", "onnx_fp32", "onnx_int8"]
PARTS = {"answer.png", "bundle", "gallery", "people", "report.html", "run", "summary.json"}
ONE_QUERY = 100 / 160
"""Points that one query of the quick demo is worth: ties may fall either way."""


def one_line(text):
    """Undo the frames and line breaks of usage errors."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def somebodys(work):
    """A folder with something of the user's in it."""
    (work / "holiday").mkdir()
    (work / "holiday" / "photo.txt").write_text("mine")
    return work / "holiday"


# --- errors: one line, an exit code, and nothing of the user's touched ---


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["train", "--root", "nowhere"], 3, "dataset_not_found"),
        (["evaluate", "run", "--root", "nowhere"], 3, "neither_run_nor_bundle"),
        (["export", "nowhere"], 3, "not_a_run"),
        (["export", "holiday"], 3, "not_a_run"),
        (["demo", "--output", "holiday"], 3, "not_a_demo"),
        (["demo", "--output", "holiday/photo.txt"], 3, "not_a_folder"),
        (["data", "synthesize", "holiday"], 3, "not_synthetic"),
        (["data", "synthesize", "new", "--look", "beach"], 2, "setting_out_of_range"),
        (["pretrain-small", "--output", "base.txt"], 2, "output_wrong"),
        (["pretrain-small", "--output", "no/base.safetensors"], 2, "output_wrong"),
    ],
)
def test_errors_are_one_line_and_a_code(somebodys, arguments, status, code):
    before = snapshot(somebodys.parent)
    run_failing(status, code, *arguments)
    assert snapshot(somebodys.parent) == before


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["train", "--root", "people", "--epoch", "3"], "No such option: --epoch"),
        (["train", "--root", "people", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["data", "synthesize", "new", "--views", "0"], "Invalid value for '--views'"),
        (["data", "check"], "Missing option '--root'"),
    ],
)
def test_options_that_are_wrong_are_named(arguments, fact):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert fact in one_line(result.stderr)


def test_a_bad_annotation_is_named_by_its_line(work):
    good = {"image": "1.jpg", "pid": 1, "caption": "a woman in a red coat"}
    (work / "annotations.jsonl").write_text(f"{json.dumps(good)}\n[]\n")
    error = run_failing(3, "not_an_object", "train", "--root", ".", "--output", "run")
    assert error["fields"]["where"] == f"{work}/annotations.jsonl, line 2"
    assert not (work / "run").exists()


@pytest.mark.parametrize(
    ("without", "arguments", "extra"),
    [
        ("torch", ["train", "--root", "people"], "train"),
        ("open_clip", ["demo"], "train"),
        ("yaml", ["evaluate", "run", "--root", "people"], "train"),
        ("onnxscript", ["export", "run"], "export"),
        ("torch", ["pretrain-small", "--output", "base.safetensors"], "train"),
    ],
)
def test_a_missing_package_ends_with_5_and_the_command(work, without, arguments, extra):
    done = run_program("upperson", *arguments, cwd=work, without=[without])
    assert done.returncode == 5, done.stderr
    assert f"needs the package '{without}', which is not installed" in done.stderr
    assert f"pip install 'upperson[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(work.iterdir()) == []


def test_results_are_not_written_over_something_else(somebodys, demo_folder, people):
    before = snapshot(somebodys)
    run_failing(3, None, "export", demo_folder / "run", "--output", somebodys, "--no-int8")
    run_failing(3, "run_not_empty", "train", "--root", people, "--output", somebodys)
    assert snapshot(somebodys) == before
    assert list(somebodys.parent.iterdir()) == [somebodys]


# --- tampered runs ---


def test_a_tampered_run_is_refused(copied_run):
    adapter, config = copied_run / "adapter.safetensors", copied_run / "config.yaml"
    content, text = adapter.read_bytes(), config.read_text()
    adapter.write_bytes(content[:-100])
    run_failing(3, "adapter_unreadable", "export", copied_run)
    adapter.write_bytes(content)
    assert "lora_rank: 16" in text
    config.write_text(text.replace("lora_rank: 16", "lora_rank: 8"))
    run_failing(3, "adapter_does_not_fit", "export", copied_run)
    config.write_text(text.replace("weight_decay:", "weight_decoy:"))
    assert "'weight_decoy'" in run_failing(3, None, "export", copied_run)["message"]
    assert not Path("bundle").exists()


def test_another_base_than_the_run_was_trained_on_is_refused(copied_run, work, monkeypatch):
    from upperson.model import base

    assets = shutil.copytree(base.ASSETS, work / "assets")
    weights = load_file(assets / "upperson-small.safetensors")
    weights["ln_final.bias"][0] += 1
    save_file(weights, assets / "upperson-small.safetensors")
    monkeypatch.setattr(base, "ASSETS", assets)
    run_failing(6, "base_changed", "export", copied_run)
    (assets / "upperson-small.safetensors").write_bytes(b"junk")
    run_failing(3, "weights_unreadable", "export", copied_run)
    assert not Path("bundle").exists()


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
    assert {path.name for path in quick_demo.folder.iterdir()} == PARTS
    summary = json.loads(quick_demo.stdout)
    assert summary == json.loads((quick_demo.folder / "summary.json").read_text("utf-8"))
    check_summary(summary)
    config = read_config(quick_demo.folder / "run/config.yaml")
    assert (config.shorten_captions, config.wrong_captions, config.kept_share) == (0.5, True, 0.5)
    for work in ("rendering people: 160/160", "training: ", "exporting the image tower", "indexed"):
        assert work in quick_demo.stderr
    with Image.open(quick_demo.folder / "answer.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000  # Not an empty sheet.


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


def test_the_report_is_one_file(demo_folder):
    html = (demo_folder / "report.html").read_text("utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", html)
    assert len(sources) > 10
    assert all(source.startswith("data:image/") for source in sources)
    assert "@import" not in html
    assert "<script" not in html
    assert "url(" not in html
    assert "A quick demo" in html, "its numbers are nobody's results"
    summary = json.loads((demo_folder / "summary.json").read_text("utf-8"))
    for model in MODELS:
        assert f"{summary[model]['mAP']:.2f}" in html
    assert "Which words it understands" in html
    words = summary["short_questions"]["onnx_int8"]
    told = ", ".join(f"{part} {value:.2f} %" for part, value in words.items())
    caption = (
        "The bars are those of the base and of the run in fp32; short questions to the exported"
    )
    assert f"{caption} int8 bundle: {told}." in " ".join(html.split())


def test_the_bundle_opens_and_the_gallery_answers(demo_folder, people, work):
    encoder = Bundle.open(demo_folder / "bundle").encoder()
    with Gallery.open(demo_folder / "gallery", encoder.fingerprint, encoder.embed_dim) as gallery:
        assert gallery.count() == 80
        assert gallery.verify() == []
        expected = Retriever(encoder, gallery).query("woman in red coat", k=5)
    folders = ["-b", demo_folder / "bundle", "-g", demo_folder / "gallery"]
    answer = run_json(
        "query", *folders, "woman in red coat", "-k", 5, "--sheet", "sheet.png",
        app=upperson_rt.cli.app,
    )  # fmt: skip
    assert [hit["key"] for hit in answer["hits"]] == [hit.item.key for hit in expected]
    assert all(Path(hit["source"]).is_relative_to(people) for hit in answer["hits"])
    assert all(hit["camera"].startswith("cam") for hit in answer["hits"])
    assert (work / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert run_json("doctor", *folders, app=upperson_rt.cli.app)["ok"]


def test_evaluate_finds_what_the_demo_measured(demo_folder, people):
    summary = json.loads((demo_folder / "summary.json").read_text("utf-8"))
    result = run("evaluate", demo_folder / "bundle", "--root", people, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert "fp32" in found
    for variant in found:
        told = [line for line in result.stderr.splitlines() if line.startswith(variant)]
        bundle = Bundle.open(demo_folder / "bundle", variant)
        for tower in ("image", "text"):
            backend = bundle.backend(tower)
            running = f"backend: {backend.name} {backend.version} on {backend.device}"
            assert any(running in line and f"{tower} tower" in line for line in told) or any(
                line.startswith(f"{variant}: {running}") for line in told
            )
    for variant, directions in found.items():
        expected = pytest.approx(summary[f"onnx_{variant}"], abs=ONE_QUERY)
        assert directions["text_to_image"] == expected
        assert list(directions["image_to_text"]) == METRICS
    computes = {"image": SimpleNamespace(float_type="bf16"), "text": SimpleNamespace()}
    types = import_module("upperson.cli.evaluate")._float_types
    assert types(SimpleNamespace(backend=computes.get)) == "bf16 (images) and f32 (texts)"
    computes["text"] = computes["image"]
    assert types(SimpleNamespace(backend=computes.get)) == "bf16"
    found = run_json("evaluate", demo_folder / "run", "--root", people)
    expected = pytest.approx(summary["fine_tuned"], abs=ONE_QUERY)
    assert found["run"]["text_to_image"] == expected


@pytest.mark.timeout(120, func_only=True)
def test_train_and_export_alone(demo_folder, people, work, monkeypatch):
    monkeypatch.setattr("upperson_export.candidates.export_onnx", as_in(demo_folder / "bundle"))
    trained = run_json("train", "--root", people, "--epochs", 2, "--output", "run")
    assert trained["run"] == "run"
    assert trained["best_epoch"] == 2
    assert trained["val"] is None
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
    assert "Find a person by a sentence" in (folder / "report.html").read_text("utf-8")
    assert {path: path.stat().st_mtime_ns for path in pictures} == pictures  # Rendered once.
    assert {path.name for path in folder.iterdir()} == {*PARTS, "notes.txt"}


def test_the_demo_renders_the_people_of_an_older_version_anew(demo_folder, work, monkeypatch):
    import upperson.train

    folder = shutil.copytree(demo_folder, work / "demo")
    (people,) = (folder / "people").iterdir()
    document = json.loads((people / "dataset.json").read_text("utf-8"))
    (people / "dataset.json").write_text(json.dumps(document | {"format": 1}))
    (people / "annotations.jsonl").write_text("")

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(upperson.train, "train", stop)
    assert run("demo", "--quick").exit_code == 130
    (fresh,) = (demo_folder / "people").iterdir()
    for name in ("dataset.json", "annotations.jsonl"):
        assert (people / name).read_bytes() == (fresh / name).read_bytes()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(28, "No space left on device"), 3, "No space left on device"),
        (KeyError("defect"), 1, "error: internal error: KeyError"),
    ],
    ids=["interrupted", "full disk", "defect"],
)
def test_a_demo_that_fails_leaves_the_earlier_one(
    demo_folder, work, monkeypatch, error, code, message
):
    import upperson.train

    def fail(*arguments):
        raise error

    monkeypatch.setattr(upperson.train, "train", fail)
    folder = shutil.copytree(demo_folder, work / "demo")
    before = snapshot(work)
    result = run("demo", "--quick")
    assert result.exit_code == code
    assert message in result.stderr
    assert snapshot(work) == before
    assert {path.name for path in folder.iterdir()} == PARTS


@pytest.mark.parametrize(
    "mine",
    ["bundle/precious.txt", "people/me.jpg", "people/party/me.jpg", "summary.json", "notes.txt"],
)
def test_a_folder_that_is_no_demo_is_refused_and_untouched(work, mine):
    (work / "demo" / "people").mkdir(parents=True)
    (work / "demo" / mine).parent.mkdir(parents=True, exist_ok=True)
    (work / "demo" / mine).write_text("[]")
    before = snapshot(work)
    run_failing(3, "not_a_demo", "demo", "--quick")
    assert snapshot(work) == before


@pytest.mark.parametrize("file", ["summary.json", "answer.png"])
def test_a_demo_killed_while_it_put_results_in_place_goes_on(work, monkeypatch, file):
    def fail(*arguments):
        raise InputError("went on")

    monkeypatch.setattr(import_module("upperson.cli.demo"), "run_demo", fail)
    for folder in ("run", "bundle", ".building.a1b2c3d4.tmp"):
        (work / "demo" / folder).mkdir(parents=True)
    (work / "demo/.building.a1b2c3d4.tmp" / file).write_text("{}")
    # The summary comes last: without it nothing was being put in place, and the rest is the user's.
    expected = "input" if file == "summary.json" else "not_a_demo"
    run_failing(3, expected, "demo", "--quick")
