"""Flickr30K and MSCOCO: scenes with captions, for coarse-grained training.

    flickr30k/  flickr30k_{train,val,test}.json      images where the files say, below the folder
    MSCOCO/     coco_{train,val,test}.json

The files are JSON lists as ALBEF and BLIP distribute them. A training entry is one caption:

    {"image": "flickr30k-images/1000092795.jpg", "caption": "...", "image_id": "0"}

and an entry of val or test is one image with a list of captions under ``caption``. MSCOCO writes
``image_id`` as ``coco_9``. A split without a file is empty.

The identity is the image: its ``image_id`` in train, its running number in val and test, so that
the positives of a caption are the captions of the same picture.

Sources: Young et al., TACL 2014 (Flickr30K); Lin et al., ECCV 2014 (MSCOCO); Li et al., Align
before Fuse, NeurIPS 2021 (the files and the normalisation of captions).
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from upperson.data.annotations import (
    SPLITS,
    AnnotatedSet,
    Annotation,
    Problem,
    Split,
    annotation,
    cut,
    find_folder,
    load_json_list,
    object_fields,
    parse_each,
    records_of,
)
from upperson_rt.errors import InputError

_FOLDERS = {"flickr30k": ("flickr30k", "flickr30k"), "mscoco": ("MSCOCO", "coco")}
"""Folder, and how the names of its files begin."""

COARSE_SETS = tuple(_FOLDERS)

_DROPPED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")
_IMAGE_ID = re.compile(r"(?:coco_)?([0-9]{1,19})")


def normalise_caption(caption: str) -> str:
    """Lower the case, drop punctuation, part words at ``-`` and ``/``, collapse white space."""
    text = caption.lower().translate(_DROPPED).replace("<person>", "person")
    return " ".join(text.split())


def open_coarse_set(name: str, root: Path) -> AnnotatedSet:
    """Find one of `COARSE_SETS`.

    Args:
        name: The set.
        root: Its folder, such as ``flickr30k``, or the folder that holds it.

    Raises:
        InputError: There is no annotation file, or one is no JSON list.
    """
    folder_name, prefix = _FOLDERS[name]
    names = {split: f"{prefix}_{split}.json" for split in SPLITS}
    folder = find_folder(root, folder_name, list(names.values()))
    files = {split: folder / file for split, file in names.items() if (folder / file).is_file()}
    return AnnotatedSet(
        files=tuple(files.values()),
        image_folder=folder,
        entries=_read(files),
        several_entries_per_image=True,
        id_in_two_splits=None,
    )


def _read(files: dict[Split, Path]) -> Iterator[Annotation | Problem]:
    for split, path in files.items():
        entries = records_of(path, load_json_list(path))
        yield from parse_each(entries, partial(_parse, split=split, numbers={}))


def _parse(where: str, entry: object, *, split: Split, numbers: dict[str, int]) -> Annotation:
    """Parse an entry; ``numbers`` holds the numbers of the split's images so far."""
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
            f"'image_id' must be a number, such as 9, '9' or 'coco_9', found {cut(repr(image_id))}"
        )
    return int(match[1])
