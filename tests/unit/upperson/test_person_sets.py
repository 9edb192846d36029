"""CUHK-PEDES, ICFG-PEDES and RSTPReid."""

import json
import os
import shutil
from collections.abc import Callable
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
    write_icfg_pedes,
    write_rstpreid,
)
from upperson.data.published import PUBLISHED_SETS, PersonSet
from upperson.data.records import Record, read_dataset
from upperson_rt.errors import InputError


def test_cuhk_pedes(tmp_path: Path) -> None:
    splits = read_dataset("cuhk-pedes", write_cuhk_pedes(tmp_path))
    images = tmp_path / "CUHK-PEDES" / "imgs"
    assert splits["train"] == [
        Record(images / "cam_a/0000.png", 1, tuple(captions_of(CROPS[0]))),
        Record(images / "cam_b/0000.png", 1, tuple(captions_of(CROPS[1]))),
        Record(images / "cam_a/0001.png", 2, tuple(captions_of(CROPS[2]))),
        Record(images / "cam_b/0001.png", 2, tuple(captions_of(CROPS[3]))),
    ]
    assert [record.pid for record in splits["val"]] == [3]
    assert [record.pid for record in splits["test"]] == [4, 4]


def test_more_than_two_captions_and_a_person_with_one_image_are_fine(tmp_path: Path) -> None:
    def change(entries: list[dict[str, Any]]) -> None:
        entries[0]["captions"].append("A third sentence.")
        del entries[1]

    folder = write_cuhk_pedes(tmp_path)
    edit_json(folder / "reid_raw.json", change)
    train = read_dataset("cuhk-pedes", folder)["train"]
    assert [len(record.captions) for record in train] == [3, 2, 2]


def test_rstpreid(tmp_path: Path) -> None:
    splits = read_dataset("rstpreid", write_rstpreid(tmp_path))
    assert splits["val"] == [
        Record(tmp_path / "RSTPReid/imgs/0002_c1_0001.jpg", 2, tuple(captions_of(CROPS[4])))
    ]
    assert [record.pid for record in splits["train"]] == [0, 0, 1, 1]


def test_ids_may_be_texts_of_digits(tmp_path: Path) -> None:
    folder = write_cuhk_pedes(tmp_path)
    whole = read_dataset("cuhk-pedes", folder)
    edit_json(
        folder / "reid_raw.json",
        lambda entries: [entry.update(id=f"{entry['id']:04d}") for entry in entries[1:]],
    )
    assert read_dataset("cuhk-pedes", folder) == whole


