"""Flickr30K and MSCOCO."""

import json
from pathlib import Path

import pytest

from tests.helpers.data_sets import WRITERS, edit_json, write_flickr30k, write_mscoco
from upperson.data.published import normalise_caption
from upperson.data.records import Record, read_dataset
from upperson_rt.errors import InputError


@pytest.mark.parametrize(
    ("caption", "normal"),
    [
        ("A man.", "a man"),
        ("Hello, World!", "hello world"),
        ('it\'s "nice"?', "its nice"),
        ("(a) *b* #c: d; ~e", "a b c d e"),
        ("red-and-white", "red and white"),
        ("black/white", "black white"),
        ("<person> walks", "person walks"),
        ("<PERSON>", "person"),
        ("  two \t spaces\n", "two spaces"),
        ("a - b", "a b"),
        ("Ünder 2 [brackets] & <others>", "ünder 2 [brackets] & <others>"),
        ("...", ""),
    ],
)
def test_normalised_captions(caption: str, normal: str) -> None:
    assert normalise_caption(caption) == normal


@pytest.mark.parametrize("name", ["flickr30k", "mscoco"])
def test_the_identity_is_the_image(tmp_path: Path, name: str) -> None:
    folder = WRITERS[name](tmp_path)
    images = folder / ("flickr30k-images" if name == "flickr30k" else "val2014")
    splits = read_dataset(name, folder)
    assert splits["train"][:2] == [
        Record(
            images / "000000000000.jpg",
            100,
            ("person 0 view 0 sentence 0", "person 0 view 0 sentence 1"),
        ),
        Record(
            images / "000000000001.jpg",
            101,
            ("person 0 view 1 sentence 0", "person 0 view 1 sentence 1"),
        ),
    ]
    assert [record.pid for record in splits["train"]] == [100, 101, 102, 103]
    assert [record.pid for record in splits["val"]] == [0]
    assert [record.pid for record in splits["test"]] == [0, 1]


def test_a_split_without_a_file_is_empty(tmp_path: Path) -> None:
    folder = write_flickr30k(tmp_path)
    (folder / "flickr30k_val.json").unlink()
    splits = read_dataset("flickr30k", folder)
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 4,
        "val": 0,
        "test": 2,
    }


def test_numbers_may_be_integers(tmp_path: Path) -> None:
    folder = write_mscoco(tmp_path)
    edit_json(folder / "coco_train.json", lambda entries: entries[0].update(image_id=100))
    assert read_dataset("mscoco", folder)["train"][0].pid == 100


@pytest.mark.parametrize(
    ("split", "values", "message"),
    [
        ("train", {"image_id": "coco_x"}, "'image_id' must be a number, .* found 'coco_x'"),
        ("train", {"image_id": True}, "'image_id' must be a number, .* found True"),
        ("train", {"image_id": None}, "'image_id' must be a number, .* found None"),
        ("train", {"image_id": "9" * 19}, "does not fit 64 bits"),
        ("train", {"image_id": "5"}, r"record \[1\]: image .* had \(split, pid, camera\)"),
        ("train", {"caption": ["a"]}, r"'caption' must be str, found \['a'\]"),
        ("train", {"caption": "?!"}, "the caption is empty"),
        ("train", {"image": "../x.jpg"}, "leaves the data set's folder"),
        ("test", {"caption": "a"}, "'caption' must be list, found 'a'"),
        ("test", {"caption": [1]}, "a caption must be a string, found 1"),
        ("test", {"caption": []}, "the caption is empty"),
        ("test", {"image": "val2014/000000000000.jpg"}, "one image is one person in one split"),
    ],
)
def test_a_bad_record_is_named(
    tmp_path: Path, split: str, values: dict[str, object], message: str
) -> None:
    folder = write_mscoco(tmp_path)
    edit_json(folder / f"coco_{split}.json", lambda entries: entries[0].update(values))
    with pytest.raises(InputError, match=message) as error:
        read_dataset("mscoco", folder)
    assert str(error.value).startswith(f"{folder / f'coco_{split}.json'}, record [")


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    folder = write_flickr30k(tmp_path)
    (folder / "flickr30k_test.json").write_text(json.dumps({"a": 1}), "utf-8")
    with pytest.raises(InputError, match=r"flickr30k_test\.json: expected a list"):
        read_dataset("flickr30k", folder)
