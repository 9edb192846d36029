"""The three checks, of a written file, of a run and of a bundle, and their verdict."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from upperson_export.parity.comparisons import (
    ParityComparison,
    count_comparisons,
    iter_comparisons,
    make_reference,
)
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
from upperson_rt.agreement import Agreement, compare_embeds
from upperson_rt.backends import open_backend
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_rt.tokenizer import Tokenizer
from upperson_rt.towers import Tower, run_tower

# --- Judge comparisons by their tolerance: failures, the worst one, and tolerances that would pass

SAME_COSINE = 0.999
"""Minimum cosine between an embedding in a batch and alone, for variants held to a cosine: scales
are fixed, so only values beside a quantization step may flip."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One way in which a comparison fails."""

    severity: int
    """Higher is worse; only 0 can pass with another tolerance."""
    excess: float
    """How many times the tolerance is exceeded."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A comparison, its tolerance, and its worst fault, if any."""

    comparison: ParityComparison
    tolerance: Tolerance
    fault: Fault | None

    @property
    def agreements(self) -> list[Agreement]:
        """To the reference and to the same items alone, as far as they were compared."""
        both = (self.comparison.to_reference, self.comparison.to_alone)
        return [agreement for agreement in both if agreement is not None]

    @property
    def badness(self) -> tuple[float, float, float]:
        """Sort key: the worst comparison is last."""
        closest = self.comparison.to_reference
        error = closest.max_error if closest else 0.0
        fault = self.fault
        return (fault.severity if fault else -1.0, fault.excess if fault else 0.0, error)


def judge(comparison: ParityComparison, tolerance: Tolerance, inputs: ParityInputs) -> Judged:
    """Judge a comparison by a tolerance; both towers together are only reported."""
    tower = comparison.tower
    if tower == "both":
        return Judged(comparison=comparison, tolerance=tolerance, fault=None)

    def name(item: int) -> str:
        return inputs.item_name(tower, item, sentence=comparison.inputs == "sentences")

    floor = tolerance.min_cosine
    alone = Tolerance(
        max_error=tolerance.max_error, min_cosine=None if floor is None else min(floor, SAME_COSINE)
    )
    faults = [
        *_structural_faults(comparison, name),
        *_agreement_faults(comparison, comparison.to_reference, tolerance, "the reference", name),
        *_agreement_faults(comparison, comparison.to_alone, alone, "itself alone", name),
    ]
    worst = max(faults, key=lambda fault: (fault.severity, fault.excess), default=None)
    return Judged(comparison=comparison, tolerance=tolerance, fault=worst)


def _structural_faults(found: ParityComparison, name: Callable[[int], str]) -> Iterator[Fault]:
    """Yield faults that no tolerance lets pass."""
    if found.refusal is not None:
        yield Fault(1, 0.0, found.refusal)
    if found.not_finite is not None:
        yield Fault(3, 0.0, f"{name(found.not_finite)} has no finite embedding")
    if found.constant:
        yield Fault(2, 0.0, f"every {found.tower} has the same embedding")
    if found.exchanged is not None:
        item, other = map(name, found.exchanged)
        yield Fault(1, 0.0, f"{item} has the embedding of {other}")


