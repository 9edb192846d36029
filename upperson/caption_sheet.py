"""The caption sheet: choose crops that cover a folder, and make a page to describe them on.

Shapes: M crops, D embedding width, C candidates.
"""

import base64
import hashlib
import io
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, get_args

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from upperson.data.annotations import annotations_file
from upperson.data.records import Split, read_dataset
from upperson_rt.arguments import check_choice, check_count
from upperson_rt.encoder import Encoder, Progress
from upperson_rt.errors import InputError, UsageError
from upperson_rt.ingest.files import SkippedImage
from upperson_rt.preprocess import iter_named_images, load_image
from upperson_rt.printable import count_of, escape_for_display

PersonFrom: TypeAlias = Literal["name", "folder", "none"]
"""Where a crop's person is read from: ``name``, as in 0002_c1s1_000451_03.jpg (Market-1501,
DukeMTMC, RSTPReid); ``folder``, a folder for each person or track; ``none``. Any other crop is a
person of its own."""

TEMPLATES = Path(__file__).parent / "templates"

MOST_CROPS = 1000
"""On one page, which holds their pictures."""

_RE_IDENTIFICATION = re.compile(r"([0-9]+)_(c[0-9]+)")
_BATCH = 32
_CANDIDATES = 128
"""Compared at a time; they are drawn from far crops more often than from near ones."""
_NEAR_DUPLICATE = 0.01
"""Cosine distance up to which two crops count as the same picture."""
_RANDOM_CHOICES = 20
_PICTURE_PX = (384, 640)
"""Largest width and height of a picture on the page."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Cosine distances of the crops of a folder to their nearest chosen crop."""

    largest: float
    mean: float


@dataclass(frozen=True, slots=True)
class SheetCrop:
    """A chosen crop, and its line of the annotation file without the caption."""

    record: dict[str, str | int]
    """``image``, ``pid``, ``split`` and, if it is in the name, ``camera``."""
    jpeg: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionSheet:
    """Crops to describe."""

    folder: Path
    crops: list[SheetCrop]
    """In the order of choice: the first ones cover the folder best."""
    found: int
    """Readable crops in the folder."""
    captioned: int
    """Those that have a caption already."""
    skipped: list[SkippedImage]
    coverage: Coverage
    """Of the chosen crops, together with those captioned already."""
    random: Coverage
    """Mean over as many crops chosen at random, also with those captioned already."""
    earlier: str
    """Content of the folder's annotation file; empty without one."""


def make_sheet(
    folder: Path,
    encoder: Encoder,
    count: int,
    *,
    person_from: PersonFrom = "name",
    val_share: float = 0.2,
    progress: Progress | None = None,
) -> CaptionSheet:
    """Choose crops of a folder and its sub-folders for an operator to describe.

    An ``annotations.jsonl`` in the folder is continued: its pictures count as chosen, and people in
    it are not chosen again.

    Args:
        folder: The data set's future root.
        encoder: Embeds the crops.
        count: Crops to choose, 1 to `MOST_CROPS`; fewer if the folder has fewer people, or if all
            others are near-duplicates of chosen ones.
        person_from: See `PersonFrom`; of each person one crop is chosen.
        val_share: Share of the chosen crops that get the split val, 0 to below 1, spread evenly
            over the order of choice.
        progress: Called after each batch of embedded crops.

    Raises:
        UsageError: A value is out of range.
        InputError: The folder is missing or has no readable picture, its ``annotations.jsonl`` is
            not valid, or nothing is left to choose. Unreadable pictures among others are `skipped`.
    """
    check_count(count, "count", most=MOST_CROPS)
    check_choice(person_from, "person_from", get_args(PersonFrom))
    if not 0 <= val_share < 1:
        message = f"val_share must be at least 0 and below 1, got {val_share}"
        raise UsageError(message, code="out_of_range", what="val_share")
    if not folder.is_dir():
        message = f"expected a folder of crops, found none at {folder}"
        raise InputError(message, code="no_folder", path=str(folder))
    earlier, captioned_names, used_pids = _read_earlier(folder)
    named = list(iter_named_images([folder]))
    embeds_MD, names, skipped = _embed(encoder, named, progress)
    if not names:
        raise InputError(
            f"none of {count_of(len(named), 'picture')} in {folder} can be read, the first: "
            f"{skipped[0].reason}",
            code="no_readable_images",
            path=str(folder),
            pictures=len(named),
        )
    people, cameras = zip(*(_person_and_camera(name, person_from) for name in names), strict=True)
    people_M = np.unique(people, return_inverse=True)[1]
    captioned = [row for row, name in enumerate(names) if name in captioned_names]
    chosen = choose_crops(embeds_MD, people_M, count, captioned)
    if not chosen:
        raise InputError(
            f"every person in {folder} has a caption, or nearly equals one who has: add crops",
            code="nothing_to_choose",
            path=str(folder),
        )
    files = dict(named)
    pids = (pid for pid in itertools.count(1) if pid not in used_pids)
    crops = []
    for row, pid, split in zip(chosen, pids, _splits(val_share), strict=False):
        record = {"image": names[row], "pid": pid, "split": split, "camera": cameras[row]}
        known = {key: value for key, value in record.items() if value is not None}
        crops.append(SheetCrop(known, _jpeg(files[names[row]])))
    return CaptionSheet(
        folder=folder,
        crops=crops,
        found=len(names),
        captioned=len(captioned),
        skipped=skipped,
        coverage=_coverage(embeds_MD, [*captioned, *chosen]),
        random=_random_coverage(embeds_MD, people_M, captioned, len(chosen)),
        earlier=earlier,
    )


