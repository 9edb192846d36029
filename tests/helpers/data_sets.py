"""Tiny data sets in the exact layouts of the published ones and of the project's own formats.

Every function writes a set below a folder and returns the folder to pass as ``--root``'s most
specific form. The people: ids as each set numbers them, one colour a person.

    train   two people with two images each
    val     one person with one image (ICFG-PEDES has no val split)
    test    one person with two images
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

SIZE = (8, 16)
"""Width and height of the images."""


class Crop(NamedTuple):
    split: str
    person: int
    view: int


CROPS = [
    *(Crop("train", person, view) for person in (0, 1) for view in (0, 1)),
    Crop("val", 2, 0),
    Crop("test", 3, 0),
    Crop("test", 3, 1),
]


def captions_of(crop: Crop, count: int = 2) -> list[str]:
    """Return the captions of a crop, each one different from all others."""
    return [f"Person {crop.person}, view {crop.view}, sentence {n}." for n in range(count)]


def write_image(path: Path, person: int = 0) -> Path:
    """Write an image that can be decoded, of a person's own colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (40 * person % 256, 90, 200)).save(path)
    return path


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def write_cuhk_pedes(parent: Path) -> Path:
    """CUHK-PEDES: ids from 1, images in folders of their sources, two captions, tokens."""
    return _write_people(
        parent / "CUHK-PEDES",
        "reid_raw.json",
        lambda crop: {
            "file_path": f"cam_{'ab'[crop.view]}/{crop.person:04d}.png",
            "processed_tokens": [text.lower().split() for text in captions_of(crop)],
            "id": crop.person + 1,
        },
    )


def write_icfg_pedes(parent: Path) -> Path:
    """ICFG-PEDES: numbers start again in test, one caption, no val split."""

    def describe(crop: Crop) -> dict[str, Any]:
        number = crop.person if crop.split == "train" else 0
        name = f"{crop.split}/{number:04d}/{number:04d}_{crop.view:03d}_01_0303morning.jpg"
        captions = captions_of(crop, 1)
        return {"file_path": name, "processed_tokens": [], "id": number, "captions": captions}

    crops = [crop for crop in CROPS if crop.split != "val"]
    return _write_people(parent / "ICFG-PEDES", "ICFG-PEDES.json", describe, crops)


def write_rstpreid(parent: Path) -> Path:
    """RSTPReid: ids from 0, flat image folder, ``img_path``."""
    return _write_people(
        parent / "RSTPReid",
        "data_captions.json",
        lambda crop: {
            "id": crop.person,
            "img_path": f"{crop.person:04d}_c{crop.view + 1}_0001.jpg",
        },
    )


def _write_people(
    folder: Path,
    file: str,
    describe: Callable[[Crop], dict[str, Any]],
    crops: Sequence[Crop] = CROPS,
) -> Path:
    entries = [
        {"split": crop.split, "captions": captions_of(crop)} | describe(crop) for crop in crops
    ]
    for crop, entry in zip(crops, entries, strict=True):
        write_image(folder / "imgs" / (entry.get("file_path") or entry["img_path"]), crop.person)
    write_json(folder / file, entries)
    return folder


def _plain_rows(folder: Path) -> list[dict[str, Any]]:
    """Write the images of the jsonl and csv sets and return their rows, one a caption."""
    rows: list[dict[str, Any]] = [
        {
            "image": f"images/{crop.person}_{crop.view}.png",
            "pid": crop.person,
            "caption": caption,
            "split": crop.split,
            "camera": f"c{crop.view}",
        }
        for crop in CROPS
        for caption in captions_of(crop)
    ]
    for row in rows:
        write_image(folder / row["image"], row["pid"])
    return rows


def write_jsonl(folder: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in _plain_rows(folder))
    (folder / "annotations.jsonl").write_text(lines, "utf-8")
    return folder


def write_csv(folder: Path) -> Path:
    rows = _plain_rows(folder)
    with (folder / "annotations.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def write_flickr30k(parent: Path) -> Path:
    """Flickr30K: ``image_id`` is a number."""
    return _write_coarse(parent / "flickr30k", "flickr30k", "flickr30k-images", "")


def write_mscoco(parent: Path) -> Path:
    """MSCOCO: ``image_id`` begins with ``coco_``."""
    return _write_coarse(parent / "MSCOCO", "coco", "val2014", "coco_")


def _write_coarse(folder: Path, prefix: str, images: str, id_prefix: str) -> Path:
    files: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for index, crop in enumerate(CROPS):
        name = f"{images}/{index:012d}.jpg"
        write_image(folder / name, crop.person)
        captions = captions_of(crop)
        if crop.split == "train":
            files["train"] += [
                {"image": name, "caption": text, "image_id": f"{id_prefix}{100 + index}"}
                for text in captions
            ]
        else:
            files[crop.split].append({"image": name, "caption": captions})
    for split, entries in files.items():
        write_json(folder / f"{prefix}_{split}.json", entries)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "cuhk-pedes": write_cuhk_pedes,
    "icfg-pedes": write_icfg_pedes,
    "rstpreid": write_rstpreid,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "flickr30k": write_flickr30k,
    "mscoco": write_mscoco,
}
"""The writer of each set, by its name for ``--dataset``."""

ANNOTATION_FILES = {
    "cuhk-pedes": "reid_raw.json",
    "icfg-pedes": "ICFG-PEDES.json",
    "rstpreid": "data_captions.json",
    "jsonl": "annotations.jsonl",
    "csv": "annotations.csv",
    "flickr30k": "flickr30k_train.json",
    "mscoco": "coco_train.json",
}
"""A file of annotations of each set, in its folder."""
