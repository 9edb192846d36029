"""The tutorial and how-to guides: every command runs, in order, in a folder such as they assume.

Stand-ins replace what a test cannot have: a toy base for CLIP, a file for a camera. Exports are
only parsed, since test_export.py runs them; a toy bundle is put where they would write. So are
servers, which would not end.
"""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.cli.test_detectors import scene
from tests.helpers.command_line import ROOT
from tests.helpers.data_sets import write_cuhk_pedes
from tests.helpers.detector_heads import write_detector
from tests.helpers.invoke import run, run_rt
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from tests.helpers.toy_clip import IMAGE_SIZE, toy_clip
from tests.helpers.toy_run import know_toy
from tests.packaging.test_docs import commands_in, complaint
from upperson import run_writer
from upperson_synthetic import SyntheticSpec, write_dataset

pytestmark = pytest.mark.timeout(180)

DOCS = ROOT / "docs"
HEIGHT, WIDTH = map(str, IMAGE_SIZE)
TRAIN = [
    "--base", "toy", "--allow-partial", "--epochs", "1", "--set", "warmup_epochs=0",
    "--precision", "fp32", "--workers", "0", "--set", f"height_px={HEIGHT}",
    "--set", f"width_px={WIDTH}", "--set", "model.lora_rank=4",
    "--set", "model.adapter_reduction=4",
]  # fmt: skip
TOY = {"ViT-B-16-quickgelu": "toy", "ViT-B-16.pt": "toy.safetensors"}


def run_page(name, stand_ins=None, more=None):
    """Run the commands of a page; all must succeed. Return what they printed, by command line.

    ``stand_ins`` replace whole words; ``more`` are options by the beginning of a command.
    """
    printed, failed = {}, {}
    for program, *words in commands_in((DOCS / f"{name}.md").read_text("utf-8")):
        line = " ".join(words)
        words = [(stand_ins or {}).get(word, word) for word in words]
        for start, options in (more or {}).items():
            words += options if line.startswith(start) else []
        if words[0] in ("export", "serve"):
            assert complaint(program, *words) == ""
            if words[0] == "export":
                make_toy_bundle(Path(words[words.index("--output") + 1]))
            continue
        result = (run_rt if program == "upperson-rt" else run)(*words)
        printed[line] = result.stdout
        if result.exit_code:
            failed[line] = result.stderr
    assert failed == {}
    return printed


@pytest.fixture
def bundle(work):
    make_toy_bundle(work / "bundle")
    for folder in ("crops", "more", "photographs"):
        (work / folder).mkdir()
    for number, colour in enumerate(COLOURS):
        draw_person(work / "crops" / f"{colour}.jpg", colour)
        scene(work / "more" / f"{number}.jpg", (20, 24))
    scene(work / "photographs/street.jpg", (20, 24), (60, 8))
    scene(work / "frame.jpg", (20, 24))
    write_detector(work / "yolox_nano.onnx", "yolox")
    return work


@pytest.fixture
def toy(work, monkeypatch):
    know_toy(monkeypatch)
    monkeypatch.setattr(run_writer, "draw_curves", lambda rows: b"not drawn")
    save_file(toy_clip().state_dict(), work / "toy.safetensors")
    return work


def test_the_tutorial(work):
    (work / "photographs").mkdir()
    scene(work / "photographs/street.jpg", (20, 24), (60, 8))
    write_detector(work / "yolox_nano.onnx", "yolox")
    assert run("data", "synthesize-video", "street.avi", "--duration", "2").exit_code == 0
    more = {"watch": ["--detector", "street.json"]}
    stand_ins = {"street=vtest.avi": "street=street.avi", "auto": "yolox_nano.onnx"}
    printed = run_page("tutorial", stand_ins, more)
    assert (work / "answer.png").is_file()
    assert (work / "mine.png").is_file()
    assert len(printed) == 7


def test_photographs(bundle):
    printed = run_page("how-to/photographs", {"auto": "yolox_nano.onnx"})
    assert (bundle / "boxes.png").is_file()
    assert (bundle / "answer.png").is_file()
    (found,) = (
        text for line, text in printed.items() if line.startswith("query") and "--image" in line
    )
    assert "red.jpg" in found
    people = 2 * len(COLOURS) + 2  # Two on the photograph.
    assert f"{people} pictures" in printed["gallery info -g photos"]


def test_a_camera(bundle):
    logins = bundle / "cameras.netrc"
    logins.write_text("machine 10.0.0.5 login viewer password secret\n")
    logins.chmod(0o600)
    stand_ins = {
        "gate=rtsp://10.0.0.5/stream2": "gate=street.avi",
        "hall=rtsp://10.0.0.6/stream2": "hall=street.avi",
    }
    printed = run_page("how-to/camera", stand_ins, {"data": ["--duration", "2"]})
    assert (bundle / "trial.png").is_file()
    assert len(printed) == 7


def test_clip_weights(toy):
    spec = SyntheticSpec(look="street", train_ids=6, val_ids=2, test_ids=3, views=2)
    write_dataset(toy / "people", spec)
    shutil.copytree(toy / "people/images", toy / "crops")
    run_page("how-to/clip-weights", TOY | {"openai": "toy.safetensors"}, {"train": TRAIN})
    assert (toy / "answer.png").is_file()


def test_cuhk_pedes(toy):
    write_cuhk_pedes(toy / "data")
    printed = run_page("how-to/cuhk-pedes", TOY, {"train --dataset": TRAIN})
    assert "ok: every record can be read" in printed["data check --dataset cuhk-pedes --root data"]


def test_troubleshooting(bundle):
    run_rt("index", "-b", "bundle", "-g", "gallery", "crops")
    run_page("how-to/troubleshooting")
