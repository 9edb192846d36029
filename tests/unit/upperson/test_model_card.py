"""The model card: every number comes from the run, and nothing of the machine is in it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from upperson import run_writer
from upperson.config import TrainConfig
from upperson.model.parts import UPPersonConfig
from upperson.run_writer import model_card

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


def test_the_runs_numbers_appear():
    card = model_card(CONFIG, RESULTS)
    assert "| text to image, % | R@1 | R@5 | R@10 | mAP | mINP |" in card
    assert "| val | 61.23 | 82.34 | 90.46 | 55.57 | 33.68 |" in card
    assert "| test | 58.11 | 80.22 | 88.33 | 52.44 | 31.55 |" in card
    assert "Epoch 13 of 47, the best by R@1 on the validation split." in card
    assert "123,456 trained of 2,345,678 (5.26 %)" in card
    assert "train 4,321 images and 8,642 captions of 1,234 people" in card
    assert "val 432 images and 864 captions of 123 people" in card
    for text in (
        "seed 977", "`ViT-B-16`", RESULTS["base_sha256"], "clip.safetensors",
        "`rstpreid`", "288x112", "17 rows", "21.5", "rank 19", "blocks 3-9", "width / 6",
        "sdm+id", "0.00123", "batches of 53", "47 epochs, 11", "0.00077", "0.0031", "bf16",
    ):  # fmt: skip
        assert text in card, text


def test_it_is_short_has_a_yaml_header_and_nothing_of_its_own():
    card = model_card(CONFIG, RESULTS)
    assert 30 <= len(card.splitlines()) <= 60
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "ViT-B-16"
    assert card.endswith(".\n")
    assert "/home" not in card, "no folder of the machine"
    template = (Path(run_writer.__file__).parent / "templates/model_card.md.j2").read_text("utf-8")
    written = set(re.findall(r"\d[\d,.]*\d|\d", re.sub(r"\{[{%].*?[%}]\}", "", template)))
    # The paper's arXiv number, sha256, and the metrics' names.
    assert written <= {"2504.10084", "256", "1", "5", "10"}
    odd = TrainConfig(root="people/`a`\n# Not a heading", base="toy")
    card = model_card(odd, {"base": 'odd": name'})
    assert "# UP-Person on `` `a`\\n# Not a heading ``" in card
    assert "\n# Not a heading" not in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == 'odd": name'


@pytest.mark.parametrize(
    ("selected_on", "words"),
    [
        ("test", "**selected on the test split**: its test result is optimistic"),
        ("last epoch", "Epoch 13 of 47, the last one; no split chose it."),
        ("unheard-of", "how it was chosen is not recorded"),
    ],
)
def test_it_says_what_chose_the_epoch(selected_on, words):
    card = model_card(CONFIG, RESULTS | {"selected_on": selected_on})
    assert words in card
    assert ("optimistic" in card) == (selected_on == "test")
    assert "best by R@1" not in card


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"temperature": 0.0137}, "Loss sdm+id at temperature 0.0137; Adam"),
        ({"shorten_captions": 0.43}, "masking on, 0.43 of the captions shortened, precision bf16"),
        ({"wrong_captions": True}, "masking on, wrong captions on, precision bf16"),
        ({"leave_out_noisy": True}, "noisy pairs left out after the warm-up, precision bf16"),
        ({"kept_share": 0.61}, "- Kept: 0.61 of what LoRA and L-Adapters add to the base"),
    ],
)
def test_it_says_what_is_other_than_the_default(setting, words):
    plain = model_card(CONFIG, RESULTS)
    card = model_card(replace(CONFIG, **setting), RESULTS)
    assert words in card
    assert words not in plain
    # One line changes, and nothing else.
    assert len(set(card.splitlines()) - set(plain.splitlines())) == 1


def test_missing_results_leave_gaps_not_words():
    for left in ({}, *({k: v for k, v in RESULTS.items() if k != name} for name in RESULTS)):
        card = model_card(CONFIG, left)
        assert not {"None", "Undefined"} & {*card.split()}
        assert "\n\n\n" not in card
    assert "| test" not in model_card(CONFIG, RESULTS | {"test": None})
    assert "No split was evaluated." in model_card(CONFIG, {})
