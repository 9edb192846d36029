"""``upperson``: refusals of its commands, tampered runs, and the quick demo."""

import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.helpers.command_line import run_program
from tests.helpers.invoke import run, run_failing, run_rt_json, snapshot
from upperson.config import read_config, read_recipe
from upperson.demo_figures import FIGURES
from upperson.demo_page import MODELS, site_rows, street_rows
from upperson.model import base
from upperson_rt.bundle import Bundle
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery
from upperson_rt.retriever import Retriever
from upperson_rt.search.query import Vocabulary
from upperson_synthetic import LOOKS

SITES = ["station", "campus"]
PARTS = {
    "answer.png", "bundle", "gallery", "people", "report.html", "sites", "sites.png",
    "summary.json",
}  # fmt: skip


def test_refusals_touch_nothing_of_the_users(work, site, people):
    (work / "holiday").mkdir()
    (work / "holiday/photo.txt").write_text("mine")
    run_of_demo = site / "run"
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


# --- the quick demo ---


def check_figures(figures, names):
    assert list(figures) == list(names)
    assert all(0 <= value <= 100 for value in figures.values())


def check_gain(gain, after, before):
    assert gain["points"] == pytest.approx(after - before)
    assert gain["low"] - 1e-9 <= gain["points"] <= gain["high"] + 1e-9


def check_summary(summary):
    assert list(summary) == ["sites", "street", "seconds", "size"]
    assert list(summary["sites"]) == SITES
    for name, site in summary["sites"].items():
        assert site.keys() > MODELS.keys()
        for model in MODELS:
            check_figures(site[model], FIGURES)
        assert 0 < site["base"]["R@1"] <= 100
        assert list(site["gains"]) == [model for model in MODELS if model != "base"]
        for figure in FIGURES:
            for model, gains in site["gains"].items():
                check_gain(gains[figure], site[model][figure], site["base"][figure])
            lost = site["int8_drop"][figure]
            check_gain(lost, site["adapter"][figure], site["int8"][figure])
        assert 0.02 < site["trained_parameters"] / site["parameters"] < 0.2
        assert site["things"] == [thing.value for thing in LOOKS[name].things]
    street = summary["street"]
    rows = [(street["base"], None), (street["int8"], street["gains"]["int8"])]
    for kind in ("adapters", "sdm_recipes"):
        assert list(street[kind]) == SITES
        rows += [(street[kind][name], street["gains"][kind][name]) for name in SITES]
    for figures, gains in rows:
        check_figures(figures, [name for name in FIGURES if name != "own_words"])
        for figure, gain in (gains or {}).items():
            check_gain(gain, figures[figure], street["base"][figure])
    stages = {"render", "export", "index", "train", "sdm_recipe", "measure", "report"}
    assert set(summary["seconds"]) == stages
    assert all(value >= 0 for value in summary["seconds"].values())


def test_the_demo_writes_its_parts_and_nothing_else(quick_demo):
    folder = quick_demo.folder
    assert {path.name for path in folder.iterdir()} == PARTS
    assert sorted(path.name for path in (folder / "sites").iterdir()) == sorted(SITES)
    for name in SITES:
        parts = {path.name for path in (folder / "sites" / name).iterdir()}
        assert parts == {"answer.png", "bundle", "gallery", "run", f"{name}.adapter"}
    summary = json.loads(quick_demo.stdout)
    assert summary == json.loads((folder / "summary.json").read_text("utf-8"))
    check_summary(summary)
    config = read_config(folder / "sites/station/run/config.yaml")
    others = {"rehearse": config.rehearse, "epochs": config.epochs}
    assert config == read_recipe("site", {"root": config.root} | others)
    assert Path(config.rehearse).name.startswith("street-")
    assert config.learn_words
    for name in ("answer.png", "sites.png", *(f"sites/{site}/answer.png" for site in SITES)):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100  # Not an empty sheet.

    html = (folder / "report.html").read_text("utf-8")  # One file, which loads nothing.
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", html)
    assert len(sources) > 10
    assert all(source.startswith("data:image/") for source in sources)
    for word in ("@import", "<script", "url("):
        assert word not in html


def test_a_word_of_a_site_is_known_in_its_bundle_alone(demo_folder):
    folders = {"base": demo_folder, **{name: demo_folder / "sites" / name for name in SITES}}
    unknown = {}
    for name, folder in folders.items():
        encoder = Bundle.open(folder / "bundle").encoder()
        words = encoder.tokenizer.encode(["woman in steward vest and school blazer"]).words(0)
        unknown[name] = Vocabulary(encoder).unknown(words)
    staff, school = ["steward", "vest"], ["school", "blazer"]
    assert unknown == {"base": staff + school, "station": school, "campus": staff}


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


@pytest.mark.timeout(120)
def test_the_demo_runs_again_over_an_earlier_one(demo_folder, work, monkeypatch):
    folder = shutil.copytree(demo_folder, work / "demo")
    (folder / "notes.txt").write_text("mine")
    (folder / "report.html").write_text("old")
    pictures = {path: path.stat().st_mtime_ns for path in (folder / "people").rglob("*.jpg")}

    # Most of a demo's time, and none of it knows that there was a demo before.
    def train_as_before(config, output, *_):
        (people,) = Path("demo/people").glob(f"{Path(config.root).name.split('-')[0]}-*")
        assert Path(config.root) == people
        shutil.copytree(demo_folder / "sites" / people.name.split("-")[0] / "run", output)

    def export_adapter_as_before(run, output, *_):
        assert (run / "adapter.safetensors").is_file()
        shutil.copyfile(demo_folder / "sites" / run.parent.name / output.name, output)

    def export_base_as_before(name, pretrained, size, output, *_):
        shutil.copytree(demo_folder / "bundle", output)

    stages = import_module("upperson.cli.demo_run")
    embedded, embed = {}, stages.embed_records

    def embed_with_the_first_model(model, tokenizer, records, **more):
        name = records[0].image
        if name not in embedded:
            embedded[name] = embed(model, tokenizer, records, **more)
        return embedded[name]

    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(stages, "embed_records", embed_with_the_first_model)
    monkeypatch.setattr(stages, "train", train_as_before)
    monkeypatch.setattr(stages, "export_adapter", export_adapter_as_before)
    monkeypatch.setattr(stages, "export_base", export_base_as_before)
    done = run("demo", "--quick")
    assert done.exit_code == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    check_summary(summary)
    rows = [line.split() for line in done.stdout.splitlines()]
    for table in (*map(site_rows, summary["sites"].values()), street_rows(summary["street"])):
        for row in table[1:]:
            assert " ".join(row).split() in rows
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

        monkeypatch.setattr(import_module("upperson.cli.demo_run"), "export_base", fail)
        assert run("demo", "--quick").exit_code == code
        assert snapshot(work) == before
        assert {path.name for path in folder.iterdir()} == PARTS

    # It renders the people of an older version anew.
    (people,) = (folder / "people").glob("campus-*")
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

    monkeypatch.setattr(import_module("upperson.cli.demo_run"), "run_demo", fail)
    for folder in ("sites", "bundle", ".building.a1b2c3d4.tmp"):
        (work / "demo" / folder).mkdir(parents=True)
    (work / "demo/.building.a1b2c3d4.tmp/answer.png").write_text("{}")
    run_failing(3, "not_a_demo", "demo", "--quick")
    (work / "demo/.building.a1b2c3d4.tmp/summary.json").write_text("{}")
    run_failing(3, "input", "demo", "--quick")
