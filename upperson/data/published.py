"""The published data sets in their usual folders: how they are laid out, and how large they are.

Person sets are a JSON list with one object an image, below their folder:

    CUHK-PEDES/  reid_raw.json                            imgs/cam_a/..., imgs/CUHK03/..., ...
    ICFG-PEDES/  ICFG-PEDES.json or ICFG_PEDES.json       imgs/train/..., imgs/test/...
    RSTPReid/    data_captions.json                       imgs/...

    {"split": "train", "id": 1, "file_path": "cam_a/0001.png", "captions": ["...", "..."]}

RSTPReid says ``img_path`` for ``file_path``. Paths are relative to ``imgs/``; an id may be written
as a text of digits; other keys are free. CUHK-PEDES comes with ``caption_all.json``, which has no
splits; ``reid_raw.json`` has them.

Scenes with captions, for coarse-grained training, are JSON lists as ALBEF and BLIP distribute them:

    flickr30k/  flickr30k_{train,val,test}.json      images where the files say, below the folder
    MSCOCO/     coco_{train,val,test}.json

A training entry is one caption, and an entry of val or test is one image with a list of captions
under ``caption``. MSCOCO writes ``image_id`` as ``coco_9``. A split without a file is empty.

    {"image": "flickr30k-images/1000092795.jpg", "caption": "...", "image_id": "0"}

The identity is the image: its ``image_id`` in train, its running number in val and test, so that
the positives of a caption are the captions of the same picture.

Sources: Li et al., Person Search with Natural Language Description, CVPR 2017 (CUHK-PEDES); Ding et
al., Semantically Self-Aligned Network for Text-to-Image Part-aware Person Re-identification, 2021
(ICFG-PEDES); Zhu et al., DSSL: Deep Surroundings-person Separation Learning, MM 2021 (RSTPReid);
Young et al., TACL 2014 (Flickr30K); Lin et al., ECCV 2014 (MSCOCO); Li et al., Align before Fuse,
NeurIPS 2021 (the files and the normalisation of captions); Karpathy and Fei-Fei, CVPR 2015 (the
splits that these files follow).
"""

import filecmp
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from upperson.data.annotations import (
    MOST_BYTES,
    SPLITS,
    AnnotatedSet,
    Annotation,
    Counts,
    Problem,
    Severity,
    Split,
    annotation,
    cut,
    decode_json,
    object_fields,
    parse_each,
)
from upperson_rt.errors import InputError
from upperson_rt.files import read_bounded

