"""An engine against ONNX Runtime: the same file, the same inputs, several batch sizes and lengths.

A build can go wrong without an error: some releases of TensorRT computed transformers wrongly on
some GPUs or at some batch sizes. So no engine is used before it has been compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.agreement import require_agreement
from upperson_rt.canaries import Canaries
from upperson_rt.errors import IntegrityError
from upperson_rt.strict import Positive
from upperson_rt.tensorrt.builder import InputProfile
from upperson_rt.tokenizer import token_lengths
from upperson_rt.towers import Tower

__all__ = ["Comparison", "compare_engine"]

Run: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
"""(N, ...) inputs to (N, D) embeddings."""

_MOST_INPUTS = 16
"""Different inputs per length; larger batches repeat them, because the reference runs on a CPU."""


@dataclass(frozen=True)
class Comparison:
    """One shape on which engine and ONNX Runtime agree."""

    batch_size: Positive
    inputs: str
    """What went in, such as ``images`` or ``3 to 77 tokens``."""
    min_cosine: float
    """Cosine of the worst row."""
    max_error: float
    """Largest difference of two numbers."""


def compare_engine(
    tower: Tower,
    engine: Run,
    reference: Run,
    canaries: Canaries,
    profile: InputProfile,
    min_cosine: float,
    subject: str,
) -> list[Comparison]:
    """Compare at batch 1, 2, 7 and the largest; texts short, typical, long, and of mixed length.

    Args:
        tower: Which of the two.
        engine: Runs the engine.
        reference: Runs ONNX Runtime on the file the engine was built from.
        canaries: Inputs to start from; more are made from them.
        profile: What the engine was built for.
        min_cosine: Lowest cosine that counts as the same.
        subject: What is being compared, for messages.

    Raises:
        IntegrityError: An embedding differs, has another shape or is not finite.
    """
    count = min(profile.max[0], _MOST_INPUTS)
    found = []
    for name, inputs in _inputs(tower, canaries, profile, count):
        expected = reference(inputs)
        for batch_size in sorted({1, 2, 7, profile.max[0]}):
            if batch_size > profile.max[0]:
                continue
            # Rows change places from batch to batch: one that is right only in its place shows.
            rows = (np.arange(batch_size) + batch_size) % count
            where = f"{subject}, {tower} tower at batch {batch_size} ({name})"
            errors = _compare(engine(inputs[rows]), expected[rows], min_cosine, where)
            found.append(Comparison(batch_size, name, *errors))
    return found


def _inputs(
    tower: Tower, canaries: Canaries, profile: InputProfile, count: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    if tower == "image":
        images = canaries.images
        step = max(1, images.shape[2] // 5)
        shifted = [
            np.roll(images[i % len(images)], i // len(images) * step, axis=1) for i in range(count)
        ]
        yield "images", np.stack(shifted)
        return
    longest = profile.max[1]
    for length in sorted({min(4, longest), profile.opt[1], longest}):
        yield f"{length} tokens", _texts(canaries.input_ids, [length] * count, length)
    shortest = min(3, longest)
    lengths = np.linspace(shortest, longest, count).round().astype(int).tolist()
    yield f"{shortest} to {longest} tokens", _texts(canaries.input_ids, lengths, longest)


def _texts(canary_ids: NDArray[np.int32], lengths: list[int], padded: int) -> NDArray[np.int32]:
    """Make (N, padded) token ids: texts of the lengths given, from the words of the canaries."""
    ids = np.zeros((len(lengths), padded), np.int32)
    for row, length in enumerate(lengths):
        source = canary_ids[row % len(canary_ids)]
        source = source[: token_lengths(source[None])[0]]
        start, words, end = source[:1], source[1:-1], source[-1:]
        words = np.roll(np.resize(words if len(words) else start, max(length - 2, 0)), row)
        # The end token comes last and stays: the tower looks for it.
        ids[row, :length] = np.concatenate([start, words, end])[-length:]
    return ids


def _compare(
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    min_cosine: float,
    where: str,
) -> tuple[float, float]:
    """Return the lowest cosine and the largest difference."""
    if found.shape != expected.shape:
        raise IntegrityError(
            f"{where}: TensorRT gives embeddings of shape {found.shape}, ONNX Runtime "
            f"{expected.shape}; nothing was written"
        )
    advice = (
        "nothing was written. This TensorRT computes the graph wrongly on this GPU: update "
        "TensorRT, or compile another --variant, such as fp32"
    )
    agreement = require_agreement(
        expected,
        found,
        min_cosine,
        where=where,
        row="row",
        reference="ONNX Runtime's embedding",
        advice=advice,
    )
    return agreement.min_cosine, agreement.max_error