def choose_crops(
    embeds_MD: npt.NDArray[np.float32],
    people_M: npt.NDArray[np.int64],
    count: int,
    captioned: Sequence[int] = (),
) -> list[int]:
    """Choose crops that cover all, one of each person, and none of a captioned person.

    Each is the candidate that most reduces the sum, over all crops, of the fourth power of the
    cosine distance to the nearest chosen one. This is between k-medoids, which minimises the mean,
    and k-center, which minimises the largest distance but prefers outliers. Equal input gives an
    equal choice.

    Args:
        embeds_MD: Unit norm.
        people_M: A number for each person.
        count: Crops to choose; fewer are returned if the others are near-duplicates.
        captioned: Rows that count as chosen.

    Returns:
        Rows in the order of choice.
    """
    rng = np.random.default_rng(0)
    distance_M = _distances(embeds_MD, captioned)
    open_M = ~np.isin(people_M, people_M[list(captioned)])
    chosen: list[int] = []
    while len(chosen) < count:
        candidates_C = np.flatnonzero(open_M & (distance_M > _NEAR_DUPLICATE))
        if not len(candidates_C):
            break
        if len(candidates_C) > _CANDIDATES:
            weights_C = _fourth_power(distance_M[candidates_C]).astype(np.float64)
            drawn = rng.choice(candidates_C, _CANDIDATES, p=weights_C / weights_C.sum())
            candidates_C = np.unique(drawn)
        distance_MC = 1 - embeds_MD @ embeds_MD[candidates_C].T
        after_MC = np.minimum(distance_M[:, None], np.maximum(distance_MC, 0))
        best = int(_fourth_power(after_MC).sum(axis=0).argmin())
        chosen.append(int(candidates_C[best]))
        distance_M = after_MC[:, best]
        open_M &= people_M != people_M[chosen[-1]]
    return chosen