_DROPPED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")
_DIGITS = re.compile(r"[0-9]{1,19}")
_IMAGE_ID = re.compile(r"(?:coco_)?([0-9]{1,19})")


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonSet:
    """Crops of people, annotated in one file."""

    folder: str

    files: tuple[str, ...]
    """Names that the annotation file goes by."""

    unsplit_file: str | None = None
    """What the authors hand out: the same records with no ``split``. Of no use by itself."""

    image_key: str = "file_path"
    id_in_two_splits: Severity = "error"
    counts: Mapping[Split, Counts]
    outdated: Mapping[Split, int] | None = None
    """People in each split of an earlier release."""

    def open(self, root: Path) -> AnnotatedSet:
        """Find the set in ``root`` or in the folder of its name there.

        Each entry of the file is one record, as in the official code: an image that is listed
        twice is twice in the gallery.
        """
        folder = _find_folder(root, self.folder, self.files, self._explain_unsplit)
        found = [path for file in self.files if (path := folder / file).is_file()]
        for other in found[1:]:
            if not filecmp.cmp(found[0], other, shallow=False):
                raise InputError(
                    f"{found[0]} and {other} differ, and only one can be the annotations: remove "
                    "or rename the other",
                    code="annotations_differ",
                    path=found[0],
                    other=other,
                )
        return AnnotatedSet(
            files=(found[0],),
            image_folder=folder / "imgs",
            entries=parse_each(_entries(found[0]), self._parse),
            several_entries_per_image=False,
            id_in_two_splits=self.id_in_two_splits,
            published=self.counts,
            outdated=self.outdated,
        )

    def _explain_unsplit(self, folder: Path) -> str | None:
        """Describe what is missing where only the authors' file is in a folder."""
        if self.unsplit_file is None or not (folder / self.unsplit_file).is_file():
            return None
        wanted, path = " or ".join(self.files), folder / self.unsplit_file
        text = (
            f"{folder} has {self.unsplit_file} but not {wanted}, which holds the same captions "
            "with 'split' (train, val or test) in each record, as published numbers use them: ask "
            f"the authors, or a project that reports on {self.folder}, for it"
        )
        try:
            entries = [entry for _, entry in _entries(path) if isinstance(entry, dict)]
        except InputError:  # Whatever is wrong with it, the other file is the one to get.
            return text
        named = {str(entry.get(self.image_key, "")).partition("/")[0] for entry in entries}
        images = folder / "imgs"
        missing = sorted(name for name in named if name and not os.path.exists(images / name))
        if missing:
            text += f"; of the images that it names, {images} lacks {cut(', '.join(missing))}"
        return text

    def _parse(self, where: str, entry: object) -> Annotation:
        if isinstance(entry, dict):
            text = entry.get("id")
            if isinstance(text, str) and _DIGITS.fullmatch(text):
                entry = entry | {"id": int(text)}
        required = {"split": str, "id": int, self.image_key: str, "captions": list}
        fields = object_fields(entry, required)
        return annotation(
            where,
            image=fields[self.image_key],
            pid=fields["id"],
            captions=fields["captions"],
            split=fields["split"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSet:
    """Pictures of scenes, annotated in one file a split."""

    folder: str

    prefix: str
    """How the names of its files begin."""

    counts: Mapping[Split, Counts]
    """Published sizes; an id is an image."""

    def open(self, root: Path) -> AnnotatedSet:
        """Find the set in ``root`` or in the folder of its name there."""
        names = {split: f"{self.prefix}_{split}.json" for split in SPLITS}
        folder = _find_folder(root, self.folder, list(names.values()))
        files = {split: folder / file for split, file in names.items() if (folder / file).is_file()}
        return AnnotatedSet(
            files=tuple(files.values()),
            image_folder=folder,
            entries=self._read(files),
            several_entries_per_image=True,
            id_in_two_splits=None,
            published=self.counts,
        )

    def _read(self, files: Mapping[Split, Path]) -> Iterator[Annotation | Problem]:
        for split, path in files.items():
            numbers: dict[str, int] = {}  # Of the split's images so far.
            yield from parse_each(_entries(path), partial(_parse_scene, split, numbers))


def _counts(
    train: tuple[int, int, int],
    test: tuple[int, int, int],
    val: tuple[int, int, int] | None = None,
) -> dict[Split, Counts]:
    sizes: dict[Split, tuple[int, int, int] | None] = {"train": train, "val": val, "test": test}
    return {split: Counts(*size) for split, size in sizes.items() if size is not None}


PUBLISHED_SETS: dict[str, PersonSet | SceneSet] = {
    # Test captions are what is left of the 80440 in all.
    "cuhk-pedes": PersonSet(
        folder="CUHK-PEDES",
        files=("reid_raw.json",),
        unsplit_file="caption_all.json",
        counts=_counts((11003, 34054, 68126), test=(1000, 3074, 6156), val=(1000, 3078, 6158)),
    ),
    # 54522 images of 4102 people, one caption each, no val split. The pictures are those of MSMT17,
    # which counts people from 0 in train and again in test. An equal number is no proof of an equal
    # person here; an equal picture still is.
    "icfg-pedes": PersonSet(
        folder="ICFG-PEDES",
        files=("ICFG-PEDES.json", "ICFG_PEDES.json"),
        id_in_two_splits="note",
        counts=_counts((3102, 34674, 34674), test=(1000, 19848, 19848)),
    ),
    # 20505 images of 4101 people, five images each with two captions each.
    "rstpreid": PersonSet(
        folder="RSTPReid",
        files=("data_captions.json",),
        image_key="img_path",
        counts=_counts((3701, 18505, 37010), test=(200, 1000, 2000), val=(200, 1000, 2000)),
        outdated={"train": 3901, "val": 100, "test": 100},
    ),
    "flickr30k": SceneSet(
        folder="flickr30k",
        prefix="flickr30k",
        counts=_counts((29000, 29000, 145000), test=(1000, 1000, 5000), val=(1014, 1014, 5070)),
    ),
    "mscoco": SceneSet(
        folder="MSCOCO",
        prefix="coco",
        counts=_counts((113287, 113287, 566747), test=(5000, 5000, 25010), val=(5000, 5000, 25010)),
    ),
}


def normalise_caption(caption: str) -> str:
    """Lower the case, drop punctuation, part words at ``-`` and ``/``, collapse white space."""
    text = caption.lower().translate(_DROPPED).replace("<person>", "person")
    return " ".join(text.split())


def _parse_scene(split: Split, numbers: dict[str, int], where: str, entry: object) -> Annotation:
    if split == "train":
        fields = object_fields(entry, {"image": str, "caption": str})
        captions, pid = [fields["caption"]], _image_number(fields.get("image_id"))
    else:
        fields = object_fields(entry, {"image": str, "caption": list})
        captions, pid = fields["caption"], numbers.setdefault(fields["image"], len(numbers))
    normal = [normalise_caption(text) if isinstance(text, str) else text for text in captions]
    return annotation(where, image=fields["image"], pid=pid, captions=normal, split=split)


def _image_number(image_id: object) -> int:
    if isinstance(image_id, int) and not isinstance(image_id, bool):
        return image_id
    match = _IMAGE_ID.fullmatch(image_id) if isinstance(image_id, str) else None
    if match is None:
        raise InputError(
            f"'image_id' must be a number, such as 9, '9' or 'coco_9', found {cut(repr(image_id))}",
            code="image_id_wrong",
        )
    return int(match[1])


def _find_folder(
    root: Path,
    name: str,
    files: Sequence[str],
    explain: Callable[[Path], str | None] = lambda _: None,
) -> Path:
    """Return ``root`` or ``root/name``, the first one that holds one of the annotation files.

    Where none does, ``explain`` may know why of a folder.
    """
    folders = (root, root / name)
    for folder in folders:
        if any((folder / file).is_file() for file in files):
            return folder
    for folder in folders:
        if text := explain(folder):
            raise InputError(text, code="splits_missing", path=folder)
    others = sorted(path.name for folder in folders for path in folder.glob("*.json"))
    found = f"only {cut(', '.join(others))}" if others else "none"
    raise InputError(
        f"expected {' or '.join(files)} in {root} or {root / name}, found {found}: pass --root "
        f"with {name} or with the folder that holds it",
        code="dataset_not_found",
        path=root,
        found=found,
    )


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Return the entries of a JSON list with their places, as ``FILE, record [INDEX]`` from 0."""
    content = decode_json(read_bounded(path, MOST_BYTES), f"{path}: ")
    if not isinstance(content, list):
        raise InputError(
            f"{path}: expected a list with one object a record, found {type(content).__name__}",
            code="not_a_list",
            path=path,
            found=type(content).__name__,
        )
    return ((f"{path}, record [{index}]", entry) for index, entry in enumerate(content))
