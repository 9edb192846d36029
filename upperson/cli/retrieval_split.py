"""Records as the plain split that export measures accuracy on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upperson.data.records import Record, Split, read_dataset
from upperson.evaluate import pids_of
from upperson_rt.errors import InputError

if TYPE_CHECKING:
    from upperson_export.ladder import RetrievalSplit


def read_split(dataset: str, root: Path, split: Split) -> list[Record]:
    """Read one split of a data set; InputError if it is empty."""
    splits = read_dataset(dataset, root)
    if not splits[split]:
        found = ", ".join(f"{name} {len(records)}" for name, records in splits.items())
        raise InputError(f"{root} has no image in split '{split}' (found: {found})")
    return splits[split]


def retrieval_split(records: Sequence[Record], name: str) -> "RetrievalSplit":
    """Flatten records: every caption queries all images."""
    from upperson_export.ladder import RetrievalSplit

    caption_pids, image_pids = pids_of(records)
    return RetrievalSplit(
        name=name,
        image_files=[record.image for record in records],
        image_pids=image_pids,
        captions=[caption for record in records for caption in record.captions],
        caption_pids=caption_pids,
    )