def render_sheet(sheet: CaptionSheet, environment: jinja2.Environment) -> str:
    """Make the page: one HTML file with pictures and script inside.

    ``environment`` finds ``caption_sheet.html.j2``, and ``page.html.j2``, which that extends.
    """
    crops = [
        {
            "record": crop.record,
            "name": escape_for_display(str(crop.record["image"])),
            "picture": f"data:image/jpeg;base64,{base64.b64encode(crop.jpeg).decode()}",
        }
        for crop in sheet.crops
    ]
    content: dict[str, Any] = {"crops": crops, "earlier": sheet.earlier}
    # The drafts of a sheet belong to its content: the same sheet made again has them, too.
    content["id"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    folder = str(sheet.folder.absolute())
    root = shlex.quote(folder)
    return environment.get_template("caption_sheet.html.j2").render(
        content=content,
        count=len(crops),
        file=annotations_file("jsonl"),
        folder=folder,
        commands=[
            f"upperson data check --dataset jsonl --root {root}",
            f"upperson train --root {root} --base ViT-B-16-quickgelu --pretrained openai "
            "--recipe cuhk-pedes --output runs/own",
        ],
        earlier=bool(sheet.earlier),
    )


def _read_earlier(folder: Path) -> tuple[str, set[str], set[int]]:
    """Return an existing annotation file's text, its image names and its person numbers."""
    file = folder / annotations_file("jsonl")
    if not file.exists():
        return "", set(), set()
    records = [record for split in read_dataset("jsonl", folder).values() for record in split]
    text = file.read_bytes().decode("utf-8-sig")  # Each line is JSON in UTF-8: just read.
    names = {record.image.relative_to(folder).as_posix() for record in records}
    return text.rstrip() + "\n" * bool(text.strip()), names, {record.pid for record in records}


def _embed(
    encoder: Encoder, named: Sequence[tuple[str, Path]], progress: Progress | None
) -> tuple[npt.NDArray[np.float32], list[str], list[SkippedImage]]:
    """Embed pictures, [M, D]; return also the names of the M readable ones, and the others."""

    def prepare(path: Path) -> npt.NDArray[np.uint8] | SkippedImage:
        try:
            return encoder.prepare_image(path)
        except InputError as error:
            return SkippedImage(str(path), str(error))

    names: list[str] = []
    skipped: list[SkippedImage] = []
    embeds = [np.empty((0, encoder.embed_dim), dtype=np.float32)]
    for start in range(0, len(named), _BATCH):
        pixels = []
        for name, path in named[start : start + _BATCH]:
            found = prepare(path)
            if isinstance(found, SkippedImage):
                skipped.append(found)
            else:
                names.append(name)
                pixels.append(found)
        if pixels:
            embeds.append(encoder.encode_pixels(np.stack(pixels), _BATCH))
        if progress is not None:
            progress(min(start + _BATCH, len(named)), len(named))
    return np.concatenate(embeds), names, skipped


def _person_and_camera(name: str, person_from: PersonFrom) -> tuple[str, str | None]:
    """Return a text that is equal for crops of one person, and the camera if it is in the name."""
    path = PurePosixPath(name)
    if person_from == "name" and (found := _RE_IDENTIFICATION.match(path.name)):
        return f"person {found[1]}", found[2]
    if person_from == "folder" and path.parent.name:
        return f"person {path.parent}", None
    return f"crop {name}", None


def _splits(val_share: float) -> Iterator[Split]:
    for number in itertools.count():
        is_val = int((number + 1) * val_share) > int(number * val_share)
        yield "val" if is_val else "train"


def _jpeg(path: Path) -> bytes:
    picture, buffer = Image.fromarray(load_image(path)), io.BytesIO()
    picture.thumbnail(_PICTURE_PX)
    picture.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def _fourth_power(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    squares: npt.NDArray[np.float32] = np.square(values)
    return np.square(squares, out=squares)


def _distances(embeds_MD: npt.NDArray[np.float32], rows: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the cosine distance of each crop to the nearest of some rows, [M]; 2 without any."""
    distance_M = np.full(len(embeds_MD), 2, dtype=np.float32)
    for start in range(0, len(rows), _CANDIDATES):
        near_MC = embeds_MD @ embeds_MD[list(rows[start : start + _CANDIDATES])].T
        distance_M = np.minimum(distance_M, 1 - near_MC.max(axis=1))
    return np.maximum(distance_M, 0)


def _coverage(embeds_MD: npt.NDArray[np.float32], rows: Sequence[int]) -> Coverage:
    distance_M = _distances(embeds_MD, rows)
    return Coverage(float(distance_M.max()), float(distance_M.mean()))


def _random_coverage(
    embeds_MD: npt.NDArray[np.float32],
    people_M: npt.NDArray[np.int64],
    captioned: Sequence[int],
    count: int,
) -> Coverage:
    """Return the mean coverage of random choices of one crop of each person."""
    rng = np.random.default_rng(0)
    open_rows = np.flatnonzero(~np.isin(people_M, people_M[list(captioned)]))
    found = []
    for _ in range(_RANDOM_CHOICES):
        order = rng.permutation(open_rows)
        _, first = np.unique(people_M[order], return_index=True)
        rows = order[np.sort(first)[:count]]
        found.append(_coverage(embeds_MD, [*captioned, *map(int, rows)]))
    return Coverage(
        float(np.mean([one.largest for one in found])), float(np.mean([one.mean for one in found]))
    )
