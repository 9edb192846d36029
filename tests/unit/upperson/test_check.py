"""Checking a data set: every kind of problem, all at once."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.data_sets import (
    ANNOTATION_FILES,
    WRITERS,
    edit_json,
    write_cuhk_pedes,
    write_icfg_pedes,
    write_jsonl,
    write_rstpreid,
)
from tests.helpers.refused import refused
from upperson.data import check as check_module
from upperson.data import images
from upperson.data.annotations import Counts
from upperson.data.check import Finding, check_dataset, require_published_counts
from upperson.data.published import PUBLISHED_SETS
from upperson.data.records import DATASETS, read_dataset
from upperson_rt.errors import InputError, UsageError
from upperson_rt.preprocess import load_image

SMALL = {"train": Counts(2, 4, 8), "val": Counts(1, 1, 2), "test": Counts(1, 2, 4)}


def findings(report):
    return {finding.kind: finding for finding in report.findings}


def kinds(report):
    return {finding.kind: finding.count for finding in report.findings}


@pytest.mark.parametrize("name", DATASETS)
def test_what_the_check_calls_usable_can_be_read(tmp_path, name):
    folder = WRITERS[name](tmp_path)
    report = check_dataset(name.upper(), folder)
    assert (report.dataset, report.errors, report.images_decoded) == (name, (), True)
    expected = {"counts_differ": 2 if name == "icfg-pedes" else 3}
    if name in ("jsonl", "csv"):
        expected = {}
    if name == "icfg-pedes":
        expected["id_in_two_splits"] = 1
    assert kinds(report) == expected
    assert {split: len(records) for split, records in read_dataset(name, folder).items()} == {
        split: count.images for split, count in report.counts.items()
    }
    path = folder / ANNOTATION_FILES[name]
    if name in ("jsonl", "csv"):
        path.write_text(path.read_text("utf-8") + "\nwrong\n", "utf-8")
    else:
        edit_json(path, lambda entries: entries.append("wrong"))
    assert [error.kind for error in check_dataset(name, folder).errors] == ["broken_record"]
    with pytest.raises(InputError):
        read_dataset(name, folder)


def test_counts_are_compared_with_the_published_ones(tmp_path, monkeypatch):
    folder = write_cuhk_pedes(tmp_path)
    report = check_dataset("cuhk-pedes", tmp_path)
    assert report.files == (folder / "reid_raw.json",)
    assert report.counts == SMALL
    assert report.published == PUBLISHED_SETS["cuhk-pedes"].counts
    found = findings(report)["counts_differ"]
    assert (found.severity, found.count) == ("warning", 3)
    assert found.examples[0] == (
        "split 'train' has 2 ids (published: 11003), 4 images (published: 34054), "
        "8 captions (published: 68126)"
    )
    splits = read_dataset("cuhk-pedes", folder)
    with refused("counts_differ", InputError, dataset="cuhk-pedes"):
        require_published_counts("cuhk-pedes", tmp_path, splits)
    people = {split: count.ids for split, count in SMALL.items()}
    known = dataclasses.replace(PUBLISHED_SETS["cuhk-pedes"], outdated=people)
    monkeypatch.setitem(PUBLISHED_SETS, "cuhk-pedes", known)  # Of another release.
    assert "outdated_splits" in findings(check_dataset("cuhk-pedes", folder, decode=False))
    known = dataclasses.replace(known, counts=SMALL, outdated=None)
    monkeypatch.setitem(PUBLISHED_SETS, "cuhk-pedes", known)
    assert check_dataset("cuhk-pedes", folder).findings == ()
    require_published_counts("cuhk-pedes", tmp_path, splits)
    require_published_counts("jsonl", tmp_path, splits)


def test_a_val_split_that_was_never_published_and_the_report_as_json(tmp_path):
    folder = write_icfg_pedes(tmp_path)
    edit_json(folder / "ICFG-PEDES.json", lambda entries: entries[-1].update(split="val"))
    missing = folder / "imgs/train/0001/0001_000_01_0303morning.jpg"
    missing.unlink()
    report = check_dataset("icfg-pedes", folder)
    examples = findings(report)["counts_differ"].examples
    assert examples[1].startswith("split 'val' has 1 ids (published: 0)")
    content = report.as_dict()
    assert json.loads(json.dumps(content)) == content
    assert (content["usable"], content["files"]) == (False, [str(folder / "ICFG-PEDES.json")])
    published = {"ids": 3102, "images": 34674, "captions": 34674}
    counts = {"ids": 2, "images": 4, "captions": 4, "published": published}
    assert content["splits"]["train"] == counts
    assert content["splits"]["val"]["published"] is None
    assert content["findings"]["missing_image"]["examples"] == [str(missing)]


def test_missing_and_broken_images(tmp_path):
    folder = write_rstpreid(tmp_path)
    missing, truncated, text, directory = (
        folder / f"imgs/{name}_0001.jpg" for name in ("0000_c1", "0000_c2", "0001_c1", "0003_c1")
    )
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-10])
    text.write_text("<html>not found</html>")
    directory.unlink()
    directory.mkdir()
    report = check_dataset("rstpreid", folder)
    found = findings(report)
    assert found["missing_image"] == Finding("missing_image", "error", 1, (str(missing),))
    (example,) = found["truncated_image"].examples
    assert str(truncated) in example
    for path, example in zip((text, directory), found["broken_image"].examples, strict=True):
        assert str(path) in example
    with pytest.raises(InputError, match="truncated"):  # Pillow's switch is as it was.
        load_image(truncated)
    report = check_dataset("rstpreid", folder, decode=False)
    assert not report.images_decoded
    assert [(error.kind, error.count) for error in report.errors] == [("missing_image", 1)]


def test_an_image_whose_name_is_too_long_is_missing(tmp_path):
    write_jsonl(tmp_path)
    for long in ("[" * 3000, "y/" * 5000 + "0.jpg"):
        line = {"image": long, "pid": 1, "caption": "a man"}
        (tmp_path / "annotations.jsonl").write_text(json.dumps(line), "utf-8")
        (error,) = check_dataset("jsonl", tmp_path, decode=False).errors
        assert error.kind in ("missing_image", "missing_folder")
        (record,) = read_dataset("jsonl", tmp_path)["train"]
        with refused("images_missing", InputError) as found:
            images.require_images([record.image])
        assert len(str(found.value)) < 1000


def test_missing_folders_are_reported_before_anything_is_decoded(tmp_path):
    folder = write_cuhk_pedes(tmp_path)
    (folder / "imgs/cam_b").rename(folder / "imgs/cam_c")
    (folder / "imgs/cam_a/0002.png").unlink()
    notes = []
    report = check_dataset(
        "cuhk-pedes",
        folder,
        progress=lambda done, total: notes.append(f"{done} of {total}"),
        notify=notes.append,
    )
    missing = f"{folder / 'imgs/cam_b'}, which 3 images should be in"
    assert notes == [f"image folder missing: {missing}", "1 of 3", "2 of 3", "3 of 3"]
    assert findings(report)["missing_folder"].examples == (missing,)
    assert findings(report)["missing_image"].examples == (str(folder / "imgs/cam_a/0002.png"),)
    (folder / "imgs").rename(folder / "images")
    report = check_dataset("cuhk-pedes", folder)
    assert findings(report)["missing_folder"].examples == (
        f"{folder / 'imgs'}, which 7 images should be in",
    )
    assert not {"missing_image", "broken_image", "unlisted_image"} & kinds(report).keys()


def test_a_folder_that_cannot_be_listed_is_still_looked_into(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(folder)

    there, gone = (write_cuhk_pedes(tmp_path) / f"imgs/cam_a/000{n}.png" for n in (0, 2))
    gone.unlink()
    monkeypatch.setattr(images.os, "listdir", refuse)
    found = images.find_images([there, gone])
    assert (found.present, found.files) == ([there], [gone])


def test_an_interrupt_does_not_wait_for_the_other_images(tmp_path, monkeypatch):
    decoded, go_on = [], threading.Event()

    def load(path):
        decoded.append(path)
        assert path.name == "0.png" or go_on.wait(20)

    def interrupt(done, total):
        raise KeyboardInterrupt

    class Pool(ThreadPoolExecutor):
        """Lets images that have begun end once the others are cancelled."""

        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            go_on.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr(check_module, "load_image", load)
    monkeypatch.setattr(check_module, "ThreadPoolExecutor", Pool)
    files = [tmp_path / f"{number}.png" for number in range(400)]
    with pytest.raises(KeyboardInterrupt):
        list(check_module._broken(files, interrupt))
    assert len(decoded) < 100


def test_everything_that_is_wrong_is_found_in_one_go(tmp_path):
    def change(entries):
        entries[0]["captions"][1] = ""  # Left out, the other one stays.
        entries[1]["captions"] = ["", " "]
        entries[2]["file_path"] = "../secret.png"
        entries.append(3)
        entries.append(entries[3] | {"id": 9})  # The same image as another person.
        entries.append(entries[0] | {"captions": ["Again."]})
        entries[5]["id"] = 1  # A person of train, in test ...
        entries[6]["id"] = 1  # ... with two images: one person, reported once.

    path = write_cuhk_pedes(tmp_path) / "reid_raw.json"
    edit_json(path, change)
    calls = []
    report = check_dataset("cuhk-pedes", tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [(done, 5) for done in range(1, 6)], "an image that is listed twice once"
    found = findings(report)
    assert {kind: (finding.severity, finding.count) for kind, finding in found.items()} == {
        "broken_record": ("error", 2),
        "no_caption": ("error", 1),
        "conflicting_image": ("error", 1),
        "id_in_two_splits": ("error", 1),
        "empty_caption": ("warning", 1),
        "duplicate_record": ("warning", 1),
        "counts_differ": ("warning", 3),
        "unlisted_image": ("note", 2),  # Of the records that cannot be used.
    }
    places = [example.partition(": ")[0] for example in found["broken_record"].examples]
    assert places == [f"{path}, record [2]", f"{path}, record [7]"]
    assert found["duplicate_record"].examples == (
        f"{path}, record [9]: image 'cam_a/0000.png' is also in {path}, record [0]",
    )
    assert report.counts["train"] == Counts(2, 3, 4)
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)


def test_gaps_in_the_ids_of_train_are_a_note(tmp_path):
    def change(entries):
        for entry, pid in zip(entries[2:5], (2, 2, 90), strict=True):
            entry.update(id=pid)

    folder = write_rstpreid(tmp_path)
    edit_json(folder / "data_captions.json", change)
    report = check_dataset("rstpreid", folder, decode=False)
    assert findings(report)["unused_train_ids"].examples[0].startswith("2 ids from 0 to 2;")
    assert report.errors == ()


def test_sets_without_records_and_what_cannot_be_checked_at_all(tmp_path):
    with refused("dataset_not_found", InputError):
        check_dataset("cuhk-pedes", tmp_path)
    with refused("dataset_unknown", UsageError):
        check_dataset("market", tmp_path)
    for name, content in (("jsonl", ""), ("rstpreid", "[]")):
        folder = WRITERS[name](tmp_path)
        (folder / ANNOTATION_FILES[name]).write_text(content)
        assert [error.kind for error in check_dataset(name, folder).errors] == ["no_records"]
    (write_cuhk_pedes(tmp_path) / "reid_raw.json").write_text("[{")
    with refused("not_json", InputError):
        check_dataset("cuhk-pedes", tmp_path)
