"""Which crops are chosen to be described, and the page for it."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson.caption_sheet import TEMPLATES, choose_crops, make_sheet, render_sheet
from upperson.data.records import read_dataset
from upperson_export.made_files import templates
from upperson_rt.bundle import open_encoder
from upperson_rt.errors import InputError, UsageError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return open_encoder(make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle"), threads=1)


@pytest.fixture
def crops(tmp_path):
    """Two pictures of a person in each colour."""
    folder = tmp_path / "crops"
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for seed in range(2):
            draw_person(folder / colour / f"{seed}.png", colour, seed=seed)
    return folder


def images(sheet):
    return [crop.record["image"] for crop in sheet.crops]


def unit(rows):
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def page_content(page):
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', page)
    return json.loads(found)


def save(sheet, captions):
    """Write what the page saves when these captions have been written."""
    lines = [
        json.dumps(crop.record | {"caption": caption}) + "\n"
        for crop, caption in zip(sheet.crops, captions, strict=False)
    ]
    (sheet.folder / "annotations.jsonl").write_text(sheet.earlier + "".join(lines), "utf-8")


# --- The choice


def test_a_choice_covers_groups_of_unequal_size_better_than_random_ones():
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(12, 16))
    group = np.repeat(np.arange(12), [400, 200, 100, 50, 20, 20, 10, 10, 5, 5, 3, 2])
    embeds = unit(centres[group] + 0.1 * rng.normal(size=(len(group), 16)))
    people = np.arange(len(group))

    def distances(rows):
        return 1 - (embeds @ embeds[rows].T).max(axis=1)

    chosen = choose_crops(embeds, people, 12)
    assert len(set(chosen)) == 12
    assert set(group[chosen]) == set(range(12))
    drawn = [distances(rng.choice(len(group), 12, replace=False)) for _ in range(50)]
    assert distances(chosen).max() < min(found.max() for found in drawn)
    assert distances(chosen).mean() < min(found.mean() for found in drawn)
    assert choose_crops(embeds, people, 12) == chosen


def test_of_each_person_one_crop_is_chosen_and_near_duplicates_never():
    embeds = unit([[1, 0, 0], [0.9, 0.4, 0], [0, 1, 0], [0, 1, 0.001], [0, 0, 1]])
    people = np.array([0, 0, 1, 2, 3])
    chosen = choose_crops(embeds, people, 5)
    assert sorted(people[chosen]) in ([0, 1, 3], [0, 2, 3])
    assert choose_crops(embeds, people, 5, captioned=[1, 2]) == [4]
    assert choose_crops(embeds[:1], np.array([0]), 5, captioned=[0]) == []


# --- The sheet


def test_a_sheet_reports_a_coverage_that_is_better_than_random(crops, encoder):
    (crops / "broken.png").write_bytes(b"no picture")
    sheet = make_sheet(crops, encoder, 6)
    assert [skipped.path for skipped in sheet.skipped] == [str(crops / "broken.png")]
    assert {image.split("/")[0] for image in images(sheet)} == set(COLOURS)
    assert sheet.found == 12
    assert sheet.coverage.largest < sheet.random.largest
    assert sheet.coverage.mean < sheet.random.mean


def test_people_are_read_from_names_or_folders(tmp_path, encoder):
    names = ["a/0007_c2s1_10.png", "a/0007_c3s1_20.png", "b/0007_c1_1.png", "b/gate_20261124.png"]
    for name, colour in zip(names, COLOURS, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        draw_person(tmp_path / name, colour)
    draw_person(tmp_path / "0008.png", "black")
    cameras = dict(zip(names, ["c2", "c3", "c1"], strict=False))
    for person_from, people in (("name", 3), ("folder", 3), ("none", 5)):
        sheet = make_sheet(tmp_path, encoder, 5, person_from=person_from)
        assert len(sheet.crops) == people
        expected = cameras if person_from == "name" else {}
        for crop in sheet.crops:
            assert crop.record.get("camera") == expected.get(crop.record["image"])


def test_saved_lines_are_a_data_set_with_every_fifth_person_in_val(crops, encoder):
    halves = make_sheet(crops, encoder, 4, val_share=0.5)
    assert [crop.record["split"] for crop in halves.crops] == ["train", "val"] * 2
    sheet = make_sheet(crops, encoder, 6)
    save(sheet, [f"caption {number}" for number in range(6)])
    splits = read_dataset("jsonl", crops)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [5, 1, 0]
    found = {record.image: record.captions for split in splits.values() for record in split}
    assert found == {crops / name: (f"caption {n}",) for n, name in enumerate(images(sheet))}
    assert len({record.pid for split in splits.values() for record in split}) == 6
    assert splits["val"][0].captions == ("caption 4",)


def test_an_earlier_file_is_continued(crops, encoder):
    first = make_sheet(crops, encoder, 3, person_from="folder")
    save(first, ["one", "two"])  # The third one was skipped.
    second = make_sheet(crops, encoder, 12, person_from="folder")
    assert second.captioned == 2
    described = {name.split("/")[0] for name in images(first)[:2]}
    assert {name.split("/")[0] for name in images(second)} == set(COLOURS) - described
    assert page_content(render_sheet(second, templates(TEMPLATES)))["earlier"] == second.earlier
    save(second, ["three"] * 4)
    records = [record for split in read_dataset("jsonl", crops).values() for record in split]
    assert len({record.pid for record in records}) == len(records) == 6
    with refused("nothing_to_choose", InputError):
        make_sheet(crops, encoder, 1, person_from="folder")


def test_unusable_folders_and_values_are_refused(tmp_path, encoder):
    with refused("no_folder", InputError):
        make_sheet(tmp_path / "missing", encoder, 1)
    with refused("no_images", InputError):
        make_sheet(tmp_path, encoder, 1)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with refused("no_readable_images", InputError, pictures=1):
        make_sheet(tmp_path, encoder, 1)
    (tmp_path / "annotations.jsonl").write_text('{"image": "broken.png"}\n')
    with refused("key_missing", InputError):
        make_sheet(tmp_path, encoder, 1)
    with refused("out_of_range", UsageError, what="count"):
        make_sheet(tmp_path, encoder, 0)
    with refused("out_of_range", UsageError, what="val_share"):
        make_sheet(tmp_path, encoder, 1, val_share=1.0)


# --- The page


def test_names_are_exact_in_the_data_and_escaped_in_the_page(tmp_path, encoder):
    names = [
        "<b> \"&' .png", "<!--<script>.png", "turned\u202e.png", "bytes\udce9.png", "line\n.png"
    ]  # fmt: skip
    for name, colour in zip(names, COLOURS, strict=False):
        draw_person(tmp_path / "plain.png", colour)
        shutil.move(tmp_path / "plain.png", tmp_path / name)
    sheet = make_sheet(tmp_path, encoder, 9)
    page = render_sheet(sheet, templates(TEMPLATES))
    page.encode("utf-8")
    content = page_content(page)
    assert {crop["record"]["image"] for crop in content["crops"]} == set(names)
    shown = {crop["name"] for crop in content["crops"]}
    assert shown == {names[0], names[1], r"turned\u202e.png", r"bytes\udce9.png", r"line\n.png"}
    assert "<b>" not in page
    assert page.count("<script") == 2
    # The same sheet keeps its drafts, and another has its own.
    ids = [
        page_content(render_sheet(make_sheet(tmp_path, encoder, n), templates(TEMPLATES)))["id"]
        for n in (9, 3)
    ]
    assert content["id"] == ids[0] != ids[1]
    save(sheet, ["a caption"] * 5)
    found = [record.image for split in read_dataset("jsonl", tmp_path).values() for record in split]
    assert sorted(found) == sorted(tmp_path / name for name in names)
