"""Reading annotations.jsonl, and what holds for every format."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.data_sets import (
    ANNOTATION_FILES,
    CROPS,
    WRITERS,
    captions_of,
    edit_json,
    write_cuhk_pedes,
    write_rstpreid,
)
from upperson.data.records import DATASETS, SPLITS, Record, read_dataset
from upperson_rt.errors import InputError, UsageError

LINE: dict[str, Any] = {"image": "a.jpg", "pid": 1, "caption": "a man", "split": "test"}


def write(root: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / "annotations.jsonl").write_text("\n".join(texts), "utf-8")
    return root


# --- jsonl ---


def test_captions_of_an_image_are_one_record(tmp_path: Path) -> None:
    splits = read_dataset(
        "jsonl",
        write(
            tmp_path,
            LINE | {"camera": "c1"},
            "",
            LINE | {"image": "./a.jpg", "caption": "a person", "camera": "c1"},
            {"image": "b.jpg", "pid": 2, "caption": "x", "note": "other keys are free"},
        ),
    )
    assert splits["test"] == [Record(tmp_path / "a.jpg", 1, ("a man", "a person"), "c1")]
    assert splits["train"] == [Record(tmp_path / "b.jpg", 2, ("x",), None)]
    assert splits["val"] == []


def test_attributes_are_kept_known_to_the_program_or_not(tmp_path: Path) -> None:
    truth = {"upper": "coat", "bag_colour": None, "glasses": False, "skin": 2, "hat_colour": "red"}
    truth |= {"age": 30.5, "Größe": "groß", "staff": True, "floor": 3, "note": None}
    root = write(
        tmp_path, LINE | {"attributes": truth}, LINE | {"attributes": truth, "caption": "b"}
    )
    (record,) = read_dataset("jsonl", root)["test"]
    assert (record.attributes, record.captions) == (truth, ("a man", "b"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{broken"], "line 1: not JSON in UTF-8"),
        (["[]"], "line 1: expected a JSON object, found list"),
        (["[" * 100_000], "line 1: not JSON in UTF-8"),
        ([LINE, {"image": "b.jpg", "pid": 2}], "line 2: key 'caption' is missing"),
        ([LINE | {"pid": "1"}], "'pid' must be int, found '1'"),
        ([LINE | {"pid": True}], "'pid' must be int, found True"),
        ([LINE | {"pid": 1.0}], "'pid' must be int, found 1.0"),
        ([LINE | {"pid": 10**24}], "does not fit 64 bits"),
        ([LINE | {"pid": -1}], "pid -1 is negative"),
        ([LINE | {"caption": "  "}], "the caption is empty"),
        ([LINE | {"caption": "\ud800"}], r"line 1: the caption '\\ud800' has half a surrogate"),
        ([LINE | {"split": "dev"}], "split must be one of train, val, test, found 'dev'"),
        ([LINE | {"image": "../a.jpg"}], "leaves the data set's folder"),
        ([LINE | {"image": "/etc/a.jpg"}], "leaves the data set's folder"),
        ([LINE | {"image": ""}], "the image path is empty"),
        ([LINE, LINE | {"pid": 2}], "one image is one person"),
        ([LINE, LINE | {"split": "train"}], "one image is one person in one split"),
        ([LINE, LINE | {"attributes": {}}], r"had other attributes in .*line 1: all lines"),
        ([LINE | {"attributes": "coat"}], "'attributes' must be dict, found 'coat'"),
        ([LINE | {"attributes": {"upper": 1}}], "'upper' must be str, or null for no such thing"),
        ([LINE | {"attributes": {"upper": " "}}], "attribute 'upper' is no text: ' '"),
        ([LINE | {"attributes": {"upper": "\ud800"}}], "attribute 'upper' is no text"),
        ([LINE | {"attributes": {"glasses": 1}}], "'glasses' must be bool, .* found 1"),
        ([LINE | {"attributes": {"skin": True}}], "'skin' must be int, .* found True"),
        ([LINE | {"attributes": {"mood": ["sad"]}}], "'mood' must be a string, a number or a bool"),
        ([LINE | {"attributes": {"age": float("nan")}}], "'age' must be .* found nan"),
        ([LINE | {"attributes": {"upper_color": "red"}}], "did you mean 'upper_colour'"),
        ([LINE, LINE | {"image": "b.jpg", "split": "train"}], "in split 'test' and in 'train'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_dataset("jsonl", write(tmp_path, *lines))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_lines_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "annotations.jsonl").write_bytes(json.dumps(LINE).encode() + b"\n\xff\xfe\n")
    with pytest.raises(InputError, match="line 2: not JSON in UTF-8"):
        read_dataset("jsonl", tmp_path)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "annotations.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(LINE).encode())
    assert len(read_dataset("jsonl", tmp_path)["test"]) == 1


def test_a_folder_without_annotations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"annotations\.jsonl in .*--root"):
        read_dataset("jsonl", tmp_path)


# --- every format ---


@pytest.mark.parametrize("name", DATASETS)
def test_every_set_is_read_with_all_its_images(tmp_path: Path, name: str) -> None:
    splits = read_dataset(name, WRITERS[name](tmp_path))
    assert tuple(splits) == SPLITS
    sizes = {split: len(records) for split, records in splits.items()}
    assert sizes == {"train": 4, "val": 0 if name == "icfg-pedes" else 1, "test": 2}
    records = [record for split in SPLITS for record in splits[split]]
    assert all(record.image.is_file() for record in records)
    assert len({record.image for record in records}) == len(records)
    assert all(record.captions for record in records)


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("jsonl", "csv")])
def test_the_root_may_be_the_folder_or_the_one_around_it(tmp_path: Path, name: str) -> None:
    folder = WRITERS[name](tmp_path)
    assert read_dataset(name, tmp_path) == read_dataset(name, folder)


@pytest.mark.parametrize("name", DATASETS)
def test_a_missing_set_names_the_folders_that_were_searched(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"found none: pass --root with") as error:
        read_dataset(name, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert ANNOTATION_FILES[name] in str(error.value)


def test_another_annotation_file_is_mentioned(tmp_path: Path) -> None:
    folder = write_rstpreid(tmp_path)
    (folder / "data_captions.json").rename(folder / "captions.json")
    expected = f"expected data_captions.json in {tmp_path} or {folder}, found only captions.json"
    with pytest.raises(InputError) as error:
        read_dataset("rstpreid", tmp_path)
    assert expected in str(error.value)


def test_names_may_be_written_as_the_sets_are(tmp_path: Path) -> None:
    write_cuhk_pedes(tmp_path)
    assert read_dataset("CUHK-PEDES", tmp_path) == read_dataset("cuhk-pedes", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuhk_pedes", "did you mean 'cuhk-pedes'"), ("RSTPReID2", "did you mean 'rstpreid'")],
)
def test_a_name_that_is_nearly_right_gets_a_suggestion(
    tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_dataset(name, tmp_path)


def test_an_unknown_name_gets_the_list(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"known: csv, .*cuhk-pedes.*rstpreid"):
        read_dataset("market", tmp_path)


def test_an_empty_caption_beside_another_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_cuhk_pedes(tmp_path)
    edit_json(folder / "reid_raw.json", lambda entries: entries[1]["captions"].insert(0, " "))
    with caplog.at_level(logging.WARNING, "upperson.data.records"):
        records = read_dataset("cuhk-pedes", tmp_path)["train"]
    assert records[1].captions == tuple(captions_of(CROPS[1]))
    (message,) = caplog.messages
    assert message.startswith("1 records have an empty caption, which is left out; the first: ")
    assert "reid_raw.json, record [1]" in message


def test_good_data_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, writer in WRITERS.items():
        read_dataset(name, writer(tmp_path / name))
    assert caplog.messages == []
