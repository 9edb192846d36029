"""Choose calibration samples that span a data set, and record them.

For each of several features, pictures are sorted and picked at equal distances, both ends included.
So the extreme pictures of a feature, which set activation ranges, are always chosen, and a feature
keeps its distribution, which percentile, entropy and MSE estimators need. A random draw of 512 out
of 40,000 misses a given extreme picture 99 times of 100.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from upperson_rt.encoder import Progress
from upperson_rt.errors import InputError
from upperson_rt.preprocess import load_image, prepare_image
from upperson_rt.tokenizer import Tokenizer, token_lengths
from upperson_rt.towers import Tower

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of R, G and B in brightness (ITU-R BT.601)."""

CANDIDATES_PER_SAMPLE = 8
"""Pictures read for each one chosen: all of a small set, a seeded draw of a large one."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Inputs that set activation ranges."""

    images: npt.NDArray[np.uint8]
    """RGB [N, H, W, 3], of the model's size."""
    input_ids: npt.NDArray[np.int32]
    """[M, L], zero-padded to the longest."""
    image_source: str
    text_source: str

    def inputs(self, tower: Tower) -> npt.NDArray[Any]:
        """Return the inputs of a tower."""
        return self.images if tower == "image" else self.input_ids

    @property
    def image_sha256(self) -> list[str]:
        """SHA-256 of each picture's pixels at the model's size."""
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in self.images]

    @property
    def text_sha256(self) -> list[str]:
        """SHA-256 of each caption's ids without padding."""
        return [
            hashlib.sha256(np.trim_zeros(ids, "b").tobytes()).hexdigest() for ids in self.input_ids
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """Pictures to choose among."""

    files: Sequence[Path]
    source: str
    cameras: Sequence[str | None] | None = None
    """None, or a camera (or None) for each picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Captions:
    """Captions to choose among, of those pictures or of others."""

    texts: Sequence[str]
    source: str


def choose_samples(
    pictures: Pictures,
    captions: Captions,
    tokenizer: Tokenizer,
    *,
    height_px: int,
    width_px: int,
    count: int,
    seed: int,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Choose up to ``count`` pictures and as many captions that span those given.

    Pictures span brightness, contrast, two colour axes, size, shape and camera, captions their
    length in tokens: the darkest picture read and the longest caption are always chosen. More than
    ``CANDIDATES_PER_SAMPLE * count`` pictures are thinned at random first, so that large sets need
    not be decoded whole. Equal seeds give equal samples.

    Raises:
        InputError: There is no image or no text, or an image cannot be read.
    """
    files, cameras, texts = pictures.files, pictures.cameras, captions.texts
    if not files or not texts:
        raise InputError(
            f"calibration needs images and texts, found {len(files)} images in {pictures.source} "
            f"and {len(texts)} texts in {captions.source}: pass a data set with a training split",
            code="no_samples",
            images=len(files),
            texts=len(texts),
        )
    rng = np.random.default_rng(seed)
    read = np.sort(rng.permutation(len(files))[: CANDIDATES_PER_SAMPLE * count])
    features = []
    for done, row in enumerate(read, 1):
        features.append(image_features(load_image(files[row])))
        if progress is not None:
            progress(done, len(read))
    groups = None if cameras is None else [cameras[row] for row in read]
    chosen = read[cover(np.array(features), count, rng, groups)]
    # Filled in place: a list of pictures beside their stack would be all of them twice.
    images = np.empty((len(chosen), height_px, width_px, 3), np.uint8)
    for place, row in enumerate(chosen):
        images[place] = prepare_image(files[row], height_px, width_px)
    input_ids = tokenizer.encode(texts).input_ids
    lengths = token_lengths(input_ids)
    rows = cover(lengths[:, None].astype(np.float64), count, rng)
    input_ids = input_ids[rows, : lengths[rows].max()]
    return CalibrationSet(images, input_ids, pictures.source, captions.source)


def image_features(image: npt.NDArray[np.uint8]) -> tuple[float, ...]:
    """Measure one picture of its own size, uint8 RGB [H, W, 3].

    In order: brightness, contrast, red against green, blue against yellow (mean differences, 0 to
    255), number of pixels, and height / width.
    """
    height, width = image.shape[:2]
    # Means of a few thousand pixels are as good as those of all.
    step = max(1, int(np.sqrt(height * width / 4096)))
    pixels = image[::step, ::step].reshape(-1, 3).astype(np.float64)
    red, green, blue = pixels.mean(axis=0)
    luma = pixels @ LUMA
    return (
        float(luma.mean()),
        float(luma.std()),
        float(red - green),
        float(blue - (red + green) / 2),
        float(height * width),
        height / width,
    )


def cover(
    features_NF: npt.NDArray[np.float64],
    count: int,
    rng: np.random.Generator,
    groups: Sequence[str | None] | None = None,
) -> npt.NDArray[np.int64]:
    """Choose ``min(count, N)`` rows that span every feature and every group; return them sorted.

    Features have any units: only the order within a column counts. A group is a candidate's label,
    such as its camera; every label gets one row at least while ``count`` allows, the most frequent
    labels first.
    """
    total, width = features_NF.shape
    if count >= total:
        return np.arange(total)
    # The order of candidates, as they come in a file, must not decide among equal values.
    shuffled = rng.permutation(total)
    picks = []
    share = max(2, count // width)
    for column in features_NF.T:
        order = shuffled[np.argsort(column[shuffled], kind="stable")]
        places = np.linspace(0, total - 1, share).round().astype(np.int64)
        # Ends first: if the count is smaller than all shares together, extremes stay.
        picks.append(order[[*places[[0, -1]], *places[1:-1]]])
    interleaved = np.stack(picks, axis=1).reshape(-1)
    first_of_group = _one_of_each(groups, shuffled) if groups is not None else []
    wanted = np.concatenate([np.asarray(first_of_group, np.int64), interleaved, shuffled])
    _, first = np.unique(wanted, return_index=True)
    return np.sort(wanted[np.sort(first)][:count])


def _one_of_each(groups: Sequence[str | None], order: npt.NDArray[np.int64]) -> list[int]:
    members: dict[str | None, list[int]] = {}
    for row in order.tolist():
        members.setdefault(groups[row], []).append(row)
    return [rows[0] for rows in sorted(members.values(), key=len, reverse=True)]
