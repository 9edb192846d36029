"""The three checks: of a file as it is written, of a run, and of a bundle."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from upperson_export.parity.comparisons import count_comparisons, iter_comparisons, make_reference
from upperson_export.parity.inputs import ParityInputs, PixelPaths
from upperson_export.parity.subjects import (
    AS_USUAL,
    FP32_TOLERANCE,
    TOLERANCE,
    BackendChoice,
    NotRun,
    Subject,
    Tolerance,
    TrainedRun,
    bundle_reference,
    export_subjects,
    folded_towers,
    iter_bundle_subjects,
    run_subject,
    torch_subject,
)
from upperson_export.parity.verdict import Judged, ParityResult, judge
from upperson_rt.agreement import compare_embeds
from upperson_rt.backends import open_backend
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_rt.tokenizer import Tokenizer
from upperson_rt.towers import Tower, run_tower


@torch.no_grad()
def require_parity(tower: nn.Module, path: Path, kind: Tower, inputs: npt.NDArray[Any]) -> None:
    """Run a plain tower and its ONNX file at batch 1, 2 and all, and insist on rounding error.

    Raises:
        InputError: The tower itself gives values that are not finite.
        IntegrityError: The file embeds otherwise; names the batch and the worst input.
    """
    backend = open_backend(path, "onnxruntime")
    for batch in dict.fromkeys((1, 2, len(inputs))):
        expected = tower(torch.from_numpy(inputs[:batch])).numpy()
        if not np.isfinite(expected).all():
            raise InputError(
                f"the {kind} tower embeds calibration samples to values that are not finite: the "
                "training diverged, or the weights are damaged; export another run"
            )
        found = compare_embeds(expected, run_tower(backend, kind, inputs[:batch]))
        if not found.agrees(max_error=TOLERANCE).all():
            raise IntegrityError(
                f"the exported {kind} tower differs from torch by {found.max_error:.2e} at batch "
                f"{batch}, input {found.worst_error} (cosine {found.min_cosine:.6f}); "
                f"expected at most {TOLERANCE:.0e}: report the versions of torch, onnxscript "
                "and onnxruntime"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityOptions:
    """How a run or a bundle is checked."""

    backends: Sequence[BackendChoice]
    batch_sizes: Sequence[int]
    asked: Tolerance = AS_USUAL
    """What replaces the usual tolerances: `max_error` that of fp32, `min_cosine` of all else."""
    threads: int | None = None
    """CPU threads a tower; None lets the library choose."""

    @property
    def fp32(self) -> Tolerance:
        """What torch and fresh fp32 files are held to."""
        error = self.asked.max_error
        return FP32_TOLERANCE if error is None else Tolerance(max_error=error)


def check_run(
    run: TrainedRun,
    inputs: ParityInputs,
    pixels: PixelPaths,
    options: ParityOptions,
    progress: Callable[[str, int, int], None],
) -> ParityResult:
    """Compare a run with its folded towers and with a fresh fp32 export on each backend.

    ``progress`` is called with (what is compared, done, total).
    """
    towers = folded_towers(run.model)
    reference = run_subject(run, options.fp32)
    folded = torch_subject("folded", towers, options.fp32)
    with tempfile.TemporaryDirectory() as folder:
        progress("exporting", 0, 1)
        exported = export_subjects(
            towers, inputs, Path(folder), options.backends, options.fp32, options.threads
        )
        subjects = [reference, folded, *exported]
        return _check(reference, subjects, inputs, pixels, options, progress)


def check_bundle(
    bundle: Bundle,
    run: TrainedRun | None,
    inputs: ParityInputs,
    pixels: PixelPaths,
    options: ParityOptions,
    progress: Callable[[str, int, int], None],
) -> ParityResult:
    """Compare every variant of a bundle on each backend, with its fp32 or with its run.

    Raises:
        IntegrityError: The bundle's tokenizer is not the run's, or the reference is broken.
    """
    subjects: Iterable[Subject | NotRun] = iter_bundle_subjects(
        bundle.path, options.backends, options.asked, options.threads
    )
    if run is None:
        reference = bundle_reference(bundle.path, options.threads)
    else:
        _require_equal_tokens(inputs.sentences, bundle.tokenizer, run.tokenizer)
        reference = run_subject(run, options.fp32)
        folded = torch_subject("folded", folded_towers(run.model), options.fp32)
        subjects = chain([reference, folded], subjects)
    return _check(reference, subjects, inputs, pixels, options, progress)


def _check(
    expected: Subject,
    subjects: Iterable[Subject | NotRun],
    inputs: ParityInputs,
    pixels: PixelPaths,
    options: ParityOptions,
    progress: Callable[[str, int, int], None],
) -> ParityResult:
    reference = make_reference(expected, inputs)
    total = count_comparisons(inputs, options.batch_sizes)
    judged: list[Judged] = []
    not_run: list[NotRun] = []
    for subject in subjects:
        if isinstance(subject, NotRun):
            not_run.append(subject)
            continue
        found = iter_comparisons(subject, reference, inputs, options.batch_sizes)
        for done, comparison in enumerate(found, start=1):
            judged.append(judge(comparison, subject.tolerance, inputs))
            progress(subject.name, done, total)
    if not judged:
        raise BackendError(f"no variant runs on any backend here: {not_run[0].reason}")
    return ParityResult(
        reference=reference.name,
        inputs=inputs,
        batch_sizes=options.batch_sizes,
        pixel_paths=pixels,
        judged=judged,
        not_run=not_run,
    )


def _require_equal_tokens(sentences: Sequence[str], bundle: Tokenizer, training: Tokenizer) -> None:
    """Raise IntegrityError if a caption has other token ids in the bundle than in training."""
    for sentence in sentences:
        found = bundle.encode([sentence]).input_ids[0].tolist()
        expected = training.encode([sentence]).input_ids[0].tolist()
        if found != expected:
            raise IntegrityError(
                f'the bundle\'s tokenizer.json gives the caption "{sentence}" the ids {found}, '
                f"training gave it {expected}: export the bundle again"
            )
