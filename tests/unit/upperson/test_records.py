"""Reading annotations.jsonl and annotations.csv, and what holds for every format."""

import json
import logging

import pytest

from tests.helpers.data_sets import (
    ANNOTATION_FILES,
    CROPS,
    WRITERS,
    captions_of,
    edit_json,
    write_csv,
    write_cuhk_pedes,
    write_jsonl,
    write_rstpreid,
)
from tests.helpers.refused import refused
from upperson.config import TrainConfig, read_yaml
from upperson.data.records import DATASETS, SPLITS, Record, read_dataset
from upperson_camera.detectors.naming import BoxesFile
from upperson_rt.errors import InputError, UsageError
from upperson_rt.preprocess import load_image
from upperson_rt.strict import read_json

LINE = {"image": "a.jpg", "pid": 1, "caption": "a man", "split": "test"}
HEADER = "image,pid,caption,split,camera\n"


def write(root, *lines):
    texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    content = b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts)
    (root / "annotations.jsonl").write_bytes(content)
    return root


def write_text(root, text):
    content = text if isinstance(text, bytes) else text.encode("utf-8")
    (root / "annotations.csv").write_bytes(content)
    return root


# --- jsonl ---


def test_captions_of_an_image_are_one_record(tmp_path):
    truth = {"upper": "coat", "bag_colour": None, "glasses": False, "skin": 2, "hat_colour": "red"}
    truth |= {"age": 30.5, "Größe": "groß", "staff": True, "floor": 3, "note": None}
    first = LINE | {"camera": "c1", "attributes": truth}
    splits = read_dataset(
        "jsonl",
        write(
            tmp_path,
            "\ufeff" + json.dumps(first),
            "",
            first | {"image": "./a.jpg", "caption": "a person"},
            {"image": "b.jpg", "pid": 2, "caption": "x", "note": "other keys are free"},
        ),
    )
    assert splits["test"] == [Record(tmp_path / "a.jpg", 1, ("a man", "a person"), "c1", truth)]
    assert splits["train"] == [Record(tmp_path / "b.jpg", 2, ("x",), None)]
    assert splits["val"] == []


BAD_LINES = {
    "not_json": ["{broken", "[" * 100_000, b"\xff\xfe"],
    "not_an_object": ["[]"],
    "key_missing": [{"image": "b.jpg", "pid": 2}],
    "wrong_type": [
        LINE | one for one in ({"pid": "1"}, {"pid": True}, {"pid": 1.0}, {"attributes": "coat"})
    ],
    "pid_out_of_range": [LINE | {"pid": wrong} for wrong in (2**63, -1)],
    "no_caption": [LINE | {"caption": "  "}],
    "caption_not_unicode": [LINE | {"caption": "\ud800"}],
    "split_unknown": [LINE | {"split": "dev"}],
    "path_outside_folder": [LINE | {"image": wrong} for wrong in ("../a.jpg", "/etc/a.jpg")],
    "path_empty": [LINE | {"image": ""}],
    "conflicting_image": [
        LINE | one for one in ({"pid": 2}, {"split": "train"}, {"camera": "c"}, {"attributes": {}})
    ],
    "id_in_two_splits": [LINE | {"image": "b.jpg", "split": "train"}],
    "attribute_wrong_type": [
        LINE | {"attributes": one}
        for one in ({"upper": 1}, {"skin": True}, {"mood": ["sad"]}, {"age": float("nan")})
    ],
    "attribute_not_text": [LINE | {"attributes": {"upper": wrong}} for wrong in (" ", "\ud800")],
    "attribute_unknown": [LINE | {"attributes": {"upper_color": "red"}}],
}


@pytest.mark.parametrize("code", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, code):
    where = f"{tmp_path / 'annotations.jsonl'}, line 2"
    for line in BAD_LINES[code]:
        with refused(code, InputError, where=where) as found:
            read_dataset("jsonl", write(tmp_path, LINE, line))
        assert str(found.value).startswith(f"{where}: ")
        assert "\n" not in str(found.value)
        assert len(str(found.value)) < 400 + len(str(tmp_path))


# --- csv ---


def test_csv_and_jsonl_say_the_same(tmp_path):
    write_csv(tmp_path)
    write_jsonl(tmp_path)
    splits = read_dataset("csv", tmp_path)
    assert splits == read_dataset("jsonl", tmp_path)
    captions = tuple(captions_of(CROPS[4]))
    assert splits["val"] == [Record(tmp_path / "images/2_0.png", 2, captions, "c0")]


