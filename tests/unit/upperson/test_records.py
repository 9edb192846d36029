"""Every format of data sets: the project's own two, the published ones, and what holds for all."""

import json
import logging
import os
import shutil

import pytest

from tests.helpers.data_sets import (
    ANNOTATION_FILES,
    CROPS,
    WRITERS,
    captions_of,
    edit_json,
    write_cuhk_pedes,
    write_icfg_pedes,
    write_mscoco,
    write_rstpreid,
)
from tests.helpers.refused import refused
from upperson.data.published import PUBLISHED_SETS, normalise_caption
from upperson.data.records import DATASETS, SPLITS, Record, read_dataset
from upperson_rt.errors import InputError, UsageError

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
    (tmp_path / "people.zip").write_bytes(b"PK\3\4")
    with refused("archive", InputError, kind="zip"):
        read_dataset("jsonl", tmp_path / "people.zip")
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


# --- published sets of people ---


def test_cuhk_pedes(tmp_path):
    folder = write_cuhk_pedes(tmp_path)
    splits = read_dataset("cuhk-pedes", folder)
    images = folder / "imgs"
    assert splits["train"] == [
        Record(images / f"cam_{camera}/000{person}.png", person + 1, tuple(captions_of(crop)))
        for crop, (person, camera) in zip(
            CROPS[:4], [(0, "a"), (0, "b"), (1, "a"), (1, "b")], strict=True
        )
    ]
    assert [record.pid for record in splits["val"]] == [3]
    assert [record.pid for record in splits["test"]] == [4, 4]

    # Ids may be texts of digits, an image may be listed twice, and captions may be more.
    def change(entries):
        for entry in entries[1:]:
            entry["id"] = f"{entry['id']:04d}"
        entries[0]["captions"].append("A third sentence.")
        del entries[1]
        entries.append(entries[-1])

    edit_json(folder / "reid_raw.json", change)
    changed = read_dataset("cuhk-pedes", folder)
    assert [len(record.captions) for record in changed["train"]] == [3, 2, 2]
    assert changed["val"] == splits["val"]
    assert changed["test"] == [*splits["test"], splits["test"][-1]]


def test_rstpreid(tmp_path):
    folder = write_rstpreid(tmp_path)
    path = folder / "data_captions.json"
    splits = read_dataset("rstpreid", folder)
    image = folder / "imgs/0002_c1_0001.jpg"
    assert splits["val"] == [Record(image, 2, tuple(captions_of(CROPS[4])))]
    assert [record.pid for record in splits["train"]] == [0, 0, 1, 1]
    for entry in (None, 3, "x", [1]):
        edit_json(path, lambda entries, entry=entry: entries.insert(1, entry))
        with refused("not_an_object", InputError, where=f"{path}, record [1]"):
            read_dataset("rstpreid", tmp_path)
    edit_json(path, lambda entries: entries[0].update(file_path=entries[0].pop("img_path")))
    with refused("key_missing", InputError, key="img_path"):
        read_dataset("rstpreid", folder)


def test_the_file_without_splits_is_recognised(tmp_path):
    folder = write_cuhk_pedes(tmp_path)
    (folder / "reid_raw.json").rename(folder / "caption_all.json")

    def change(entries):
        for entry in entries:
            del entry["split"]
        entries[0]["file_path"] = "Market/0001.jpg"
        entries[1]["file_path"] = "test_query/0001.jpg"

    edit_json(folder / "caption_all.json", change)
    for root in (tmp_path, folder):
        with refused("splits_missing", InputError, path=folder) as found:
            read_dataset("cuhk-pedes", root)
        assert str(found.value).endswith(f"{folder / 'imgs'} lacks Market, test_query")
    for content in ("[{", "{}", "[3]"):
        (folder / "caption_all.json").write_text(content, "utf-8")
        with refused("splits_missing", InputError) as found:
            read_dataset("cuhk-pedes", folder)
        assert "lacks" not in str(found.value)
    (folder / "caption_all.json").rename(folder / "reid_raw.json")
    with refused("not_an_object", InputError):
        read_dataset("cuhk-pedes", folder)


def test_icfg_pedes(tmp_path):
    folder = write_icfg_pedes(tmp_path)
    first, other = folder / "ICFG-PEDES.json", folder / "ICFG_PEDES.json"
    splits = read_dataset("icfg-pedes", tmp_path)
    assert splits["val"] == []
    assert splits["test"] == [
        Record(
            folder / f"imgs/test/0000/0000_00{view}_01_0303morning.jpg",
            0,
            tuple(captions_of(CROPS[5 + view], 1)),
        )
        for view in (0, 1)
    ]
    # People are counted again in test.
    assert {record.pid for record in splits["train"]} & {record.pid for record in splits["test"]}
    first.rename(other)
    assert read_dataset("icfg-pedes", tmp_path) == splits
    shutil.copy(other, first)
    assert read_dataset("icfg-pedes", folder) == splits
    edit_json(other, lambda entries: entries[-1].update(id=9))
    for path in (first, other):  # Of the same size and time, and still not the same.
        os.utime(path, (1, 1))
    assert first.stat().st_size == other.stat().st_size
    with refused("annotations_differ", InputError, path=first, other=other):
        read_dataset("icfg-pedes", folder)
    other.unlink()
    edit_json(first, lambda entries: entries[-1].update(file_path=entries[0]["file_path"]))
    with refused("conflicting_image", InputError):
        read_dataset("icfg-pedes", folder)


