"""Checking a data set: every kind of problem, all at once."""

import dataclasses
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.data_sets import (
    ANNOTATION_FILES,
    WRITERS,
    edit_json,
    write_cuhk_pedes,
    write_flickr30k,
    write_icfg_pedes,
    write_image,
    write_jsonl,
    write_rstpreid,
)
from upperson.data import check as check_module
from upperson.data import images
from upperson.data.annotations import Counts
from upperson.data.check import (
    CheckReport,
    Finding,
    check_dataset,
    require_published_counts,
)
from upperson.data.published import PUBLISHED_SETS
from upperson.data.records import DATASETS, read_dataset
from upperson_rt.errors import InputError, UsageError
from upperson_rt.preprocess import load_image


def findings(report: CheckReport) -> dict[str, Finding]:
    return {finding.kind: finding for finding in report.findings}


def kinds(report: CheckReport) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


# --- good sets ---


@pytest.mark.parametrize("name", DATASETS)
def test_a_good_set_has_no_error(tmp_path: Path, name: str) -> None:
    report = check_dataset(name, WRITERS[name](tmp_path))
    assert report.errors == ()
    expected = {"counts_differ": 2 if name == "icfg-pedes" else 3}
    if name in ("jsonl", "csv"):
        expected = {}
    if name == "icfg-pedes":
        expected["id_in_two_splits"] = 1
    assert kinds(report) == expected
    assert report.images_decoded


def test_counts_are_per_split(tmp_path: Path) -> None:
    report = check_dataset("CUHK-PEDES", write_cuhk_pedes(tmp_path).parent)
    assert report.dataset == "cuhk-pedes"
    assert report.files == (tmp_path / "CUHK-PEDES/reid_raw.json",)
    assert report.counts == {
        "train": Counts(2, 4, 8),
        "val": Counts(1, 1, 2),
        "test": Counts(1, 2, 4),
    }
    assert report.published == PUBLISHED_SETS["cuhk-pedes"].counts
    assert findings(report)["counts_differ"] == Finding(
        "counts_differ",
        "warning",
        3,
        (
            "split 'train' has 2 ids (published: 11003), 4 images (published: 34054), "
            "8 captions (published: 68126)",
            "split 'val' has 1 ids (published: 1000), 1 images (published: 3078), "
            "2 captions (published: 6158)",
            "split 'test' has 1 ids (published: 1000), 2 images (published: 3074), "
            "4 captions (published: 6156)",
        ),
    )


def test_published_counts_add_up() -> None:
    totals = {
        name: tuple(map(sum, zip(*published.counts.values(), strict=True)))
        for name, published in PUBLISHED_SETS.items()
    }
    assert totals["cuhk-pedes"] == (13003, 40206, 80440)
    assert totals["icfg-pedes"] == (4102, 54522, 54522)
    assert totals["rstpreid"] == (4101, 20505, 41010)


def test_counts_as_published_are_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": Counts(2, 4, 8), "val": Counts(1, 1, 2), "test": Counts(1, 2, 4)}
    small = dataclasses.replace(PUBLISHED_SETS["rstpreid"], counts=splits)
    monkeypatch.setitem(PUBLISHED_SETS, "rstpreid", small)
    assert check_dataset("rstpreid", write_rstpreid(tmp_path)).findings == ()


def test_a_val_split_that_was_never_published_is_told(tmp_path: Path) -> None:
    folder = write_icfg_pedes(tmp_path)
    edit_json(folder / "ICFG-PEDES.json", lambda entries: entries[-1].update(split="val"))
    examples = findings(check_dataset("icfg-pedes", folder))["counts_differ"].examples
    assert examples[1] == (
        "split 'val' has 1 ids (published: 0), 1 images (published: 0), 1 captions (published: 0)"
    )


# --- images ---


def test_missing_and_broken_images(tmp_path: Path) -> None:
    folder = write_rstpreid(tmp_path)
    images = folder / "imgs"
    missing, truncated, text, directory = (
        images / f"{name}_0001.jpg" for name in ("0000_c1", "0000_c2", "0001_c1", "0003_c1")
    )
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-10])
    text.write_text("<html>not found</html>")
    directory.unlink()
    directory.mkdir()
    report = check_dataset("rstpreid", folder)
    found = findings(report)
    assert found["missing_image"] == Finding("missing_image", "error", 1, (str(missing),))
    assert found["truncated_image"].count == 1
    assert str(truncated) in found["truncated_image"].examples[0]
    assert "truncated" in found["truncated_image"].examples[0]
    assert found["broken_image"].count == 2
    reasons = found["broken_image"].examples
    assert f"{text}: not an image" in reasons[0]
    assert f"{directory}: not a regular file" in reasons[1]
    assert [error.kind for error in report.errors] == [
        "missing_image", "truncated_image", "broken_image"
    ]  # fmt: skip
    with pytest.raises(InputError, match="truncated"):  # Pillow's switch is as it was.
        load_image(truncated)


