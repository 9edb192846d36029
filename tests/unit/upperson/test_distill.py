"""A student learns from a run, is one itself, and stays in its teacher's space."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.toy_clip import IMAGE_SIZE, toy_model
from tests.helpers.toy_run import Recorder, toy_config
from upperson.config import TrainConfig, read_config
from upperson.data.records import read_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.distill import distill, operations, student_config
from upperson.evaluate import embed_records
from upperson.model.parts import PLAIN_CLIP
from upperson.model.student import build_student, start_from_teacher
from upperson.observer import Step
from upperson.run import load_run
from upperson.train import train
from upperson_rt.errors import InputError, IntegrityError, UsageError

pytestmark = pytest.mark.timeout(120)

SETTINGS = {"epochs": 2, "warmup_epochs": 0, "batch_size": 8, "weight_decay": 0.05, "augment": True}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = toy_config(folder, monkeypatch, epochs=1, warmup_epochs=0)
        train(config, folder / "run", Recorder())
        yield folder / "run"


def make_config(teacher: Path, size: str = "1x32", **settings: Any) -> TrainConfig:
    return student_config(teacher, size, (), SETTINGS | settings)


def test_a_piece_as_large_as_the_whole_is_the_whole() -> None:
    teacher = toy_model(PLAIN_CLIP).image
    other = toy_model(PLAIN_CLIP, seed=1).image
    image = torch.randn(2, 3, *IMAGE_SIZE)
    with torch.no_grad():
        assert not torch.allclose(other(image), teacher(image), atol=1e-2)
        start_from_teacher(other, teacher)
        torch.testing.assert_close(other(image), teacher(image))


def test_lora_is_part_of_what_a_student_starts_from() -> None:
    teacher = toy_model().image
    for block in teacher.blocks:  # What a student does not have.
        block.prefix = block.adapter_attn = block.adapter_mlp = None
    student = toy_model(PLAIN_CLIP, seed=1).image
    image = torch.randn(2, 3, *IMAGE_SIZE)
    with torch.no_grad():
        start_from_teacher(student, teacher)
        torch.testing.assert_close(student(image), teacher(image), rtol=1e-4, atol=1e-5)


def test_a_narrower_student_holds_pieces_of_its_teacher() -> None:
    teacher = toy_model(PLAIN_CLIP).image
    student = build_student(teacher, (1, 32), IMAGE_SIZE)
    start_from_teacher(student, teacher)
    assert len(student.blocks) == 1
    assert student.proj.shape == (32, 24)
    rows = {tuple(row) for row in teacher.proj.tolist()}
    assert {tuple(row) for row in student.proj.tolist()} < rows
    assert operations(student, IMAGE_SIZE) < operations(teacher, IMAGE_SIZE) / 3


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("2x96", "must be smaller than its teacher, of 2 blocks of width 64; found 2x96"),
        ("3x32", "must be smaller than its teacher, of 2 blocks of width 64; found 3x32"),
        ("2x64", "must be smaller than its teacher"),
        ("1x48", "must be a multiple of 32, the size of its teacher's heads; found 48"),
        ("1", "a student is BLOCKSxWIDTH, such as 6x384"),
        ("0x32", "a student is BLOCKSxWIDTH"),
    ],
)
def test_what_is_no_smaller_tower_is_refused(teacher: Path, size: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(teacher, size)


def test_a_student_is_a_run_near_its_teacher(teacher: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    config = make_config(teacher, epochs=12, lr=3e-3)
    distill(config, tmp_path / "student", recorder)
    per_epoch = len(recorder.losses) // 12
    assert sum(recorder.losses[-per_epoch:]) < sum(recorder.losses[:per_epoch]) / 2

    mine, theirs = load_run(tmp_path / "student"), load_run(teacher)
    records = read_dataset("jsonl", Path(config.root))["train"]
    tokenizer = clip_tokenizer()
    (text, image), (their_text, their_image) = (
        embed_records(run.model, tokenizer, records) for run in (mine, theirs)
    )
    assert (text == their_text).all(), "the text tower is the teacher's"
    assert (image * their_image).sum(axis=1).mean() > 0.8
    results = json.loads((tmp_path / "student/results.json").read_text("utf-8"))
    facts = results["distilled"]
    assert facts["teacher_operations"] > 3 * facts["operations"] > 0
    measured = json.loads((teacher / "results.json").read_text("utf-8"))
    assert facts["teacher"] == {name: measured[name] for name in ("val", "test")}
    saved = load_file(tmp_path / "student/adapter.safetensors")
    assert saved["image.proj"].shape == (32, 24)
    card = (tmp_path / "student/README.md").read_text("utf-8")
    assert "a student of 1x32 (blocks x width), distilled" in card
    assert "caption masking" not in card


class StoppedError(Exception):
    pass


class StopAt(Recorder):
    def step(self, step: Step) -> None:
        super().step(step)
        if len(self.losses) == 3:
            raise StoppedError


def test_a_stopped_student_ends_as_a_whole_one(teacher: Path, tmp_path: Path) -> None:
    config = replace(make_config(teacher), checkpoint_every=1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    distill(config, whole, Recorder())
    with pytest.raises(StoppedError):
        distill(config, stopped, StopAt())
    recorder = Recorder()
    distill(read_config(stopped / "config.yaml"), stopped, recorder, resume=True)
    assert recorder.notes == ["resuming at epoch 2, step 1"]
    for name in ("adapter.safetensors", "metrics.csv"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_pictures_without_captions_are_learned_from(teacher: Path, tmp_path: Path) -> None:
    config = make_config(teacher)
    people = Path(config.root) / "images/test"
    settings = SETTINGS | {"epochs": 1}
    more = student_config(teacher, "1x32", (people,), settings)
    recorder = Recorder()
    distill(more, tmp_path / "student", recorder)
    # 6 people x 2 views to train on, and 5 x 2 of the test split's folder, in batches of 8.
    assert len(recorder.losses) == 3
    with pytest.raises(InputError, match="no such file or folder"):
        student_config(teacher, "1x32", (tmp_path / "nowhere",), SETTINGS)


def test_another_teacher_and_training_with_captions_are_refused(
    teacher: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(teacher, tmp_path / "copy")
    config = make_config(teacher)
    with pytest.raises(UsageError, match=r"not trained with captions but distilled"):
        train(config, tmp_path / "run", Recorder())
    with pytest.raises(UsageError, match=r"names no student"):
        distill(replace(config, student=None), tmp_path / "run", Recorder())
    (teacher / "adapter.safetensors").write_bytes(_other_weights(teacher / "adapter.safetensors"))
    with pytest.raises(IntegrityError, match=r"is not the run that this student began with"):
        distill(config, tmp_path / "run", Recorder())
    assert not (tmp_path / "run").exists()


def _other_weights(adapter: Path) -> bytes:
    content = bytearray(adapter.read_bytes())
    content[-4] ^= 1  # The lowest bit of the last number.
    return bytes(content)