def test_the_file_without_splits_is_told_from_the_one_with(tmp_path: Path) -> None:
    folder = write_cuhk_pedes(tmp_path)
    (folder / "reid_raw.json").rename(folder / "caption_all.json")

    def change(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            del entry["split"]
        entries[0]["file_path"] = "Market/0001.jpg"
        entries[1]["file_path"] = "test_query/0001.jpg"

    edit_json(folder / "caption_all.json", change)
    expected = (
        f"{folder} has caption_all.json but not reid_raw.json, which holds the same captions with "
        "'split' (train, val or test) in each record, as published numbers use them: ask the "
        "authors, or a project that reports on CUHK-PEDES, for it"
    )
    lacking = f"; of the images that it names, {folder / 'imgs'} lacks Market, test_query"
    for root in (tmp_path, folder):
        with pytest.raises(InputError) as error:
            read_dataset("cuhk-pedes", root)
        assert str(error.value) == expected + lacking
    for content in ("[{", "{}", "[3]"):
        (folder / "caption_all.json").write_text(content, "utf-8")
        with pytest.raises(InputError) as error:
            read_dataset("cuhk-pedes", folder)
        assert str(error.value) == expected
    (folder / "caption_all.json").rename(folder / "reid_raw.json")
    with pytest.raises(InputError, match=r"record \[0\]: expected a JSON object"):
        read_dataset("cuhk-pedes", folder)


@pytest.mark.parametrize("file", ["ICFG-PEDES.json", "ICFG_PEDES.json"])
def test_icfg_pedes_under_both_names(tmp_path: Path, file: str) -> None:
    splits = read_dataset("icfg-pedes", write_icfg_pedes(tmp_path, file))
    images = tmp_path / "ICFG-PEDES" / "imgs"
    assert splits["val"] == []
    assert splits["test"] == [
        Record(
            images / "test/0000/0000_000_01_0303morning.jpg", 0, tuple(captions_of(CROPS[5], 1))
        ),
        Record(
            images / "test/0000/0000_001_01_0303morning.jpg", 0, tuple(captions_of(CROPS[6], 1))
        ),
    ]


def test_icfg_pedes_with_two_annotation_files(tmp_path: Path) -> None:
    folder = write_icfg_pedes(tmp_path)
    first, other = folder / "ICFG-PEDES.json", folder / "ICFG_PEDES.json"
    shutil.copy(first, other)
    assert len(read_dataset("icfg-pedes", folder)["train"]) == 4
    edit_json(other, lambda entries: entries[-1].update(id=9))
    for path in (first, other):  # Of the same size and time, and still not the same.
        os.utime(path, (1, 1))
    assert first.stat().st_size == other.stat().st_size
    with pytest.raises(InputError, match=r"ICFG-PEDES\.json and .*ICFG_PEDES\.json differ"):
        read_dataset("icfg-pedes", folder)


def test_icfg_pedes_may_count_people_again_in_test_but_not_show_an_image_twice(
    tmp_path: Path,
) -> None:
    folder = write_icfg_pedes(tmp_path)
    splits = read_dataset("icfg-pedes", folder)
    assert {record.pid for record in splits["train"]} & {record.pid for record in splits["test"]}
    edit_json(
        folder / "ICFG-PEDES.json",
        lambda entries: entries[-1].update(file_path=entries[0]["file_path"]),
    )
    with pytest.raises(InputError, match="one image is one person in one split"):
        read_dataset("icfg-pedes", folder)


@pytest.mark.parametrize("name", ["cuhk-pedes", "rstpreid"])
def test_a_person_in_two_splits_is_refused(tmp_path: Path, name: str) -> None:
    folder = WRITERS[name](tmp_path)
    edit_json(
        folder / ANNOTATION_FILES[name], lambda entries: entries[-1].update(id=entries[0]["id"])
    )
    message = r"record \[6\]: identity \d is in split 'train' and in 'test': a person seen"
    with pytest.raises(InputError, match=message):
        read_dataset(name, folder)


def test_an_image_that_is_listed_twice_is_two_records(tmp_path: Path) -> None:
    folder = write_cuhk_pedes(tmp_path)
    edit_json(folder / "reid_raw.json", lambda entries: entries.append(entries[-1]))
    test = read_dataset("cuhk-pedes", folder)["test"]
    assert len(test) == 3
    assert test[1] == test[2]


@pytest.mark.parametrize(
    "name", [name for name, found in PUBLISHED_SETS.items() if isinstance(found, PersonSet)]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"split": "train",', "not JSON in UTF-8: Expecting"),
        (b"\xff\xfe\x00", "not JSON in UTF-8"),
        ('{"train": []}', "expected a list with one object a record, found dict"),
        ("", "not JSON in UTF-8"),
        ("[" * 100_000, "not JSON in UTF-8"),
    ],
    ids=["truncated", "binary", "object", "empty", "nested"],
)
def test_a_broken_file_is_one_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = WRITERS[name](tmp_path) / ANNOTATION_FILES[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        read_dataset(name, tmp_path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def remove(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda entry: entry.pop(key)


def put(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda entry: entry.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("id"), "key 'id' is missing, found split, captions, file_path, processed_tokens"),
        (remove("file_path"), "key 'file_path' is missing"),
        (remove("split"), "key 'split' is missing"),
        (remove("captions"), "key 'captions' is missing"),
        (put(id="3a"), "'id' must be int, found '3a'"),
        (put(id="-3"), "'id' must be int, found '-3'"),
        (put(id=""), "'id' must be int, found ''"),
        (put(id="9" * 19), "does not fit 64 bits"),
        (put(id="9" * 5000), "'id' must be int, found '9999"),
        (put(id=True), "'id' must be int, found True"),
        (put(id=None), "'id' must be int, found None"),
        (put(id=2**63), "pid 9223372036854775808 does not fit 64 bits"),
        (put(id=-1), "pid -1 is negative: number people from 0"),
        (put(split="dev"), "split must be one of train, val, test, found 'dev'"),
        (put(split="x" * 500), "split must be one of train, val, test, found 'xxxxxx"),
        (put(captions="a man"), "'captions' must be list, found 'a man'"),
        (put(captions=["a man", 3]), "a caption must be a string, found 3"),
        (put(captions=[]), "the caption is empty"),
        (put(captions=["", " \n"]), "the caption is empty"),
        (put(captions=["\udc00"]), "half a surrogate pair"),
        (put(file_path="../x.png"), "image path '../x.png' leaves the data set's folder"),
        (put(file_path="a/../../x.png"), "leaves the data set's folder"),
        (put(file_path="/etc/x.png"), "leaves the data set's folder"),
        (put(file_path="."), "the image path is empty"),
        (put(file_path=["x.png"]), "'file_path' must be str"),
        (put(file_path="cam_a/0000.png", id=2), "one image is one person in one split"),
        (put(file_path="cam_a/0000.png", split="test"), "one image is one person in one split"),
    ],
)
def test_a_bad_record_is_named_by_its_index(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = write_cuhk_pedes(tmp_path)
    edit_json(folder / "reid_raw.json", lambda entries: change(entries[2]))
    with pytest.raises(InputError) as error:
        read_dataset("cuhk-pedes", folder)
    assert str(error.value).startswith(f"{folder / 'reid_raw.json'}, record [2]: ")
    assert message in str(error.value)
    assert len(str(error.value)) < 300 + len(str(folder))


@pytest.mark.parametrize("entry", [None, 3, "x", [1]])
def test_a_record_that_is_no_object_is_named(tmp_path: Path, entry: object) -> None:
    folder = write_rstpreid(tmp_path)
    edit_json(folder / "data_captions.json", lambda entries: entries.insert(1, entry))
    with pytest.raises(InputError, match=r"record \[1\]: expected a JSON object, found"):
        read_dataset("rstpreid", folder)


def test_rstpreid_does_not_take_the_other_key(tmp_path: Path) -> None:
    folder = write_rstpreid(tmp_path)
    entries = json.loads((folder / "data_captions.json").read_text("utf-8"))
    entries[0]["file_path"] = entries[0].pop("img_path")
    (folder / "data_captions.json").write_text(json.dumps(entries), "utf-8")
    with pytest.raises(InputError, match=r"record \[0\]: key 'img_path' is missing"):
        read_dataset("rstpreid", folder)