def test_without_decoding_only_missing_images_are_found(tmp_path: Path) -> None:
    folder = write_rstpreid(tmp_path)
    (folder / "imgs/0000_c1_0001.jpg").unlink()
    (folder / "imgs/0000_c2_0001.jpg").write_text("broken")
    report = check_dataset("rstpreid", folder, decode=False)
    assert not report.images_decoded
    assert [(error.kind, error.count) for error in report.errors] == [("missing_image", 1)]


@pytest.mark.parametrize("long", ["[" * 3000, "x" * 300 + "/0.jpg", "y/" * 5000 + "0.jpg"])
def test_an_image_whose_name_is_too_long_is_missing(tmp_path: Path, long: str) -> None:
    folder = write_cuhk_pedes(tmp_path)

    def change(entries: list[Any]) -> None:
        entries[0]["file_path"] = long

    edit_json(folder / "reid_raw.json", change)
    (error,) = check_dataset("cuhk-pedes", folder, decode=False).errors
    assert error.kind in ("missing_image", "missing_folder")
    assert error.count == 1
    assert len(error.examples[0]) < 1000
    records = read_dataset("cuhk-pedes", folder)["train"]
    with pytest.raises(InputError, match=r"^images are missing: ") as refusal:
        images.require_images(record.image for record in records)
    assert len(str(refusal.value)) < 1000


def test_no_image_folder_at_all(tmp_path: Path) -> None:
    folder = write_cuhk_pedes(tmp_path)
    (folder / "imgs").rename(folder / "images")
    report = check_dataset("cuhk-pedes", folder)
    assert findings(report)["missing_folder"] == Finding(
        "missing_folder", "error", 1, (f"{folder / 'imgs'}, which 7 images should be in",)
    )
    assert not {"missing_image", "broken_image", "unlisted_image"} & kinds(report).keys()


def test_missing_folders_are_told_before_anything_is_decoded(tmp_path: Path) -> None:
    folder = write_cuhk_pedes(tmp_path)
    (folder / "imgs/cam_b").rename(folder / "imgs/cam_c")
    (folder / "imgs/cam_a/0002.png").unlink()
    told: list[str] = []

    def progress(done: int, total: int) -> None:
        told.append(f"{done} of {total}")

    report = check_dataset("cuhk-pedes", folder, progress=progress, tell=told.append)
    missing = f"{folder / 'imgs/cam_b'}, which 3 images should be in"
    assert told == [f"image folder missing: {missing}", "1 of 3", "2 of 3", "3 of 3"]
    assert findings(report)["missing_folder"].examples == (missing,)
    assert findings(report)["missing_image"].examples == (str(folder / "imgs/cam_a/0002.png"),)


def test_a_folder_that_cannot_be_listed_is_still_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> list[str]:
        raise PermissionError(folder)

    folder = write_cuhk_pedes(tmp_path)
    (folder / "imgs/cam_a/0002.png").unlink()
    monkeypatch.setattr(images.os, "listdir", refuse)
    found = images.find_images([folder / "imgs/cam_a/0000.png", folder / "imgs/cam_a/0002.png"])
    assert found.present == [folder / "imgs/cam_a/0000.png"]
    assert found.files == [folder / "imgs/cam_a/0002.png"]


