"""Every variant of a bundle on every backend, as the runtime loads it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from upperson_export.parity.backend_choice import BackendChoice
from upperson_export.parity.inputs import ParityInputs
from upperson_export.parity.subjects import (
    FP32_TOLERANCE,
    NotRun,
    Subject,
    Tolerance,
    open_subject,
)
from upperson_export.variants import EXACT
from upperson_rt.bundle import Bundle, read_manifest
from upperson_rt.encoder import Encoder
from upperson_rt.errors import BackendError, UsageError
from upperson_rt.manifest import VariantEntry
from upperson_rt.towers import Tower


def bundle_reference(root: Path, threads: int | None = None) -> Subject:
    """Return a bundle's fp32 on ONNX Runtime, which the rest is compared with.

    Its canaries are checked: nothing else says whether the reference itself is right.

    Raises:
        UsageError: The bundle has no such variant.
        BackendError: ONNX Runtime is missing or cannot run it.
        IntegrityError: A file differs from its hash, or a canary comes out wrong.
    """
    if EXACT not in read_manifest(root).variants:
        raise UsageError(
            f"bundle {root} has no variant {EXACT} to compare with: name the run that it was "
            "exported from with  --run RUN"
        )
    bundle = Bundle.open(root, EXACT, "onnxruntime", threads=threads)
    bundle.check_canaries()
    return _open(bundle, BackendChoice("onnxruntime", "cpu"), FP32_TOLERANCE, threads)


def iter_bundle_subjects(
    root: Path,
    backends: Sequence[BackendChoice],
    *,
    threads: int | None = None,
    max_error: float | None = None,
    min_cosine: float | None = None,
) -> Iterator[Subject | NotRun]:
    """Yield every variant of a bundle on each backend, loaded one after the other.

    Hashes are checked; canaries are not, since the report is to show all that differs.

    Args:
        root: The bundle.
        backends: See `choose_backends`.
        threads: CPU threads a tower; None lets the library choose.
        max_error: Tolerance of fp32 in place of `TOLERANCE`.
        min_cosine: Tolerance of the other precisions in place of the manifest's canary floor.

    Raises:
        BackendError: A backend that was asked for runs no variant.
        IntegrityError: A file differs from its hash.
    """
    variants = list(read_manifest(root).variants)
    for choice in backends:
        if choice.asked:
            _require_backend(root, variants, choice, threads)
    for variant in variants:
        bundle = Bundle.open(root, variant)
        tolerance = variant_tolerance(bundle.entry, max_error, min_cosine)
        for choice in backends:
            yield _try_to_open(bundle, choice, tolerance, threads)


def variant_tolerance(
    entry: VariantEntry, max_error: float | None = None, min_cosine: float | None = None
) -> Tolerance:
    """Return what a variant is held to; arguments as for `iter_bundle_subjects`."""
    if entry.precision == EXACT:
        return FP32_TOLERANCE if max_error is None else Tolerance(max_error=max_error)
    return Tolerance(min_cosine=entry.canary_min_cosine if min_cosine is None else min_cosine)


def _require_backend(
    root: Path, variants: Sequence[str], choice: BackendChoice, threads: int | None
) -> None:
    """Raise BackendError if no variant loads: before minutes of work, not after."""
    reasons = []
    for variant in variants:
        opened = _try_to_open(Bundle.open(root, variant), choice, FP32_TOLERANCE, threads)
        if isinstance(opened, Subject):
            return
        reasons.append(opened.reason)
    raise BackendError(reasons[0])


def _try_to_open(
    bundle: Bundle, choice: BackendChoice, tolerance: Tolerance, threads: int | None
) -> Subject | NotRun:
    try:
        return _open(bundle, choice, tolerance, threads)
    except BackendError as error:
        return NotRun(variant=bundle.variant, backend=choice.place, reason=str(error))


def _open(
    bundle: Bundle, choice: BackendChoice, tolerance: Tolerance, threads: int | None
) -> Subject:
    entry = bundle.entry
    paths: dict[Tower, Path] = {
        "image": bundle.path / entry.image.file,
        "text": bundle.path / entry.text.file,
    }
    subject, towers = open_subject(bundle.variant, paths, choice, tolerance, threads)
    encoder = Encoder(bundle.manifest, bundle.variant, bundle.tokenizer, towers.__getitem__)

    def encode(tower: Tower, inputs: ParityInputs, batch_size: int) -> npt.NDArray[np.float32]:
        if tower == "image":
            return encoder.encode_images(list(inputs.files), batch_size)
        return encoder.encode_texts(inputs.sentences, batch_size)

    return replace(subject, encode=encode)
