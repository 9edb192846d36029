"""``upperson evaluate``: both directions, for a run and for every variant of a bundle."""

import json
import shutil
from importlib import import_module

import numpy as np
import pytest

from tests.helpers import invoke
from upperson.data.records import read_dataset
from upperson_rt.bundle import Bundle
from upperson_scores.metrics import retrieval_metrics

METRICS = ["R@1", "R@5", "R@10", "mAP", "mINP"]
DIRECTIONS = ["text_to_image", "image_to_text"]

command = import_module("upperson.cli.evaluate")


@pytest.fixture(scope="module", autouse=True)
def embedded_once():
    """The pictures and captions of a split, however often they are measured."""
    kept = {}

    def once(towers):
        def embed(target, *rest):
            key = target, rest[-2][0].image
            if key not in kept:
                kept[key] = list(towers(target, *rest))
            return kept[key]

        return embed

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run_towers", "_bundle_towers"):
            patch.setattr(command, name, once(getattr(command, name)))
        yield


@pytest.fixture
def evaluated(site, site_people):
    """A function that evaluates the demo's run or bundle."""
    return lambda target, *options: invoke.run_json(
        "evaluate", site / target, "--root", site_people, *options
    )


@pytest.fixture
def table_of(site, site_people):
    """A function that evaluates the demo's run and returns the lines of the tables."""

    def evaluate(*options):
        lines = invoke.run("evaluate", site / "run", "--root", site_people, *options).stdout
        assert max(map(len, lines.splitlines())) <= 100
        return [line.strip() for line in lines.splitlines()]

    return evaluate


def test_every_variant_of_a_bundle_is_measured_both_ways(site, site_people, evaluated):
    found = evaluated("bundle")
    assert list(found) == list(Bundle.open(site / "bundle").manifest.variants)
    records = read_dataset("jsonl", site_people)["test"]
    for variant, directions in found.items():
        assert list(directions) == DIRECTIONS
        encoder = Bundle.open(site / "bundle", variant).encoder()
        images = encoder.encode_images([record.image for record in records])
        texts = encoder.encode_texts([text for record in records for text in record.captions])
        image_pids = np.array([record.pid for record in records])
        text_pids = np.array([record.pid for record in records for _ in record.captions])
        forth = retrieval_metrics(texts, images, text_pids, image_pids)
        back = retrieval_metrics(images, texts, image_pids, text_pids)
        assert directions == {
            "text_to_image": pytest.approx(forth.as_dict()),
            "image_to_text": pytest.approx(back.as_dict()),
        }


def test_evaluate_finds_what_the_demo_measured(demo_folder, site, evaluated):
    summary = json.loads((demo_folder / "summary.json").read_text("utf-8"))["sites"][site.name]
    measured = {"adapter": evaluated("run")["run"], "int8": evaluated("bundle")["int8"]}
    for name, directions in measured.items():
        for metric in ("R@1", "mAP"):
            expected = pytest.approx(summary[name][metric], abs=100 / 160)  # One query: ties.
            assert directions["text_to_image"][metric] == expected


def refused(status, code, *arguments):
    return invoke.run_failing(status, code, "evaluate", *arguments)


def test_what_cannot_be_measured_is_refused(site, site_people, tmp_path, work):
    folder = site / "run"
    for words in (["evaluate", folder, "--root", site_people], ["parity", folder]):
        invoke.run_failing(2, "trust_without_bundle", *words, "--trust", "key.pub")
    refused(2, "options_exclude_each_other", folder, "--by-length", "--attributes")
    refused(2, "split_unknown", folder, "--split", "tset")
    refused(2, "root_missing", site / "bundle")
    refused(3, "split_empty", folder, "--root", site_people, "--split", "val")
    refused(3, "neither_run_nor_bundle", "gone", "--root", site_people)
    (work / "runs/seed_1").mkdir(parents=True)
    (work / "runs/seed_1/config.yaml").write_text("root: p")
    error = refused(3, "neither_run_nor_bundle", "runs", "--root", site_people)
    assert "seed_1" in error["fields"]["runs"]
    root = shutil.copytree(site_people, tmp_path / "people")
    broken = read_dataset("jsonl", root)["test"][3].image
    broken.write_bytes(b"no picture")
    for target in ("run", "bundle"):
        error = refused(3, None, site / target, "--root", root)
        assert str(broken) in error["message"]


@pytest.mark.parametrize("target", ["run", "bundle"])
def test_words_are_measured_where_the_truth_is_known(site_people, evaluated, target):
    found, plain = evaluated(target, "--attributes"), evaluated(target)
    assert found.keys() == plain.keys()
    records = read_dataset("jsonl", site_people)["test"]
    women = np.mean([record.attributes["gender"] == "woman" for record in records])
    for name, report in found.items():
        assert report["r1"] == pytest.approx(plain[name]["text_to_image"]["R@1"])
        asked = report["short"]["person"]
        assert 0 < asked["present"] < asked["asked"]
        assert list(asked["parts"]) == ["gender", "colour", "garment", "all"]
        assert 0 < asked["parts"]["gender"]["chance"] < 100 * max(women, 1 - women)
        assert list(report["with_thing"]) == ["bag", "headwear", "accessory"]


def test_tables_show_what_was_measured(site_people, evaluated, table_of):
    title, head, *rows = table_of()
    assert title == f"jsonl in {site_people.name}, test: 160 captions, 80 images"
    assert head.split() == ["direction", *METRICS]
    numbers = evaluated("run")["run"]
    for row, direction in zip(rows, DIRECTIONS, strict=True):
        assert row.split()[-5:] == [f"{numbers[direction][name]:.2f}" for name in METRICS]

    report = evaluated("run", "--attributes")["run"]
    lines = table_of("--attributes")
    rows = {tuple(line.rsplit(maxsplit=4)) for line in lines}
    for name, share in report["short"]["person"]["parts"].items():
        names = ("top1", "at10", "at10_most", "chance")
        assert (name, *(f"{share[key]:.1f}" for key in names)) in rows
    assert f"R@1 of the captions {report['r1']:.2f}" in lines

    lengths = evaluated("run", "--by-length")["run"]
    counts = [row["questions"] for row in lengths.values()]
    assert counts[0] == counts[-1] == 160
    assert counts[:-1] == sorted(counts[:-1], reverse=True)
    written = {name: lengths["as written"][name] for name in METRICS}
    assert written == pytest.approx(numbers["text_to_image"])
    assert len(table_of("--by-length")) == 2 + len(lengths)


def test_words_need_attributes_and_lengths_need_phrases(site, site_people, tmp_path):
    (tmp_path / "images").symlink_to(site_people / "images")
    lines = (site_people / "annotations.jsonl").read_text("utf-8").splitlines()
    bare = [json.loads(line) | {"caption": "zzz qqq"} for line in lines]
    for line in bare:
        del line["attributes"]
    (tmp_path / "annotations.jsonl").write_text("\n".join(map(json.dumps, bare)), "utf-8")
    for target in ("run", "bundle"):
        options = (site / target, "--root", tmp_path, "--attributes")
        refused(3, "attributes_missing", *options)
    refused(3, "captions_not_readable", site / "run", "--root", tmp_path, "--by-length")