@pytest.mark.parametrize("name", PUBLISHED_SETS)
def test_a_broken_file_is_one_line(tmp_path, name):
    path = WRITERS[name](tmp_path) / ANNOTATION_FILES[name]
    if name in ("cuhk-pedes", "rstpreid"):
        whole = path.read_text("utf-8")
        edit_json(path, lambda entries: entries[-1].update(id=entries[0]["id"]))
        with refused("id_in_two_splits", InputError, where=f"{path}, record [6]"):
            read_dataset(name, tmp_path)
        path.write_text(whole, "utf-8")
    for content, code in (
        (b'[{"split": "train",', "not_json"),
        (b"\xff\xfe\x00", "not_json"),
        (b'{"train": []}', "not_a_list"),
        (b"[" * 100_000, "not_json"),
    ):
        path.write_bytes(content)
        with refused(code, InputError) as found:
            read_dataset(name, tmp_path)
        assert str(found.value).startswith(str(path))
        assert "\n" not in str(found.value)


BAD_RECORDS = {
    "wrong_type": [*({"id": wrong} for wrong in ("3a", "", "9" * 5000, True)), {"captions": "a"}],
    "pid_out_of_range": [{"id": "9" * 19}],
    "split_unknown": [{"split": "x" * 500}],
    "caption_not_text": [{"captions": ["a man", 3]}],
    "no_caption": [{"captions": []}, {"captions": ["", " \n"]}],
    "path_outside_folder": [{"file_path": "a/../../x.png"}],
    "conflicting_image": [{"file_path": "cam_a/0000.png", "id": 2}],
    "key_missing": ["id", "file_path", "split", "captions"],
}


def test_a_bad_record_is_named_by_its_index(tmp_path):
    path = write_cuhk_pedes(tmp_path) / "reid_raw.json"
    whole = path.read_text("utf-8")
    for code, change in ((code, one) for code, changes in BAD_RECORDS.items() for one in changes):
        entries = json.loads(whole)
        entries[2].pop(change) if isinstance(change, str) else entries[2].update(change)
        path.write_text(json.dumps(entries), "utf-8")
        with refused(code, InputError, where=f"{path}, record [2]") as found:
            read_dataset("cuhk-pedes", tmp_path)
        assert len(str(found.value)) < 300 + len(str(path))


# --- scenes ---


def test_captions_are_normalised():
    caption = '  A man, (in) *red* #c: d; ~e -\tit\'s "nice"?\n red-and-white/black <PERSON> ... '
    assert normalise_caption(caption) == "a man in red c d e its nice red and white black person"
    assert normalise_caption("Ünder 2 [brackets] & <others>") == "ünder 2 [brackets] & <others>"


@pytest.mark.parametrize("name", ["flickr30k", "mscoco"])
def test_the_identity_is_the_image_and_a_split_may_have_no_file(tmp_path, name):
    folder = WRITERS[name](tmp_path)
    images = folder / ("flickr30k-images" if name == "flickr30k" else "val2014")
    edit_json(folder / ANNOTATION_FILES[name], lambda entries: entries[0].update(image_id=100))
    splits = read_dataset(name, folder)
    assert splits["train"][:2] == [
        Record(
            images / f"00000000000{view}.jpg",
            100 + view,
            tuple(f"person 0 view {view} sentence {number}" for number in (0, 1)),
        )
        for view in (0, 1)
    ]
    assert [record.pid for record in splits["train"]] == [100, 101, 102, 103]
    assert [record.pid for record in splits["val"]] == [0]
    assert [record.pid for record in splits["test"]] == [0, 1]
    (folder / ANNOTATION_FILES[name].replace("train", "val")).unlink()
    assert read_dataset(name, folder) == splits | {"val": []}


def test_a_bad_record_of_a_scene_is_named(tmp_path):
    for split, values, code in (
        ("train", {"image_id": "coco_x"}, "image_id_wrong"),
        ("train", {"image_id": "9" * 19}, "pid_out_of_range"),
        ("train", {"image_id": "5"}, "conflicting_image"),
        ("train", {"caption": "?!"}, "no_caption"),
        ("test", {"caption": "a"}, "wrong_type"),
        ("test", {"image": "val2014/000000000000.jpg"}, "conflicting_image"),
    ):
        path = write_mscoco(tmp_path) / f"coco_{split}.json"
        edit_json(path, lambda entries, values=values: entries[0].update(values))
        with refused(code, InputError) as found:
            read_dataset("mscoco", tmp_path)
        assert str(found.value.fields["where"]).startswith(f"{path}, record [")