def test_what_people_write(tmp_path):
    for text in (
        "image,pid,caption\na.jpg,7,a man\n",
        "caption,image,pid\na man,a.jpg,7\n",
        'pid, image, caption\n7, a.jpg, "a man"\n',
        "\ufeffimage,pid,caption\na.jpg,7,a man\n",
        "image,pid,caption\r\n\r\na.jpg,7,a man\r\n",
        HEADER + "a.jpg,7,a man,,",
        "image,pid,caption,split,note\na.jpg,7,a man,train,anything\n",
    ):
        splits = read_dataset("csv", write_text(tmp_path, text))
        assert splits["train"] == [Record(tmp_path / "a.jpg", 7, ("a man",))], text
    text = HEADER + 'a.jpg,7,"a ""tall"" man,\nin red",test,c1\n'
    (record,) = read_dataset("csv", write_text(tmp_path, text))["test"]
    assert record == Record(tmp_path / "a.jpg", 7, ('a "tall" man,\nin red',), "c1")


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("", "header_wrong", 1),
        ("image;pid;caption\na.jpg;7;a man\n", "header_wrong", 1),
        ("image,pid,caption,pid\na.jpg,7,a man,7\n", "header_wrong", 1),
        (HEADER + "a.jpg,7,a man\n", "cells_wrong", 2),
        (HEADER + "a.jpg,7,a man,,\nb.jpg,7.0,a man,,\n", "wrong_type", 3),
        (HEADER + f"a.jpg,{'9' * 5000},a man,,\n", "wrong_type", 2),
        (HEADER + "a.jpg,-1,a man,,\n", "pid_out_of_range", 2),
        (HEADER + 'a.jpg,7,"a\nman",,\nb.jpg,x,a man,,\n', "wrong_type", 4),
        (HEADER + 'a.jpg,7,a man,,\nb.jpg,8,"a man,,\nc.jpg,9,x,,\n', "not_csv", 3),
        (HEADER + "a.jpg,7,a man,,\na.jpg,8,a man,,\n", "conflicting_image", 3),
        (HEADER.encode() + b"a.jpg,7,a man,,\nb.jpg,8,a \xff man,,\n", "not_utf8", 3),
        (HEADER + f"a.jpg,7,{'x' * 200_000},,\n", "not_csv", 2),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, code, line):
    where = f"{tmp_path / 'annotations.csv'}, line {line}"
    with refused(code, InputError, where=where) as found:
        read_dataset("csv", write_text(tmp_path, text))
    assert str(found.value).startswith(f"{where}: ")
    assert "\n" not in str(found.value)


# --- every format ---


@pytest.mark.parametrize("name", DATASETS)
def test_every_set_is_read_with_all_its_images(tmp_path, caplog, name):
    folder = WRITERS[name](tmp_path)
    splits = read_dataset(name, folder)
    assert tuple(splits) == SPLITS
    sizes = {split: len(records) for split, records in splits.items()}
    assert sizes == {"train": 4, "val": 0 if name == "icfg-pedes" else 1, "test": 2}
    records = [record for split in SPLITS for record in splits[split]]
    assert all(record.image.is_file() and record.captions for record in records)
    assert len({record.image for record in records}) == len(records)
    # The root may be the folder or the one around it, and a name is written in any case.
    assert read_dataset(name.upper(), tmp_path) == splits
    assert caplog.messages == []


def test_a_missing_set_or_an_unknown_name_is_answered_with_what_there_is(tmp_path):
    for name in DATASETS:
        with refused("dataset_not_found", InputError) as found:
            read_dataset(name, tmp_path)
        assert str(tmp_path) in str(found.value)
        assert ANNOTATION_FILES[name] in str(found.value)
    folder = write_rstpreid(tmp_path)
    (folder / "data_captions.json").rename(folder / "captions.json")
    with refused("dataset_not_found", InputError, found="only captions.json"):
        read_dataset("rstpreid", tmp_path)
    for name, suggestion in (("cuhk_pedes", "'cuhk-pedes'"), ("market", "known: csv, ")):
        with refused("dataset_unknown", UsageError, dataset=name) as found:
            read_dataset(name, tmp_path)
        assert suggestion in found.value.fields["suggestion"]


def test_an_empty_caption_beside_another_is_left_out_and_logged(tmp_path, caplog):
    folder = write_cuhk_pedes(tmp_path)
    edit_json(folder / "reid_raw.json", lambda entries: entries[1]["captions"].insert(0, " "))
    with caplog.at_level(logging.WARNING, "upperson.data.records"):
        records = read_dataset("cuhk-pedes", tmp_path)["train"]
    assert records[1].captions == tuple(captions_of(CROPS[1]))
    (message,) = caplog.messages
    assert "reid_raw.json, record [1]" in message


# --- a link to a file of another kind, of which no word may be in a message ---

READERS = {
    "a.png": load_image,
    "annotations.csv": lambda path: read_dataset("csv", path.parent),
    "annotations.jsonl": lambda path: read_dataset("jsonl", path.parent),
    "config.yaml": lambda path: read_yaml(TrainConfig, path),
    "users.json": read_json,
    "boxes.json": BoxesFile,
}
SECRETS = (
    "root:$y$SECRET:19000:0:99999:7:::\ndaemon:*:SECRET:0:99999:7:::\n",
    "SECRET=x\nSECRET: b: c\n",
    "- SECRET: [SECRET\n",
    "a: *SECRET\n",
    "a: !SECRET b\n",
    "SECRET,SECRET\n1,2\n",
    "[SECRET]\nSECRET = 1\n",
)


@pytest.mark.parametrize("name", READERS)
def test_no_word_of_a_linked_file_is_in_the_message(tmp_path, name):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere")
    for secret in SECRETS:
        (tmp_path / "elsewhere").write_text(secret)
        with pytest.raises(InputError) as caught:
            READERS[name](tmp_path / "set" / name)
        message = str(caught.value).replace(str(tmp_path), "")
        assert "SECRET" not in message
        assert "root:" not in message