@pytest.mark.parametrize(
    ("people", "outdated"), [((3901, 100, 100), True), ((3901, 100, 99), False)]
)
def test_the_splits_of_the_first_rstpreid_are_known(
    tmp_path: Path, people: tuple[int, ...], outdated: bool
) -> None:
    folder = write_rstpreid(tmp_path)

    def change(entries: list[Any]) -> None:
        first = entries[0]
        entries.clear()
        for split, count in zip(("train", "val", "test"), people, strict=True):
            for _ in range(count):
                pid = len(entries)
                entries.append(first | {"split": split, "id": pid, "img_path": f"{pid}.jpg"})

    edit_json(folder / "data_captions.json", change)
    report = check_dataset("rstpreid", folder, decode=False)
    told = (
        "3901 people in train, 100 people in val, 100 people in test are the splits of its first "
        "release, which was replaced since"
    )
    assert ("outdated_splits" in kinds(report)) == outdated
    if outdated:
        assert findings(report)["outdated_splits"].examples == (told,)
    with pytest.raises(InputError) as error:
        require_published_counts("RSTPReid", folder, read_dataset("rstpreid", folder))
    assert (told in str(error.value)) == outdated
    assert "published: 3701" in str(error.value) or outdated
    assert "--allow-partial" in str(error.value)


def test_counts_as_published_may_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"train": Counts(2, 4, 8), "val": Counts(1, 1, 2), "test": Counts(1, 2, 4)}
    splits = read_dataset("cuhk-pedes", write_cuhk_pedes(tmp_path))
    with pytest.raises(InputError, match="split 'train' has 2 ids"):
        require_published_counts("cuhk-pedes", tmp_path, splits)
    known = dataclasses.replace(PUBLISHED_SETS["cuhk-pedes"], counts=small)
    monkeypatch.setitem(PUBLISHED_SETS, "cuhk-pedes", known)
    require_published_counts("cuhk-pedes", tmp_path, splits)
    require_published_counts("jsonl", tmp_path, splits)


def test_images_that_no_record_names_are_a_note(tmp_path: Path) -> None:
    folder = write_cuhk_pedes(tmp_path)
    extra = write_image(folder / "imgs/Market/9999.jpg")
    (folder / "imgs/readme.txt").write_text("not an image")
    report = check_dataset("cuhk-pedes", folder)
    assert findings(report)["unlisted_image"] == Finding("unlisted_image", "note", 1, (str(extra),))
    assert report.errors == ()


def test_progress_counts_every_image_once(tmp_path: Path) -> None:
    folder = write_cuhk_pedes(tmp_path)
    edit_json(folder / "reid_raw.json", lambda entries: entries.append(entries[0]))
    calls: list[tuple[int, int]] = []
    check_dataset("cuhk-pedes", folder, progress=lambda *call: calls.append(call))
    assert calls == [(done, 7) for done in range(1, 8)]


def test_an_interrupt_does_not_wait_for_the_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    go_on = threading.Event()

    def load(path: Path) -> None:
        decoded.append(path)
        if path.name != "0.png":
            assert go_on.wait(20)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    class Pool(ThreadPoolExecutor):
        """Lets images that have begun end once the others are cancelled."""

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            go_on.set()
            super().shutdown(wait=wait)

    line = {"image": "", "pid": 1, "caption": "a man"}
    names = [f"{number}.png" for number in range(400)]
    for name in names:
        (tmp_path / name).touch()
    lines = "\n".join(json.dumps(line | {"image": name}) for name in names)
    (tmp_path / "annotations.jsonl").write_text(lines, "utf-8")
    monkeypatch.setattr(check_module, "load_image", load)
    monkeypatch.setattr(check_module, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        check_dataset("jsonl", tmp_path, progress=interrupt)
    assert len(decoded) < 100


# --- records ---


def test_everything_that_is_wrong_is_found_in_one_go(tmp_path: Path) -> None:
    def change(entries: list[Any]) -> None:
        entries[0]["captions"][1] = ""  # Left out, the other one stays.
        entries[1]["captions"] = ["", " "]
        entries[2]["file_path"] = "../secret.png"
        entries.append(3)
        entries.append(entries[3] | {"id": 9})  # The same image as somebody else.
        entries.append(entries[0] | {"captions": ["Again."]})
        entries[5]["id"] = 1  # Somebody of train, in test ...
        entries[6]["id"] = 1  # ... with two images: one person, told once.

    folder = write_cuhk_pedes(tmp_path)
    edit_json(folder / "reid_raw.json", change)
    report = check_dataset("cuhk-pedes", folder)
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
    path = folder / "reid_raw.json"
    assert found["broken_record"].examples == (
        f"{path}, record [2]: image path '../secret.png' leaves the data set's folder",
        f"{path}, record [7]: expected a JSON object, found int",
    )
    assert found["duplicate_record"].examples == (
        f"{path}, record [9]: image 'cam_a/0000.png' is also in {path}, record [0]",
    )
    assert report.counts["train"] == Counts(2, 3, 4)
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)


