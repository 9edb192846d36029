"""A toy model to compare: inputs, an embedding that is right, and the verdict on another one."""

from collections.abc import Callable

import numpy as np

from tests.helpers.toy_bundle import (
    COLOURS,
    CONTEXT_LENGTH,
    HEIGHT_PX,
    WIDTH_PX,
    draw_person,
    make_toy_tokenizer_json,
)
from upperson_export.parity.check import ParityResult, judge
from upperson_export.parity.comparisons import count_comparisons, iter_comparisons, make_reference
from upperson_export.parity.inputs import compare_pixels, read_inputs
from upperson_export.parity.subjects import FP32_TOLERANCE, Subject
from upperson_rt.tokenizer import Tokenizer

COUNT = 11
BATCH_SIZES = [1, 2, 8]
CAPTIONS = [f"a {'wo' * (n % 2)}man in a {colour} coat" for n, colour in enumerate(COLOURS)] * 2

Embed = Callable[[str, np.ndarray], np.ndarray]


def toy_tokenizer():
    return Tokenizer.from_json(make_toy_tokenizer_json(), CONTEXT_LENGTH)


def toy_parity_inputs(folder):
    colours = list(COLOURS) * 2
    files = [draw_person(folder / f"{n}.png", colours[n], seed=n) for n in range(COUNT)]
    return read_inputs(
        files, CAPTIONS[:COUNT], toy_tokenizer(), height_px=HEIGHT_PX, width_px=WIDTH_PX
    )


def honest(tower, batch):
    """Embed well: whatever the batch, and whatever the padding."""
    flat = batch.reshape(len(batch), -1).astype(np.float64)
    width = flat.shape[1]
    weights = np.random.default_rng(0).normal(size=(HEIGHT_PX * WIDTH_PX * 3, 16))[:width]
    raw = (flat / 255 - 0.5) @ weights if tower == "image" else flat @ weights
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def rotated_rows(tower, batch):
    return np.roll(honest(tower, batch), 1, axis=0)


def subject(embed, tolerance=FP32_TOLERANCE, **fields):
    return Subject(variant="fp32", backend="fake 1.0", tolerance=tolerance, run=embed, **fields)


def check(one, inputs, reference=None):
    """Compare a subject with one, by default an honest one, in batches of `BATCH_SIZES`."""
    expected = make_reference(reference or subject(honest), inputs)
    found = list(iter_comparisons(one, expected, inputs, BATCH_SIZES))
    assert len(found) == count_comparisons(inputs, BATCH_SIZES)
    return ParityResult(
        reference=expected.name,
        inputs=inputs,
        batch_sizes=BATCH_SIZES,
        pixel_paths=compare_pixels(inputs.pixels_NHW3, inputs),
        judged=[judge(comparison, one.tolerance, inputs) for comparison in found],
        not_run=[],
    )
