"""``upperson data``: a published set checked from whole to broken, and synthetic people."""

import dataclasses
import json

from tests.helpers.command_line import run_program
from tests.helpers.data_sets import edit_json, write_cuhk_pedes, write_image
from tests.helpers.invoke import run, run_failing
from upperson.data.annotations import Counts
from upperson.data.published import PUBLISHED_SETS


def check(root, *options):
    return run("data", "check", "--dataset", "cuhk-pedes", "--root", root, *options)


def row_of(result, name):
    """The table's row of a name."""
    rows = [line.split() for line in result.stdout.splitlines()]
    return next(row[1:] for row in rows if row[:1] == [name])


def test_counts_are_held_against_the_published_ones(tmp_path, monkeypatch):
    write_cuhk_pedes(tmp_path)
    result = check(tmp_path)
    assert result.exit_code == 0, "a part of a data set is no error"
    assert " ".join(row_of(result, "train")) == "2 4 8 11003 / 34054 / 68126 differs"
    counts = {"train": Counts(2, 4, 8), "val": Counts(1, 1, 2), "test": Counts(1, 2, 4)}
    small = dataclasses.replace(PUBLISHED_SETS["cuhk-pedes"], counts=counts)
    monkeypatch.setitem(PUBLISHED_SETS, "cuhk-pedes", small)
    result = check(tmp_path)
    assert row_of(result, "train")[-1] == "ok"


def test_problems_are_shown_and_the_exit_code_is_3(tmp_path):
    folder = write_cuhk_pedes(tmp_path)
    (folder / "imgs/cam_a/0000.png").unlink()
    (folder / "imgs/cam_a/0001.png").write_bytes(b"")
    for number in range(7):
        write_image(folder / f"imgs/cam_c/{number}.png")
    edit_json(folder / "reid_raw.json", lambda entries: entries[-1].update(id="4a"))
    result = check(tmp_path)
    assert result.exit_code == 3
    for line in (
        "error: records that cannot be read: 1",
        f"  {folder / 'reid_raw.json'}, record [6]: 'id' must be int, found '4a'",
        f"  {folder / 'imgs/cam_a/0000.png'}",
        "note: images that no record names: 8",
        "  and 3 more",
    ):
        assert line in result.stdout.splitlines()
    (folder / "imgs/cam_b").rename(tmp_path / "elsewhere")
    result = check(folder, "--json")  # One object, with errors, too.
    assert result.exit_code == 3
    assert '"usable": false' in result.stdout
    assert '"missing_image"' in result.stdout
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_errors_are_one_line_and_a_code(work):
    (work / "street").mkdir()
    (work / "street/annotations.jsonl").write_text("{}\n", "utf-8")
    for status, code, *options in (
        (2, "dataset_unknown", "--root", ".", "--dataset", "market"),
        (3, "dataset_not_found", "--root", "nowhere"),
        (3, "dataset_not_found", "--root", "no", "--dataset", "rstpreid"),
        (3, "dataset_not_found", "--root", "."),
    ):
        error = run_failing(status, code, "data", "check", *options)
    assert "street" in error["message"], "the folder that was probably meant"


def test_a_synthetic_set_passes_without_torch(tmp_path):
    folder = tmp_path / "people"
    sizes = ["--views", "2", "--train-ids", "2", "--val-ids", "1", "--test-ids", "2"]
    result = run("data", "synthesize", folder, *sizes, "--json")
    assert json.loads(result.stdout) == {"root": str(folder), "images": 10}
    assert 2 <= len(result.stderr.splitlines()) <= 5, "a line when the work changes, not for each"
    without = ["torch", "torchvision", "open_clip", "onnxruntime", "yaml", "matplotlib"]
    done = run_program("upperson", "data", "check", "--root", folder, "--json", without=without)
    assert done.returncode == 0, done.stderr
    assert '"findings": {}' in done.stdout