@pytest.mark.parametrize("name", DATASETS)
def test_what_the_check_calls_usable_can_be_read(tmp_path: Path, name: str) -> None:
    folder = WRITERS[name](tmp_path)
    assert check_dataset(name, folder).errors == ()
    counts = check_dataset(name, folder).counts
    assert {split: len(records) for split, records in read_dataset(name, folder).items()} == {
        split: count.images for split, count in counts.items()
    }
    path = folder / ANNOTATION_FILES[name]
    if name in ("jsonl", "csv"):
        path.write_text(path.read_text("utf-8") + "\nwrong\n", "utf-8")
    else:
        edit_json(path, lambda entries: entries.append("wrong"))
    assert [error.kind for error in check_dataset(name, folder).errors] == ["broken_record"]
    with pytest.raises(InputError):
        read_dataset(name, folder)


def add(**values: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda line: line | values


@pytest.mark.parametrize(
    ("change", "kind", "severity"),
    [
        (add(pid=-4), "broken_record", "error"),
        (add(pid=2**64), "broken_record", "error"),
        (add(caption=""), "no_caption", "error"),
        (add(split="test", image="images/3_0.png"), "conflicting_image", "error"),
        (add(camera="c9"), "conflicting_image", "error"),
        (add(), "duplicate_record", "warning"),
    ],
)
def test_one_bad_line_of_jsonl(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], kind: str, severity: str
) -> None:
    path = write_jsonl(tmp_path) / "annotations.jsonl"
    first = json.loads(path.read_text("utf-8").splitlines()[0])
    path.write_text(path.read_text("utf-8") + json.dumps(change(first)), "utf-8")
    (finding,) = check_dataset("jsonl", tmp_path).findings
    assert (finding.kind, finding.severity, finding.count) == (kind, severity, 1)
    assert finding.examples[0].startswith(f"{path}, line 15: ")


def test_gaps_in_the_numbers_of_train_are_a_note(tmp_path: Path) -> None:
    folder = write_rstpreid(tmp_path)
    edit_json(
        folder / "data_captions.json",
        lambda entries: [entry.update(id=90) for entry in entries[2:4]],
    )
    report = check_dataset("rstpreid", folder)
    assert findings(report)["unused_train_ids"].examples == (
        "2 ids from 0 to 90; training numbers people anew",
    )
    assert report.errors == ()


def test_image_numbers_of_coarse_sets_may_have_gaps(tmp_path: Path) -> None:
    folder = write_flickr30k(tmp_path)
    edit_json(
        folder / "flickr30k_train.json",
        lambda entries: [entry.update(image_id="900") for entry in entries[:2]],
    )
    assert kinds(check_dataset("flickr30k", folder)) == {"counts_differ": 3}


@pytest.mark.parametrize(("name", "content"), [("jsonl", ""), ("rstpreid", "[]")])
def test_a_set_without_records_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    folder = WRITERS[name](tmp_path)
    (folder / ANNOTATION_FILES[name]).write_text(content)
    assert [error.kind for error in check_dataset(name, folder).errors] == ["no_records"]


def test_what_cannot_be_checked_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected reid_raw"):
        check_dataset("cuhk-pedes", tmp_path)
    with pytest.raises(UsageError, match="unknown"):
        check_dataset("market", tmp_path)
    folder = write_cuhk_pedes(tmp_path)
    (folder / "reid_raw.json").write_text("[{")
    with pytest.raises(InputError, match="not JSON"):
        check_dataset("cuhk-pedes", tmp_path)


def test_the_report_as_json(tmp_path: Path) -> None:
    folder = write_icfg_pedes(tmp_path)
    (folder / "imgs/train/0001/0001_000_01_0303morning.jpg").unlink()
    content = check_dataset("icfg-pedes", folder).as_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["usable"] is False
    assert content["files"] == [str(folder / "ICFG-PEDES.json")]
    assert content["splits"]["train"] == {
        "ids": 2,
        "images": 4,
        "captions": 4,
        "published": {"ids": 3102, "images": 34674, "captions": 34674},
    }
    assert content["splits"]["val"]["published"] is None
    assert content["findings"]["missing_image"] == {
        "severity": "error",
        "count": 1,
        "examples": [str(folder / "imgs/train/0001/0001_000_01_0303morning.jpg")],
    }
