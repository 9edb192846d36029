"""What a run reports of itself: its model card, and mean and spread over seeds."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.helpers.refused import refused
from upperson import run_writer
from upperson.config import TrainConfig
from upperson.model.parts import UPPersonConfig
from upperson.run_writer import model_card
from upperson.seeds import summarise
from upperson_rt.errors import InputError

VAL = {"R@1": 61.234, "R@5": 82.345, "R@10": 90.456, "mAP": 55.567, "mINP": 33.678}
TEST = {"R@1": 58.111, "R@5": 80.222, "R@10": 88.333, "mAP": 52.444, "mINP": 31.555}
RESULTS = {
    "best_epoch": 13,
    "selected_on": "val",
    "val": VAL,
    "test": TEST,
    "seed": 977,
    "base": "ViT-B-16",
    "base_sha256": "0123456789abcdef" * 4,
    "parameters": 2_345_678,
    "trained_parameters": 123_456,
    "seconds": 7.0,
    "splits": {
        "train": {"images": 4321, "captions": 8642, "people": 1234},
        "val": {"images": 432, "captions": 864, "people": 123},
    },
}
CONFIG = TrainConfig(
    dataset="rstpreid",
    root="/home/user/data/My Crops",
    base="ViT-B-16",
    pretrained="/home/user/weights/clip.safetensors",
    height_px=288,
    width_px=112,
    model=UPPersonConfig(
        prefix_length=17, prefix_scale=21.5, lora_rank=19, adapter_reduction=6, lora_blocks="3-9"
    ),
    loss="sdm+id",
    epochs=47,
    batch_size=53,
    lr=0.00123,
    warmup_epochs=11,
    weight_decay=0.00077,
    adam_eps=0.0031,
    precision="bf16",
)


def test_the_runs_numbers_appear_and_nothing_of_the_machine():
    card = model_card(CONFIG, RESULTS)
    for text in (
        "| val | 61.23 | 82.34 | 90.46 | 55.57 | 33.68 |",
        "| test | 58.11 | 80.22 | 88.33 | 52.44 | 31.55 |",
        "Epoch 13 of 47", "123,456", "2,345,678 (5.26 %)", "4,321", "8,642", "1,234", "432", "864",
        "seed 977", "`ViT-B-16`", RESULTS["base_sha256"], "clip.safetensors",
        "`rstpreid`", "288x112", "17 rows", "21.5", "rank 19", "blocks 3-9", "width / 6",
        "sdm+id", "0.00123", "batches of 53", "47 epochs, 11", "0.00077", "0.0031", "bf16",
    ):  # fmt: skip
        assert text in card, text
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "ViT-B-16"
    assert "/home" not in card, "no folder of the machine"
    template = (Path(run_writer.__file__).parent / "templates/model_card.md.j2").read_text("utf-8")
    written = set(re.findall(r"\d[\d,.]*\d|\d", re.sub(r"\{[{%].*?[%}]\}", "", template)))
    # The paper's arXiv number, sha256, and the metrics' names.
    assert written <= {"2504.10084", "256", "1", "5", "10"}


def test_names_from_outside_stay_names():
    odd = TrainConfig(root="people/`a`\n# Not a heading", base="toy")
    card = model_card(odd, {"base": 'odd": name'})
    assert "\n# Not a heading" not in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == 'odd": name'


def test_it_says_what_chose_the_epoch_and_what_is_other_than_the_default():
    plain = model_card(CONFIG, RESULTS)
    for selected_on in ("test", "last epoch", "unheard-of"):
        card = model_card(CONFIG, RESULTS | {"selected_on": selected_on})
        assert ("optimistic" in card) == (selected_on == "test")
        assert "best by R@1" not in card
    for setting, value in (
        ("temperature", 0.0137), ("shorten_captions", 0.43), ("wrong_captions", True),
        ("leave_out_noisy", True), ("kept_share", 0.61),
    ):  # fmt: skip
        card = model_card(replace(CONFIG, **{setting: value}), RESULTS)
        (changed,) = set(card.splitlines()) - set(plain.splitlines())
        assert value is True or str(value) in changed


def test_missing_results_leave_gaps_not_words():
    for left in ({}, *({k: v for k, v in RESULTS.items() if k != name} for name in RESULTS)):
        card = model_card(CONFIG, left)
        assert not {"None", "Undefined"} & {*card.split()}
        assert "\n\n\n" not in card
    assert "| test" not in model_card(CONFIG, RESULTS | {"test": None})


def result(seed, r1):
    return {"seed": seed, "best_epoch": seed + 4, "val": None, "test": {"R@1": r1, "mAP": 2 * r1}}


def test_mean_and_sample_deviation():
    found = summarise([result(3, 10.0), result(4, 14.0), result(5, 9.0)])
    assert (found["seeds"], found["best_epochs"], found["val"]) == ([3, 4, 5], [7, 8, 9], None)
    r1 = found["test"]["R@1"]
    assert r1["mean"] == pytest.approx(11)
    assert r1["std"] == pytest.approx(((1 + 9 + 4) / 2) ** 0.5)
    assert (r1["min"], r1["max"], r1["values"]) == (9.0, 14.0, [10.0, 14.0, 9.0])
    assert found["test"]["mAP"]["mean"] == pytest.approx(22)
    assert json.loads(json.dumps(found)) == found


def test_a_single_run_has_no_deviation_and_other_runs_are_refused():
    found = summarise([result(1, 50.0)])
    assert (found["test"]["R@1"]["std"], found["test"]["R@1"]["mean"]) == (None, 50.0)
    with refused("no_runs", InputError):
        summarise([])
    for split, other in (("test", None), ("val", {"R@1": 1.0})):
        with refused("runs_differ", InputError, split=split, run=2):
            summarise([result(1, 1.0), result(2, 1.0) | {split: other}])