def _agreement_faults(
    found: ParityComparison,
    agreement: Agreement | None,
    tolerance: Tolerance,
    expected: str,
    name: Callable[[int], str],
) -> Iterator[Fault]:
    if agreement is None:
        return
    limit, floor = tolerance.max_error, tolerance.min_cosine
    if limit is not None and not agreement.agrees(max_error=limit).all():
        text = (
            f"{name(found.items[agreement.worst_error])} differs from {expected} by "
            f"{agreement.max_error:.2e}, expected at most {limit:g}"
        )
        yield Fault(0, agreement.max_error / limit, text)
    if floor is not None and not agreement.agrees(min_cosine=floor).all():
        text = (
            f"{name(found.items[agreement.worst_cosine])} has cosine {agreement.min_cosine:.5f} to "
            f"{expected}, expected at least {floor:g}"
        )
        excess = (1 - agreement.min_cosine) / max(1 - floor, 1e-9)
        yield Fault(0, excess, text)


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """Judged comparisons of all subjects."""

    reference: str
    inputs: ParityInputs
    batch_sizes: Sequence[int]
    pixel_paths: PixelPaths
    judged: Sequence[Judged]
    not_run: Sequence[NotRun]

    @property
    def worst(self) -> Judged | None:
        """The worst failing comparison."""
        failing = [judged for judged in self.judged if judged.fault]
        return max(failing, key=lambda judged: judged.badness, default=None)

    @property
    def ok(self) -> bool:
        """Whether all comparisons passed."""
        return self.worst is None and self.pixel_paths.are_equal

    def would_pass(self) -> dict[str, float] | None:
        """Return the tolerances with which all comparisons would pass.

        These are ``max_error`` (of fp32), ``min_cosine`` (of all else) or both; None if no
        tolerance helps, or none is needed.
        """
        faults = [judged.fault for judged in self.judged if judged.fault]
        if not faults or any(fault.severity for fault in faults) or not self.pixel_paths.are_equal:
            return None
        if any(agreement.not_finite for judged in self.judged for agreement in judged.agreements):
            return None
        # An option applies to all of its kind, also to those that pass their own tolerance.
        fp32 = [judged for judged in self.judged if judged.tolerance.max_error is not None]
        less = [judged for judged in self.judged if judged.tolerance.min_cosine is not None]
        loosened = {}
        if any(judged.fault for judged in fp32):
            loosened["max_error"] = _round_up(max(c.max_error for j in fp32 for c in j.agreements))
        if any(judged.fault for judged in less):
            loosened["min_cosine"] = _round_down(
                min(c.min_cosine for j in less for c in j.agreements)
            )
        return loosened if loosened.get("min_cosine", 1.0) > 0 else None

    def message(self) -> str:
        """Return the worst failure in one line, and what would pass; empty if there is none."""
        if not self.pixel_paths.are_equal:
            return self.pixel_paths.message()
        worst = self.worst
        if worst is None or worst.fault is None:
            return ""
        failing = sum(judged.fault is not None for judged in self.judged)
        loosened = self.would_pass()
        advice = "no tolerance would pass: use another backend, or export again"
        if loosened is not None:
            options = (f"--{name.replace('_', '-')} {loosened[name]:g}" for name in loosened)
            advice = f"{' '.join(options)} would pass"
        return (
            f"{_place(worst.comparison)}: {worst.fault.text} ({failing} of {len(self.judged)} "
            f"comparisons fail); {advice}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints; see ``docs/reference/formats.md``."""
        worst = self.worst
        return {
            "ok": self.ok,
            "reference": self.reference,
            "source": self.inputs.source,
            "images": len(self.inputs.pixels_NHW3),
            "captions": len(self.inputs.ids),
            "batch_sizes": list(self.batch_sizes),
            "preprocessing": {
                "equal": self.pixel_paths.are_equal,
                "max_difference_levels": self.pixel_paths.max_difference,
                "worst_image": self.pixel_paths.worst,
            },
            "worst": worst and _judged_dict(worst),
            "would_pass": self.would_pass(),
            "comparisons": [_judged_dict(judged) for judged in self.judged],
            "not_run": [asdict(one) for one in self.not_run],
        }


def _judged_dict(judged: Judged) -> dict[str, Any]:
    found = judged.comparison
    return {
        "variant": found.variant,
        "backend": found.backend,
        "tower": found.tower,
        "batch_size": found.batch_size,
        "inputs": found.inputs,
        "count": len(found.items),
        "to_reference": found.to_reference and _agreement_dict(found.to_reference),
        "to_alone": found.to_alone and _agreement_dict(found.to_alone),
        "ranking": found.ranking and asdict(found.ranking),
        "tolerance": asdict(judged.tolerance),
        "failure": judged.fault and judged.fault.text,
    }


def _agreement_dict(agreement: Agreement) -> dict[str, float | None]:
    """Return the numbers for JSON, with None for infinity."""
    return {
        "min_cosine": agreement.min_cosine,
        "p1_cosine": agreement.p1_cosine,
        "median_cosine": agreement.median_cosine,
        "max_error": agreement.max_error if math.isfinite(agreement.max_error) else None,
    }


def _place(found: ParityComparison) -> str:
    inputs = {"all": "", "mixed": ", mixed lengths", "padded": ", padded to the context"}.get(
        found.inputs, f", {found.inputs}"
    )
    tokens = " tokens" if found.inputs[:1].isdigit() else ""
    return (
        f"{found.variant} on {found.backend}, {found.tower} tower, batch {found.batch_size}"
        f"{inputs}{tokens}"
    )


def _round_up(value: float) -> float:
    """Return the next value with two digits, which as text is not smaller."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{(math.floor(value / step) + 1) * step:.1e}")


def _round_down(value: float) -> float:
    """Return the next lower value with four digits behind the point."""
    return (math.ceil(value * 10_000) - 1) / 10_000


# --- The three checks: of a file as it is written, of a run, and of a bundle


@torch.no_grad()
def require_parity(tower: nn.Module, path: Path, kind: Tower, inputs: npt.NDArray[Any]) -> None:
    """Compare a plain tower with its ONNX file at batch 1, 2 and all: rounding may differ.

    Raises:
        InputError: The tower itself gives values that are not finite.
        IntegrityError: The embeddings differ by more than `TOLERANCE`.
    """
    backend = open_backend(path, "onnxruntime")
    for batch in dict.fromkeys((1, 2, len(inputs))):
        expected = tower(torch.from_numpy(inputs[:batch])).numpy()
        if not np.isfinite(expected).all():
            raise InputError(
                f"the {kind} tower embeds calibration samples to values that are not finite: the "
                "training diverged, or the weights are damaged; export another run",
                code="embedding_not_finite",
                tower=kind,
            )
        found = compare_embeds(expected, run_tower(backend, kind, inputs[:batch]))
        if not found.agrees(max_error=TOLERANCE).all():
            raise IntegrityError(
                f"the exported {kind} tower differs from torch by {found.max_error:.2e} at batch "
                f"{batch}, input {found.worst_error} (cosine {found.min_cosine:.6f}); "
                f"expected at most {TOLERANCE:.0e}: report the versions of torch, onnxscript "
                "and onnxruntime",
                code="export_differs",
                tower=kind,
                batch=batch,
                input=found.worst_error,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityOptions:
    """Options of a check."""

    backends: Sequence[BackendChoice]
    batch_sizes: Sequence[int]
    given: Tolerance = AS_USUAL
    """Replaces the usual tolerances: `max_error` that of fp32, `min_cosine` that of all else."""
    threads: int | None = None
    """CPU threads a tower; None lets the library choose."""

    @property
    def fp32(self) -> Tolerance:
        """Tolerance of torch and of fresh fp32 files."""
        error = self.given.max_error
        return FP32_TOLERANCE if error is None else Tolerance(max_error=error)


def check_run(
    run: TrainedRun,
    inputs: ParityInputs,
    pixels: PixelPaths,
    options: ParityOptions,
    progress: Callable[[str, int, int], None],
) -> ParityResult:
    """Compare a run with its folded towers and with a fresh fp32 export on each backend.

    ``progress`` is called with (stage, done, total).
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
        bundle.path, options.backends, options.given, options.threads
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
    for sentence in sentences:
        found = bundle.encode([sentence]).input_ids[0].tolist()
        expected = training.encode([sentence]).input_ids[0].tolist()
        if found != expected:
            raise IntegrityError(
                f'the bundle\'s tokenizer.json gives the caption "{sentence}" the ids {found}, '
                f"training gave it {expected}: export the bundle again",
                code="tokenizer_differs",
            )
