"""The published person sets CUHK-PEDES, ICFG-PEDES and RSTPReid, in their usual folders.

    CUHK-PEDES/  reid_raw.json                            imgs/cam_a/..., imgs/CUHK03/..., ...
    ICFG-PEDES/  ICFG-PEDES.json or ICFG_PEDES.json       imgs/train/..., imgs/test/...
    RSTPReid/    data_captions.json                       imgs/...

The annotation file is a JSON list with one object an image:

    {"split": "train", "id": 1, "file_path": "cam_a/0001.png", "captions": ["...", "..."]}

RSTPReid says ``img_path`` for ``file_path``. Paths are relative to ``imgs/``; other keys are free.

Sources: Li et al., Person Search with Natural Language Description, CVPR 2017; Ding et al.,
Semantically Self-Aligned Network for Text-to-Image Part-aware Person Re-identification, 2021;
Zhu et al., DSSL: Deep Surroundings-person Separation Learning, MM 2021.
"""

import filecmp
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from upperson.data.annotations import (
    AnnotatedSet,
    Annotation,
    Severity,
    annotation,
    find_folder,
    load_json_list,
    object_fields,
    parse_each,
    records_of,
)
from upperson_rt.errors import InputError


@dataclass(frozen=True, slots=True)
class _Layout:
    folder: str
    files: tuple[str, ...]
    image_key: str
    id_in_two_splits: Severity


_LAYOUTS = {
    "cuhk-pedes": _Layout("CUHK-PEDES", ("reid_raw.json",), "file_path", "error"),
    # Its pictures are those of MSMT17, which counts people from 0 in train and again in test. An
    # equal number is no proof of an equal person here; an equal picture still is.
    "icfg-pedes": _Layout(
        "ICFG-PEDES", ("ICFG-PEDES.json", "ICFG_PEDES.json"), "file_path", "note"
    ),
    "rstpreid": _Layout("RSTPReid", ("data_captions.json",), "img_path", "error"),
}

PERSON_SETS = tuple(_LAYOUTS)


def open_person_set(name: str, root: Path) -> AnnotatedSet:
    """Find one of `PERSON_SETS`.

    Each entry of the file is one record, as in the official code: an image that is listed twice is
    twice in the gallery.

    Args:
        name: The set.
        root: Its folder, such as ``CUHK-PEDES``, or the folder that holds it.

    Raises:
        InputError: There is no annotation file, there are two that differ, or it is no JSON list.
    """
    layout = _LAYOUTS[name]
    folder = find_folder(root, layout.folder, layout.files)
    found = [path for file in layout.files if (path := folder / file).is_file()]
    for other in found[1:]:
        if not filecmp.cmp(found[0], other, shallow=False):
            raise InputError(
                f"{found[0]} and {other} differ, and only one can be the annotations: remove or "
                "rename the other"
            )
    entries = records_of(found[0], load_json_list(found[0]))
    return AnnotatedSet(
        files=(found[0],),
        image_folder=folder / "imgs",
        entries=parse_each(entries, partial(_parse, image_key=layout.image_key)),
        several_entries_per_image=False,
        id_in_two_splits=layout.id_in_two_splits,
    )


def _parse(where: str, entry: object, *, image_key: str) -> Annotation:
    fields = object_fields(entry, {"split": str, "id": int, image_key: str, "captions": list})
    return annotation(
        where,
        image=fields[image_key],
        pid=fields["id"],
        captions=fields["captions"],
        split=fields["split"],
    )
