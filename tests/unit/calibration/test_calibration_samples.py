"""Choosing and feeding calibration samples."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upperson.data.vocabulary import clip_tokenizer
from upperson_calibration.reader import BatchReader
from upperson_calibration.samples import CalibrationSet, choose_samples
from upperson_rt.errors import InputError


def choose(folder: Path, count: int, seed: int = 0) -> CalibrationSet:
    files = []
    for index in range(6):
        path = folder / f"{index}.png"
        Image.new("RGB", (20, 40), (index * 40, 0, 0)).save(path)
        files.append(path)
    texts = [f"a person with {index} bags and a hat" for index in range(9)]
    return choose_samples(
        files, texts, clip_tokenizer(), height_px=8, width_px=4, count=count, seed=seed, source="x"
    )


def test_samples_are_drawn_without_replacement_and_repeat_with_the_seed(tmp_path: Path) -> None:
    first, again, other = choose(tmp_path, 4), choose(tmp_path, 4), choose(tmp_path, 4, seed=1)
    assert first.images.shape == (4, 8, 4, 3)
    assert len(first.input_ids) == 4
    assert len({image.tobytes() for image in first.images}) == 4
    assert first.sha256 == again.sha256 != other.sha256
    assert first.describe()["images"] == 4


def test_asking_for_more_than_there_is_takes_all(tmp_path: Path) -> None:
    everything = choose(tmp_path, 100)
    assert (len(everything.images), len(everything.input_ids)) == (6, 9)


def test_no_samples_are_an_error() -> None:
    with pytest.raises(InputError, match="found 0 and 1"):
        choose_samples(
            [], ["a"], clip_tokenizer(), height_px=8, width_px=4, count=1, seed=0, source="x"
        )


def test_the_reader_feeds_every_row_once_and_cuts_text_padding() -> None:
    ids = np.zeros((5, 9), dtype=np.int32)
    for row, length in enumerate([3, 2, 4, 9, 5]):
        ids[row, :length] = row + 1
    told: list[tuple[int, int]] = []
    reader = BatchReader(
        "input_ids", ids, batch_size=2, progress=lambda done, total: told.append((done, total))
    )
    batches = []
    while (batch := reader.get_next()) is not None:
        batches.append(batch["input_ids"])
    assert [batch.shape for batch in batches] == [(2, 3), (2, 9), (1, 5)]
    assert [row[0] for batch in batches for row in batch] == [1, 2, 3, 4, 5]
    assert told == [(2, 5), (4, 5), (5, 5)]
