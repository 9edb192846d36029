"""Reading annotations.jsonl."""

import json
from pathlib import Path
from typing import Any

import pytest

from upperson.data.records import Record, read_jsonl
from upperson_rt.errors import InputError

LINE: dict[str, Any] = {"image": "a.jpg", "pid": 1, "caption": "a man", "split": "test"}


def write(root: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / "annotations.jsonl").write_text("\n".join(texts), "utf-8")
    return root


def test_captions_of_an_image_are_one_record(tmp_path: Path) -> None:
    splits = read_jsonl(
        write(
            tmp_path,
            LINE | {"camera": "c1"},
            "",
            LINE | {"caption": "a person", "camera": "c1"},
            {"image": "b.jpg", "pid": 2, "caption": "x"},
        )
    )
    assert splits["test"] == [Record(tmp_path / "a.jpg", 1, ("a man", "a person"), "c1")]
    assert splits["train"] == [Record(tmp_path / "b.jpg", 2, ("x",), None)]
    assert splits["val"] == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{broken"], "line 1: not JSON in UTF-8"),
        (["[]"], "line 1: expected a JSON object"),
        ([LINE, {"image": "b.jpg", "pid": 2}], "line 2: key 'caption' is missing"),
        ([LINE | {"pid": "1"}], "'pid' must be int, found '1'"),
        ([LINE | {"pid": True}], "'pid' must be int, found True"),
        ([LINE | {"pid": 10**24}], "does not fit 64 bits"),
        ([LINE | {"caption": "  "}], "the caption is empty"),
        ([LINE | {"split": "dev"}], "split must be one of train, val, test, found 'dev'"),
        ([LINE | {"image": "../a.jpg"}], "leaves the data set's folder"),
        ([LINE | {"image": "/etc/a.jpg"}], "leaves the data set's folder"),
        ([LINE, LINE | {"pid": 2}], "one image is one person"),
        ([LINE, LINE | {"image": "b.jpg", "split": "train"}], "in split 'test' and in 'train'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_jsonl(write(tmp_path, *lines))


def test_a_folder_without_annotations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"annotations\.jsonl in .*--root"):
        read_jsonl(tmp_path)
