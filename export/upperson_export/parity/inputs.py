"""Inputs of a parity check: pictures from files, token ids of every length, and their batches.

Before any tower runs, `compare_pixels` compares the pixels of a file in training and at run time.

Shapes: N items, H image height, W image width, L tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from upperson_rt.errors import InputError
from upperson_rt.preprocess import prepare_image
from upperson_rt.tokenizer import Tokenizer, token_lengths
from upperson_rt.towers import Tower

MIN_LENGTH = 3
"""SOT, one token, EOT."""

ROUNDING_LEVELS = 0.01
"""Rounding of training's float32 normalisation, in levels of 0 to 255."""

_BUCKET_ENDS = (8, 16, 32, 64)

Layout = Literal["like", "mixed", "padded"]
"""Items of a batch: texts of like length, any texts, or any texts padded to the context."""


@dataclass(frozen=True, kw_only=True)
class ParityInputs:
    """N pictures and N texts."""

    source: str
    files: Sequence[Path]
    image_names: Sequence[str]
    pixels_NHW3: npt.NDArray[np.uint8]
    """The files as the runtime prepares them."""
    sentences: Sequence[str]
    """N captions as they are."""
    sentence_ids_NL: npt.NDArray[np.int32]
    """Their ids, as long as the context allows."""
    ids: Sequence[npt.NDArray[np.int32]]
    """N texts of `MIN_LENGTH` to `context_length` ids, made of the captions; without padding."""
    context_length: int

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of ids of each text."""
        return np.array([len(ids) for ids in self.ids])

    def count(self, tower: Tower) -> int:
        """Number of items of a tower."""
        return len(self.pixels_NHW3) if tower == "image" else len(self.ids)

    def differ(self, tower: Tower) -> bool:
        """Whether the items of a tower are not all the same."""
        if tower == "image":
            return bool(np.ptp(self.pixels_NHW3, axis=0).any())
        return len({ids.tobytes() for ids in self.ids}) > 1

    def item_name(self, tower: Tower, index: int, *, sentence: bool = False) -> str:
        """Return the name of an item in messages: a file, or a caption and its length."""
        if tower == "image":
            return f"image {self.image_names[index]}"
        text = self.sentences[index % len(self.sentences)]
        short = text if len(text) <= 40 else f"{text[:39]}\u2026"
        return f'caption {index} "{short}"' + (
            "" if sentence else f" made {len(self.ids[index])} tokens long"
        )

    def batch(
        self, tower: Tower, rows: npt.NDArray[np.int64], width: int | None = None
    ) -> npt.NDArray[np.uint8] | npt.NDArray[np.int32]:
        """Return the items of some rows; texts are padded to a width, or to the longest of them."""
        if tower == "image":
            return self.pixels_NHW3[rows]
        chosen = [self.ids[row] for row in rows]
        ids_NL = np.zeros((len(rows), width or max(map(len, chosen))), dtype=np.int32)
        for row_L, ids in zip(ids_NL, chosen, strict=True):
            row_L[: len(ids)] = ids
        return ids_NL


@dataclass(frozen=True, kw_only=True)
class Case:
    """All items of a tower in batches of one size."""

    tower: Tower
    batch_size: int
    layout: Layout
    batches: Sequence[npt.NDArray[np.int64]]
    """Indices of the items of each batch. The last one may be smaller; an item may come twice."""
    width: int | None = None
    """As in `ParityInputs.batch`."""


def read_inputs(
    files: Sequence[Path],
    captions: Sequence[str],
    tokenizer: Tokenizer,
    *,
    height_px: int,
    width_px: int,
    source: str = "",
    image_names: Sequence[str] | None = None,
) -> ParityInputs:
    """Prepare files and captions as the runtime does.

    There are as many texts as captions. Their lengths grow geometrically from `MIN_LENGTH` to the
    context; a caption is cut, or continued with the next ones, to its length.
    """
    if not files or not captions:
        raise InputError(
            f"parity needs at least one image and one caption, got {len(files)} and "
            f"{len(captions)}",
            code="nothing_to_compare",
            images=len(files),
            captions=len(captions),
        )
    sentence_ids_NL = tokenizer.encode(captions).input_ids
    pixels = [prepare_image(file, height_px, width_px) for file in files]
    return ParityInputs(
        source=source,
        files=files,
        image_names=image_names or [str(file) for file in files],
        pixels_NHW3=np.stack(pixels),
        sentences=captions,
        sentence_ids_NL=sentence_ids_NL,
        ids=_texts_of_all_lengths(sentence_ids_NL, tokenizer),
        context_length=tokenizer.context_length,
    )


def length_buckets(lengths_N: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.bool_]]:
    """Group texts by their number of tokens: name, such as ``9-16``, to mask [N]."""
    ends = [*(end for end in _BUCKET_ENDS if end < lengths_N.max()), int(lengths_N.max())]
    starts = [MIN_LENGTH, *(end + 1 for end in ends[:-1])]
    masks = {
        f"{start}-{end}": (lengths_N >= start) & (lengths_N <= end)
        for start, end in zip(starts, ends, strict=True)
    }
    return {name: mask for name, mask in masks.items() if mask.any()}


def iter_cases(inputs: ParityInputs, tower: Tower, batch_sizes: Sequence[int]) -> Iterator[Case]:
    """Yield every way to batch the items of a tower.

    Images come in a new order for each batch size. Texts come sorted by length, as the runtime
    batches them, in any order, and in any order padded to the context.
    """
    rng = np.random.default_rng(0)
    count = inputs.count(tower)
    for size in batch_sizes:
        any_order = rng.permutation(count)
        if tower == "image":
            yield Case(tower=tower, batch_size=size, layout="like", batches=_split(any_order, size))
            continue
        by_length = np.argsort(inputs.lengths, kind="stable")
        yield Case(tower=tower, batch_size=size, layout="like", batches=_split(by_length, size))
        if size > 1:
            yield Case(
                tower=tower, batch_size=size, layout="mixed", batches=_split(any_order, size)
            )
        yield Case(
            tower=tower,
            batch_size=size,
            layout="padded",
            batches=_split(any_order, size),
            width=inputs.context_length,
        )


def _split(order_N: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.int64]]:
    """Cut into batches; fewer items than one batch are repeated to fill it."""
    filled = np.resize(order_N, max(size, len(order_N)))
    return [filled[start : start + size] for start in range(0, len(filled), size)]


def _texts_of_all_lengths(
    sentence_ids_NL: npt.NDArray[np.int32], tokenizer: Tokenizer
) -> list[npt.NDArray[np.int32]]:
    ends_N = token_lengths(sentence_ids_NL) - 1
    start = [] if tokenizer.sot_id is None else [tokenizer.sot_id]
    words = [row_L[len(start) : end] for row_L, end in zip(sentence_ids_NL, ends_N, strict=True)]
    lengths = np.geomspace(MIN_LENGTH, tokenizer.context_length, len(words)).round().astype(int)
    texts = []
    for index, length in enumerate(lengths):
        stream = np.concatenate([*words[index:], *words[:index]])
        body = np.resize(stream, length - len(start) - 1)
        texts.append(np.array([*start, *body, tokenizer.eot_id], dtype=np.int32))
    return texts


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelPaths:
    """The largest difference between the two ways from file to pixels."""

    max_difference: float
    """In levels of 0 to 255."""
    worst: str

    @property
    def are_equal(self) -> bool:
        """Whether both give the same bytes."""
        return self.max_difference <= ROUNDING_LEVELS

    def message(self) -> str:
        """Return the difference in one line."""
        return (
            f"image {self.worst} becomes other pixels in training than at run time: they differ by "
            f"up to {self.max_difference:.3g} of 255 levels, expected none; install the same "
            "versions of upperson and upperson-rt, and report it"
        )


def compare_pixels(training_NHW3: npt.NDArray[Any], inputs: ParityInputs) -> PixelPaths:
    """Compare the runtime's pixels with the training's, in levels of 0 to 255.

    The training's are uint8, or floats whose normalisation has been undone.
    """
    difference = np.abs(training_NHW3.astype(np.float64) - inputs.pixels_NHW3.astype(np.float64))
    difference_N = difference.max(axis=(1, 2, 3))
    worst = int(difference_N.argmax())
    return PixelPaths(max_difference=float(difference_N[worst]), worst=inputs.image_names[worst])
