"""``upperson evaluate``: both directions, for a run and for every variant of a bundle."""

import json
import shutil

import numpy as np
import pytest

from tests.helpers import invoke
from tests.helpers.command_line import run_code
from upperson.data.records import read_dataset
from upperson_rt.bundle import Bundle
from upperson_rt.metrics import retrieval_metrics

METRICS = ["R@1", "R@5", "R@10", "mAP", "mINP"]
DIRECTIONS = ["text_to_image", "image_to_text"]


def run(*arguments):
    return invoke.run("evaluate", *arguments)


def test_every_variant_of_a_bundle_is_measured_both_ways(demo_folder, people):
    result = run(demo_folder / "bundle", "--root", people, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
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


def test_the_table_has_a_row_for_each_direction(demo_folder, people):
    result = run(demo_folder / "run", "--root", people)
    assert result.exit_code == 0, result.stderr
    title, *lines = result.stdout.splitlines()
    assert title == f"jsonl in {people.name}, test: 160 captions, 80 images"
    head, *rows = [line.split() for line in lines]
    assert head == ["direction", *METRICS]
    assert rows[0][:4] == ["run", "text", "->", "image"]
    assert rows[1][:3] == ["image", "->", "text"]
    numbers = json.loads(run(demo_folder / "run", "--root", people, "--json").stdout)["run"]
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
