import dataclasses
import json

import pytest
from typer.testing import CliRunner

import upperson.cli
from tests.helpers.command_line import run_program
from tests.helpers.data_sets import (
    WRITERS,
    edit_json,
    write_cuhk_pedes,
    write_image,
    write_jsonl,
)
from tests.helpers.invoke import run_failing
from upperson.data.annotations import Counts
from upperson.data.published import PUBLISHED_SETS


def check(*arguments):
    words = ["data", "check", *map(str, arguments)]
    return CliRunner().invoke(upperson.cli.app, words)


def rows_of(text):
    """The table's rows by their first word."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_can_be_checked(tmp_path, name):
    WRITERS[name](tmp_path)
    result = check("--dataset", name, "--root", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith(f"{name}: {tmp_path}")
    assert rows_of(result.stdout)["train"][1] == "4"
    assert result.stdout.splitlines()[-1] == "ok: every record can be read and all images decode"


def test_counts_are_held_against_the_published_ones(tmp_path, monkeypatch):
    write_cuhk_pedes(tmp_path)
    arguments = ["--dataset", "cuhk-pedes", "--root", tmp_path]
    result = check(*arguments)
    assert result.exit_code == 0, "a part of a data set is no error"
    rows = rows_of(result.stdout)
    assert rows["split"] == ["ids", "images", "captions", "published"]
    assert rows["train"] == ["2", "4", "8", "11003", "/", "34054", "/", "68126", "differs"]
    assert (
        "warning: splits of another size than published (training needs --allow-partial): 3"
        in result.stdout
    )
    assert all(len(line.rstrip()) <= 100 for line in result.stdout.splitlines()[1:])

    counts = {"train": Counts(2, 4, 8), "val": Counts(1, 1, 2), "test": Counts(1, 2, 4)}
    small = dataclasses.replace(PUBLISHED_SETS["cuhk-pedes"], counts=counts)
    monkeypatch.setitem(PUBLISHED_SETS, "cuhk-pedes", small)
    result = check(*arguments)
    assert rows_of(result.stdout)["train"][-1] == "ok"
    assert "warning" not in result.stdout
    result = check("--root", write_jsonl(tmp_path))
    assert rows_of(result.stdout)["split"] == ["ids", "images", "captions"]
    assert "published" not in result.stdout


def test_problems_are_shown_and_the_exit_code_is_3(tmp_path):
    folder = write_cuhk_pedes(tmp_path)
    (folder / "imgs/cam_a/0000.png").unlink()
    (folder / "imgs/cam_a/0001.png").write_bytes(b"")
    for number in range(7):
        write_image(folder / f"imgs/cam_c/{number}.png")
    edit_json(folder / "reid_raw.json", lambda entries: entries[-1].update(id="4a"))
    result = check("--dataset", "cuhk-pedes", "--root", tmp_path)
    assert result.exit_code == 3
    for line in (
        "error: records that cannot be read: 1",
        f"  {folder / 'reid_raw.json'}, record [6]: 'id' must be int, found '4a'",
        "error: images that are not there: 1",
        f"  {folder / 'imgs/cam_a/0000.png'}",
        "error: images that cannot be decoded: 1",
        "note: images that no record names: 8",
        "  and 3 more",
    ):
        assert line in result.stdout.splitlines()
    assert "ok:" not in result.stdout
    assert result.stderr.splitlines()[-1] == (
        f"error: cuhk-pedes in {tmp_path} cannot be used as it is: records that cannot be read: 1, "
        "images that are not there: 1, images that cannot be decoded: 1"
    )


def test_a_missing_folder_is_told_at_once(tmp_path):
    folder = write_cuhk_pedes(tmp_path)
    (folder / "imgs/cam_b").rename(tmp_path / "elsewhere")
    result = check("--dataset", "cuhk-pedes", "--root", folder)
    assert result.exit_code == 3
    missing = f"{folder / 'imgs/cam_b'}, which 3 images should be in"
    assert result.stderr.splitlines()[0] == f"image folder missing: {missing}"
    assert "error: image folders that are not there: 1" in result.stdout.splitlines()
    assert f"  {missing}" in result.stdout.splitlines()


def test_json_is_one_object_also_with_errors(tmp_path):
    folder = write_cuhk_pedes(tmp_path)
    arguments = ["--dataset", "cuhk-pedes", "--root", folder, "--json"]
    result = check(*arguments)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["usable"] is True
    (folder / "imgs/cam_a/0000.png").unlink()
    result = check(*arguments)
    assert result.exit_code == 3
    content = json.loads(result.stdout)
    assert content["usable"] is False
    assert content["findings"]["missing_image"]["count"] == 1
    assert content["splits"]["test"]["captions"] == 4
    assert "images that are not there: 1" in result.stderr


def test_images_can_be_left_undecoded(tmp_path):
    folder = write_jsonl(tmp_path)
    (folder / "images/0_0.png").write_bytes(b"")
    assert check("--root", folder).exit_code == 3
    result = check("--root", folder, "--no-images")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "ok: every record can be read and all images are there"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["--root", ".", "--dataset", "market"], 2, "dataset_unknown"),
        (["--root", "nowhere"], 3, "dataset_not_found"),
        (["--root", "no", "--dataset", "rstpreid"], 3, "dataset_not_found"),
        (["--root", "."], 3, "dataset_not_found"),
    ],
)
def test_errors_are_one_line_and_a_code(work, arguments, status, code):
    (work / "street").mkdir()
    (work / "street/annotations.jsonl").write_text("{}\n", "utf-8")
    error = run_failing(status, code, "data", "check", *arguments)
    assert ("street: pass that" in error["message"]) == (arguments == ["--root", "."])


def test_the_check_needs_no_torch(tmp_path):
    write_cuhk_pedes(tmp_path)
    without = ["torch", "torchvision", "open_clip", "onnxruntime", "yaml", "matplotlib"]
    done = run_program(
        "upperson", "data", "check", "--dataset", "cuhk-pedes", "--root", tmp_path, without=without
    )
    assert done.returncode == 0, done.stderr
    assert "all images decode" in done.stdout


def test_a_synthetic_set_passes(tmp_path):
    synthesize = ["data", "synthesize", str(tmp_path / "people"), "--views", "2"]
    sizes = ["--train-ids", "2", "--val-ids", "1", "--test-ids", "2"]
    assert CliRunner().invoke(upperson.cli.app, synthesize + sizes).exit_code == 0
    result = check("--root", tmp_path / "people", "--json")
    content = json.loads(result.stdout)
    assert result.exit_code == 0
    assert content["findings"] == {}
    assert [split["ids"] for split in content["splits"].values()] == [2, 1, 2]
    assert [split["images"] for split in content["splits"].values()] == [4, 2, 4]
