"""``upperson evaluate``: both directions, for a run and for every variant of a bundle."""

import json
import shutil
from functools import cache

import numpy as np
import pytest

from tests.helpers import invoke
from tests.helpers.command_line import run_code
from upperson.data.records import read_dataset
from upperson_rt.bundle import Bundle
from upperson_rt.metrics import retrieval_metrics

METRICS = ["R@1", "R@5", "R@10", "mAP", "mINP"]
ONE_QUESTION = 5
"""Percent: a score that is nearly equal may fall the other way."""
DIRECTIONS = ["text_to_image", "image_to_text"]


def run(*arguments):
    return invoke.run("evaluate", *arguments)


@pytest.fixture(scope="module")
def evaluated(demo_folder, people):
    """A function that evaluates the demo's run or bundle, each with the same options once."""

    @cache
    def evaluate(target, *options):
        result = run(demo_folder / target, "--root", people, *options, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return evaluate


def test_every_variant_of_a_bundle_is_measured_both_ways(demo_folder, people, evaluated):
    found = evaluated("bundle")
    assert list(found) == list(Bundle.open(demo_folder / "bundle").manifest.variants)
    records = read_dataset("jsonl", people)["test"]
    for variant, directions in found.items():
        assert list(directions) == DIRECTIONS
        encoder = Bundle.open(demo_folder / "bundle", variant).encoder()
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


def test_the_table_has_a_row_for_each_direction(demo_folder, people, evaluated):
    result = run(demo_folder / "run", "--root", people)
    assert result.exit_code == 0, result.stderr
    title, *lines = result.stdout.splitlines()
    assert title == f"jsonl in {people.name}, test: 160 captions, 80 images"
    head, *rows = [line.split() for line in lines]
    assert head == ["direction", *METRICS]
    assert rows[0][:4] == ["run", "text", "->", "image"]
    assert rows[1][:3] == ["image", "->", "text"]
    numbers = evaluated("run")["run"]
    for row, direction in zip(rows, DIRECTIONS, strict=True):
        assert row[-5:] == [f"{numbers[direction][name]:.2f}" for name in METRICS]
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_no_signature_is_asked_of_a_run(demo_folder, people):
    for command in (["evaluate", "--root", people], ["parity"]):
        name, *options = command
        result = invoke.run(name, demo_folder / "run", *options, "--trust", "key.pub")
        assert result.exit_code == 2
        assert "--trust goes with a bundle, and" in result.stderr


def test_an_image_that_cannot_be_read_ends_with_3(demo_folder, people, tmp_path):
    root = shutil.copytree(people, tmp_path / "people")
    broken = read_dataset("jsonl", root)["test"][3].image
    broken.write_bytes(b"no picture")
    for target in ("run", "bundle"):
        result = run(demo_folder / target, "--root", root)
        assert result.exit_code == 3
        assert f"cannot read image {broken}" in result.stderr.splitlines()[-1]


def test_a_folder_that_is_neither_is_refused(people, tmp_path):
    result = run(tmp_path / "gone", "--root", people)
    assert result.exit_code == 3
    assert "is neither a run nor a bundle (there is no such folder): pass" in result.stderr
    (tmp_path / "runs/seed_1").mkdir(parents=True)
    (tmp_path / "runs/seed_1/config.yaml").write_text("root: p")
    result = run(tmp_path / "runs", "--root", people)
    assert "holds seed_1: name one of them" in result.stderr


def test_reading_a_run_loads_nothing_that_only_writes_one(demo_folder):
    writers = ["matplotlib", "tensorboard", "torch.utils.tensorboard"]
    code = "import sys; from pathlib import Path; from upperson.run import load_run; "
    code += "print(load_run(Path(sys.argv[1])).model.embed_dim, "
    code += f"*(name for name in {writers} if sys.modules.get(name)))"
    done = run_code(code, demo_folder / "run", without=writers)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["128"]


@pytest.mark.parametrize("target", ["run", "bundle"])
def test_words_are_measured_where_the_truth_is_known(demo_folder, people, evaluated, target):
    found = evaluated(target, "--attributes")
    variants = list(Bundle.open(demo_folder / "bundle").manifest.variants)
    assert list(found) == (["run"] if target == "run" else variants)
    records = read_dataset("jsonl", people)["test"]
    women = np.mean([record.attributes["gender"] == "woman" for record in records])
    measured = {"run": "fine_tuned", "int8": "onnx_int8"}
    assert {"run", "int8"} & found.keys()
    for name, report in found.items():
        asked = report["short"]["person"]
        assert 0 < asked["present"] < asked["asked"]
        assert list(asked["parts"]) == ["gender", "colour", "garment", "all"]
        assert 0 < asked["parts"]["gender"]["chance"] < 100 * max(women, 1 - women)
        assert list(report["with_thing"]) == ["bag", "headwear", "accessory"]
        summary = json.loads((demo_folder / "summary.json").read_text("utf-8"))["short_questions"]
        for part, share in asked["parts"].items():
            assert share["chance"] == pytest.approx(summary["chance"][part])
            if name in measured:
                expected = summary[measured[name]][part]
                assert share["top1"] == pytest.approx(expected, abs=ONE_QUESTION)
    plain = evaluated(target)
    for name, report in found.items():
        assert report["r1"] == pytest.approx(plain[name]["text_to_image"]["R@1"])


def test_the_table_of_words_shows_what_was_measured(demo_folder, people, evaluated):
    result = run(demo_folder / "run", "--root", people, "--attributes")
    assert result.exit_code == 0, result.stderr
    report = evaluated("run", "--attributes")["run"]
    lines = [line.strip() for line in result.stdout.splitlines()]
    rows = {tuple(line.rsplit(maxsplit=4)) for line in lines}
    for shares in (report["short"]["person"]["parts"], report["short"]["clothes"]["parts"]):
        for name, share in shares.items():
            names = ("top1", "at10", "at10_most", "chance")
            assert (name, *(f"{share[key]:.1f}" for key in names)) in rows
    assert f"R@1 of the captions {report['r1']:.2f}" in lines
    for name, share in report["captions"].items():
        shown = [f"{share[key]:.1f}" for key in ("top1", "chance", "r1_lost")]
        if share["said"]:
            shown += [
                str(share["said"]),
                f"{share['said_top1']:.1f}",
                f"{share['said_chance']:.1f}",
            ]
        assert [name, *shown] in [line.split() for line in lines]
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_words_cannot_be_measured_without_the_truth(demo_folder, people, tmp_path):
    root = shutil.copytree(people, tmp_path / "people")
    annotations = root / "annotations.jsonl"
    lines = [json.loads(line) for line in annotations.read_text("utf-8").splitlines()]
    for line in lines:
        del line["attributes"]
    annotations.write_text("\n".join(map(json.dumps, lines)))
    for target in ("run", "bundle"):
        result = run(demo_folder / target, "--root", root, "--attributes")
        assert result.exit_code == 3
        (line,) = result.stderr.splitlines()
        assert "has no attributes: put  attributes  into each line" in line


def test_short_and_long_questions(demo_folder, people):
    result = run(demo_folder / "run", "--root", people, "--by-length", "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["run"]
    lengths = list(rows)
    assert lengths[0] == "1"
    assert lengths[-1] == "as written"
    assert lengths[:-1] == [str(number) for number in range(1, len(lengths))]
    counts = [row["questions"] for row in rows.values()]
    assert counts[0] == counts[-1] == 160
    assert counts[:-1] == sorted(counts[:-1], reverse=True)
    plain = json.loads(run(demo_folder / "run", "--root", people, "--json").stdout)["run"]
    written = {name: rows["as written"][name] for name in METRICS}
    assert written == pytest.approx(plain["text_to_image"])
    table = run(demo_folder / "run", "--root", people, "--by-length").stdout.splitlines()
    assert table[1].split() == ["run:", "things", "questions", *METRICS]
    assert len(table) == 2 + len(rows)
    both = run(demo_folder / "run", "--root", people, "--by-length", "--attributes")
    assert (both.exit_code, "ask for one of them" in both.stderr) == (2, True)


def test_captions_without_phrases_have_no_length(demo_folder, people, tmp_path):
    lines = (people / "annotations.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "images").symlink_to(people / "images")
    records = [json.loads(line) | {"caption": "zzz qqq"} for line in lines]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "annotations.jsonl").write_text(text, "utf-8")
    result = run(demo_folder / "run", "--root", tmp_path, "--by-length")
    assert result.exit_code == 3
    assert "no caption of 160 has a phrase that the grammar reads" in result.stderr
