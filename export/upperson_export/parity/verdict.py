"""Hold comparisons to their tolerance: what fails, what is worst, and what would let it pass."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from upperson_export.parity.comparisons import ParityComparison
from upperson_export.parity.inputs import ParityInputs, PixelPaths
from upperson_export.parity.subjects import NotRun, Tolerance
from upperson_rt.agreement import Agreement

SAME_COSINE = 0.999
"""Floor between an embedding in a batch and alone, where the variant has one at all: scales are
fixed, so only values beside a quantization step may flip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One way in which a comparison fails."""

    severity: int
    """Higher is worse; 0 is the only one that a tolerance mends."""
    excess: float
    """How many times the tolerance is exceeded."""
    text: str
    """What is wrong with which item."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A comparison, what it is held to, and its worst fault if it has one."""

    comparison: ParityComparison
    tolerance: Tolerance
    fault: Fault | None

    @property
    def badness(self) -> tuple[float, float, float]:
        """Orders comparisons, the worst one last."""
        closest = self.comparison.to_reference
        error = closest.max_error if closest else 0.0
        fault = self.fault
        return (fault.severity if fault else -1.0, fault.excess if fault else 0.0, error)


def judge(comparison: ParityComparison, tolerance: Tolerance, inputs: ParityInputs) -> Judged:
    """Hold a comparison to a tolerance; both towers together are only reported."""
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
    """Yield what no tolerance mends."""
    if found.refusal is not None:
        yield Fault(severity=1, excess=0.0, text=found.refusal)
    if found.not_finite is not None:
        text = f"{name(found.not_finite)} has no finite embedding"
        yield Fault(severity=3, excess=0.0, text=text)
    if found.constant:
        text = f"every {found.tower} has the same embedding"
        yield Fault(severity=2, excess=0.0, text=text)
    if found.exchanged is not None:
        item, other = found.exchanged
        text = f"{name(item)} has the embedding of {name(other)}"
        yield Fault(severity=1, excess=0.0, text=text)


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
        yield Fault(severity=0, excess=agreement.max_error / limit, text=text)
    if floor is not None and not agreement.agrees(min_cosine=floor).all():
        text = (
            f"{name(found.items[agreement.worst_cosine])} has cosine {agreement.min_cosine:.5f} to "
            f"{expected}, expected at least {floor:g}"
        )
        excess = (1 - agreement.min_cosine) / max(1 - floor, 1e-9)
        yield Fault(severity=0, excess=excess, text=text)


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """All that was compared."""

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
        """Whether everything is alike."""
        return self.worst is None and self.pixel_paths.are_equal

    def would_pass(self) -> dict[str, float] | None:
        """Return the options that would let everything pass.

        Returns:
            ``max_error`` (which fp32 is held to), ``min_cosine`` (all else) or both; None if no
            tolerance helps, or none is needed.
        """
        faults = [judged.fault for judged in self.judged if judged.fault]
        if not faults or any(fault.severity for fault in faults) or not self.pixel_paths.are_equal:
            return None
        if any(agreement.not_finite for judged in self.judged for agreement in _all(judged)):
            return None
        # An option holds for all of its kind, also for those that pass their own tolerance.
        fp32 = [judged for judged in self.judged if judged.tolerance.max_error is not None]
        less = [judged for judged in self.judged if judged.tolerance.min_cosine is not None]
        loosened = {}
        if any(judged.fault for judged in fp32):
            loosened["max_error"] = _round_up(max(c.max_error for j in fp32 for c in _all(j)))
        if any(judged.fault for judged in less):
            loosened["min_cosine"] = _round_down(min(c.min_cosine for j in less for c in _all(j)))
        return loosened if loosened.get("min_cosine", 1.0) > 0 else None

    def message(self) -> str:
        """Return the worst failure in one line, and what would pass; empty if all is well."""
        if not self.pixel_paths.are_equal:
            return self.pixel_paths.message()
        worst = self.worst
        if worst is None or worst.fault is None:
            return ""
        failing = sum(judged.fault is not None for judged in self.judged)
        loosened = self.would_pass()
        advice = "no tolerance makes this right: use another backend, or export again"
        if loosened is not None:
            options = (f"--{name.replace('_', '-')} {loosened[name]:g}" for name in loosened)
            advice = f"{' '.join(options)} would pass"
        return (
            f"{_place(worst.comparison)}: {worst.fault.text} ({failing} of {len(self.judged)} "
            f"comparisons fail); {advice}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints; see ``docs/interface.md``."""
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
            "not_run": [
                {"variant": n.variant, "backend": n.backend, "reason": n.reason}
                for n in self.not_run
            ],
        }


def _judged_dict(judged: Judged) -> dict[str, Any]:
    """Return one comparison as ``--json`` prints it."""
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
        "ranking": found.ranking and found.ranking.as_dict(),
        "tolerance": {
            "max_error": judged.tolerance.max_error,
            "min_cosine": judged.tolerance.min_cosine,
        },
        "failure": judged.fault and judged.fault.text,
    }


def _agreement_dict(agreement: Agreement) -> dict[str, float | None]:
    """Return the numbers for JSON, which knows no infinity: None stands for it."""
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


def _all(judged: Judged) -> list[Agreement]:
    found = judged.comparison
    return [c for c in (found.to_reference, found.to_alone) if c is not None]


def _round_up(value: float) -> float:
    """Return the next value with two digits, which as text is not smaller."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{(math.floor(value / step) + 1) * step:.1e}")


def _round_down(value: float) -> float:
    """Return the next lower value with four digits behind the point."""
    return (math.ceil(value * 10_000) - 1) / 10_000
