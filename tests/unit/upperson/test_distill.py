"""A student learns from a run, is one itself, and stays in its teacher's space."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.helpers.refused import refused
from tests.helpers.toy_bases import PARTS
from tests.helpers.toy_clip import IMAGE_SIZE, normalised, toy_model, toy_pixels
from tests.helpers.toy_run import Recorder, StoppedError, toy_config
from upperson.config import read_config
from upperson.data.batches import LoadedBatch
from upperson.data.pictures import Pictures
from upperson.data.records import read_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.distill import Teacher, distill, student_config
from upperson.evaluate import embed_records
from upperson.model.parts import PLAIN_CLIP
from upperson.model.student import StudentSize, build_student, start_from_teacher
from upperson.run import load_run
from upperson.train import train
from upperson_export.fold import fold_image_tower
from upperson_rt.errors import InputError, IntegrityError, UsageError

pytestmark = pytest.mark.timeout(120)

SETTINGS = {"epochs": 2, "warmup_epochs": 0, "batch_size": 8, "weight_decay": 0.05, "augment": True}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = toy_config(folder, monkeypatch, epochs=1, warmup_epochs=0)
        train(config, folder / "run", Recorder())
        yield folder / "run"


def make_config(teacher, size="1x32", **settings):
    return student_config(teacher, size, (), SETTINGS | settings)


def start(size, teacher=None):
    """A toy teacher without parts, a student that has started from it, and pictures."""
    teacher = toy_model(PLAIN_CLIP).image if teacher is None else teacher
    student = build_student(teacher, StudentSize(*size), IMAGE_SIZE)
    start_from_teacher(student, teacher, IMAGE_SIZE)
    return teacher, student, torch.randn(2, 3, *IMAGE_SIZE)


@pytest.mark.parametrize("parts", [PLAIN_CLIP, PARTS], ids=["plain", "with LoRA"])
@torch.no_grad()
def test_a_piece_as_large_as_the_whole_is_the_whole(parts):
    teacher, student = toy_model(parts).image, toy_model(PLAIN_CLIP, seed=1).image
    for block in teacher.blocks:  # What a student does not have.
        block.prefix = block.adapter_attn = block.adapter_mlp = None
    image = torch.randn(2, 3, *IMAGE_SIZE)
    assert not torch.allclose(student(image), teacher(image), atol=1e-2)
    start_from_teacher(student, teacher, IMAGE_SIZE)
    torch.testing.assert_close(student(image), teacher(image), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_larger_patch_starts_as_the_mean_of_those_within():
    teacher, student, image = start((2, 64, (48, 16)))
    expected = teacher.stem(image).mean(dim=2, keepdim=True)
    torch.testing.assert_close(student.stem(image), expected)
    rows = teacher.positional_embedding[1:].unflatten(0, (3, 2)).mean(dim=0)
    torch.testing.assert_close(student.positional_embedding[1:], rows)
    # One half as large again starts as two that overlap.
    _, student, image = start((2, 64, (24, 16)), teacher)
    above, below = (teacher.stem(image[:, :, top : top + 16]) for top in (0, 8))
    torch.testing.assert_close(student.stem(image)[:, :, :1], (above + below) / 2)


@pytest.mark.parametrize(
    ("size", "code", "fields"),
    [
        *(
            (size, "student_not_smaller", {"teacher": "2x64@16x16"})
            for size in ("2x96", "3x32", "2x64", "2x64@8x16", "2x64@16x16")
        ),
        ("1x48", "student_width", {"multiple_of": 32, "found": 48}),
        ("2x64@20x16", "image_size_indivisible", {"image_size": (48, 32), "patch": (20, 16)}),
        *((size, "student_malformed", {"found": size}) for size in ("1x32@16", "1", "0x32")),
    ],
)
def test_what_is_no_smaller_tower_is_refused(teacher, size, code, fields):
    with refused(code, UsageError, **fields):
        make_config(teacher, size)


def test_a_student_is_a_run_near_its_teacher(teacher, tmp_path):
    recorder = Recorder()
    config = make_config(teacher, epochs=8, lr=4e-3)
    distill(config, tmp_path / "student", recorder)
    per_epoch = len(recorder.losses) // 8
    assert sum(recorder.losses[-per_epoch:]) < sum(recorder.losses[:per_epoch]) / 2

    records = read_dataset("jsonl", Path(config.root))["train"]
    (text, image), (their_text, their_image) = (
        embed_records(load_run(path).model, clip_tokenizer(), records)
        for path in (tmp_path / "student", teacher)
    )
    assert (text == their_text).all(), "the text tower is the teacher's"
    assert (image * their_image).sum(axis=1).mean() > 0.8
    results, measured = (
        json.loads((run / "results.json").read_text("utf-8"))
        for run in (tmp_path / "student", teacher)
    )
    facts = results["distilled"]
    assert facts["teacher_operations"] > 3 * facts["operations"] > 0
    assert facts["teacher"] == {name: measured[name] for name in ("val", "test")}
    saved = load_file(tmp_path / "student/adapter.safetensors")
    assert saved["image.proj"].shape == (32, 24)


@pytest.mark.parametrize("augment", [True, False])
def test_a_stopped_student_ends_as_a_whole_one(teacher, tmp_path, augment):
    cache = None if augment else str(tmp_path / "cache")
    config = make_config(teacher, "2x32@24x16", augment=augment, cache=cache)
    config = replace(config, checkpoint_every=1)
    whole, stopped, recorder = tmp_path / "whole", tmp_path / "stopped", Recorder()
    distill(config, whole, recorder)
    assert recorder.taught == ([] if augment else [(8, 12), (12, 12)])
    with pytest.raises(StoppedError):
        distill(config, stopped, Recorder(stop_after=3))
    distill(read_config(stopped / "config.yaml"), stopped, recorder := Recorder(), resume=True)
    assert recorder.notes == ["resuming at epoch 2, step 1"]
    for name in ("adapter.safetensors", "metrics.csv"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert load_run(whole).model.image.stem.kernel_size == (24, 16)
    again = student_config(whole, "1x32", (), SETTINGS)
    assert again.student is not None
    assert again.student.size == "1x32@24x16", "patches are the teacher's, not its base's"


@pytest.mark.parametrize("mixed", [False, True])
def test_a_cached_teacher_has_the_targets_of_a_live_one(teacher, mixed):
    model = load_run(teacher).model
    device = torch.device("cpu")
    files = sorted((teacher.parent / "people/images/train").iterdir())
    pictures = Pictures(files, model.image_size)
    done = []
    always, once = (Teacher(model.image, model.statistics) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        once.embed_all(pictures, 5, lambda *counts: done.append(counts))
    assert done == [(5, 12), (10, 12), (12, 12)]
    places = [7, 0, 7, 11]
    moves = torch.tensor([[side, 3, 17, 2, 2, 9, 9] for side in (0, 1, 1, 0)], dtype=torch.int32)
    pixels = torch.from_numpy(pictures.read(places))
    loaded = LoadedBatch(pixels, moves, torch.zeros(4, 3, dtype=torch.int64), torch.tensor(places))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        image, made = once.targets(loaded, device)
    plain = normalised(model, pixels)
    torch.testing.assert_close(image, torch.stack([plain[0], *plain[1:3].flip(3), plain[3]]))
    with torch.no_grad():
        expected = F.normalize(model.image(image), dim=-1)
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-2 if mixed else 1e-3)
    # Augmented, the same pictures are others.
    image, made = always.targets(loaded, device)
    with torch.no_grad():
        torch.testing.assert_close(made, F.normalize(model.image(image), dim=-1))
    assert (made * expected).sum(dim=1).max() < 0.9999


@torch.no_grad()
def test_a_student_folds_into_a_plain_tower():
    model = toy_model()
    _, model.image, _ = start((1, 32, (24, 16)), model.image)
    pixels = toy_pixels(2)
    expected = model.encode_image(normalised(model, pixels))
    torch.testing.assert_close(fold_image_tower(model)(pixels), expected, rtol=0, atol=1e-5)


def test_pictures_without_captions_are_learned_from(teacher, tmp_path):
    people = teacher.parent / "people/images/test"
    more = student_config(teacher, "1x32", (people,), SETTINGS | {"epochs": 1})
    distill(more, tmp_path / "student", recorder := Recorder())
    # 6 people x 2 views to train on, and 5 x 2 of the test split's folder, in batches of 8.
    assert len(recorder.losses) == 3
    with pytest.raises(InputError, match="no such file or folder"):
        student_config(teacher, "1x32", (tmp_path / "nowhere",), SETTINGS)


def test_another_teacher_and_training_with_captions_are_refused(teacher, tmp_path):
    teacher = shutil.copytree(teacher, tmp_path / "copy")
    config = make_config(teacher)
    with refused("student_in_training", UsageError):
        train(config, tmp_path / "run", Recorder())
    with refused("no_student", UsageError):
        distill(replace(config, student=None), tmp_path / "run", Recorder())
    adapter = teacher / "adapter.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-4] ^= 1  # The lowest bit of the last number.
    adapter.write_bytes(content)
    with refused("teacher_changed", IntegrityError, path=str(teacher)):
        distill(config, tmp_path / "run", Recorder())
    assert not (tmp_path / "run").exists()
