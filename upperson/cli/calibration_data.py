"""Where calibration samples of an export come from: the run's data, a folder, or the renderer."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upperson.data.records import Record
from upperson.data.synthetic import SyntheticSpec, write_dataset
from upperson_calibration.samples import CalibrationSet, choose_samples
from upperson_rt.preprocess import iter_image_files

if TYPE_CHECKING:
    from upperson_rt.tokenizer import Tokenizer

RENDERER = "synthetic renderer"
"""What reports call it."""

RENDERED_VIEWS = 2


def from_records(
    records: Sequence[Record], source: str, tokenizer: "Tokenizer", **options: Any
) -> CalibrationSet:
    """Choose among a training split's pictures and captions; options as `choose_samples`."""
    return choose_samples(
        [record.image for record in records],
        [caption for record in records for caption in record.captions],
        tokenizer,
        cameras=[record.camera for record in records],
        image_source=source,
        text_source=source,
        **options,
    )


def from_folder(
    folder: Path,
    captions: Sequence[str],
    text_source: str,
    tokenizer: "Tokenizer",
    **options: Any,
) -> CalibrationSet:
    """Choose among the pictures of a folder, with captions from elsewhere."""
    return choose_samples(
        list(iter_image_files([folder])),
        captions,
        tokenizer,
        image_source=f"folder {folder.resolve().name}",
        text_source=text_source,
        **options,
    )


def from_renderer(count: int, tokenizer: "Tokenizer", **options: Any) -> CalibrationSet:
    """Render people for it: the last resort, since real cameras look otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        records = rendered_records(Path(folder) / "people", count)
        return from_records(records, RENDERER, tokenizer, count=count, **options)


def rendered_records(folder: Path, count: int) -> list[Record]:
    """Render at least ``count`` pictures of people with captions into a folder."""
    from upperson.data.records import read_dataset

    people = -(-count // RENDERED_VIEWS)
    spec = SyntheticSpec(
        look="street", train_ids=people, val_ids=0, test_ids=0, views=RENDERED_VIEWS
    )
    return read_dataset("jsonl", write_dataset(folder, spec))["train"]
