"""The verdict on all comparisons: what fails, what is worst, and what tolerance would pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from upperson_export.parity.check import Comparison
from upperson_export.parity.closeness import Closeness
from upperson_export.parity.inputs import ParityInputs
from upperson_export.parity.pixel_paths import PixelPaths
from upperson_export.parity.subjects import NotRun, Tolerance

SAME_COSINE = 0.999
"""Floor between an embedding in a batch and alone, where the precision has one at all: scales are
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

    comparison: Comparison
    tolerance: Tolerance
    fault: Fault | None

    @property
    def badness(self) -> tuple[float, float, float]:
        """Orders comparisons, the worst one last."""
        closest = self.comparison.to_reference
        error = closest.max_error if closest else 0.0
        fault = self.fault
        return (fault.severity if fault else -1.0, fault.excess if fault else 0.0, error)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """All that was compared."""

    reference: str
    source: str
    """Where images and captions come from."""
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
        """Return the loosened tolerances that would let everything pass.

        Returns:
            ``max_error`` or ``min_cosine`` or both; None if no tolerance helps, or none is needed.
        """
        failing = [judged for judged in self.judged if judged.fault]
        if not failing or any(judged.fault and judged.fault.severity for judged in failing):
            return None
        if not self.pixel_paths.are_equal:
            return None
        loosened = {}
        fp32 = [judged for judged in failing if judged.tolerance.max_error is not None]
        if fp32:
            loosened["max_error"] = _round_up(max(c.max_error for j in fp32 for c in _all(j)))
        less = [judged for judged in failing if judged.tolerance.min_cosine is not None]
        if less:
            loosened["min_cosine"] = _round_down(min(c.min_cosine for j in less for c in _all(j)))
        if not loosened.get("min_cosine", 1.0) > 0 or math.isinf(loosened.get("max_error", 0.0)):
            return None
        return loosened

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
        """Return the report as ``--json`` prints it; see ``docs/interface.md``."""
        worst = self.worst
        return {
            "ok": self.ok,
            "reference": self.reference,
            "source": self.source,
            "images": len(self.inputs.pixels_NHW3),
            "captions": len(self.inputs.ids),
            "batch_sizes": list(self.batch_sizes),
            "preprocessing": self.pixel_paths.as_dict(),
            "worst": worst and comparison_dict(worst),
            "would_pass": self.would_pass(),
            "comparisons": [comparison_dict(judged) for judged in self.judged],
            "not_run": [
                {"variant": n.variant, "backend": n.backend, "reason": n.reason}
                for n in self.not_run
            ],
        }


def judge(comparison: Comparison, tolerance: Tolerance, inputs: ParityInputs) -> Judged:
    """Hold a comparison to a tolerance."""
    faults = [*_structural_faults(comparison, inputs)]
    if comparison.to_reference is not None:
        faults += _closeness_faults(
            comparison, comparison.to_reference, tolerance, "the reference", inputs
        )
    if comparison.to_alone is not None:
        floor = tolerance.min_cosine
        alone = Tolerance(
            max_error=tolerance.max_error,
            min_cosine=None if floor is None else min(floor, SAME_COSINE),
        )
        faults += _closeness_faults(comparison, comparison.to_alone, alone, "itself alone", inputs)
    worst = max(faults, key=lambda fault: (fault.severity, fault.excess), default=None)
    return Judged(comparison=comparison, tolerance=tolerance, fault=worst)


def comparison_dict(judged: Judged) -> dict[str, Any]:
    """Return one comparison as ``--json`` prints it."""
    found = judged.comparison
    return {
        "variant": found.variant,
        "backend": found.backend,
        "tower": found.tower,
        "batch_size": found.batch_size,
        "inputs": found.inputs,
        "count": len(found.items),
        "to_reference": found.to_reference and found.to_reference.as_dict(),
        "to_alone": found.to_alone and found.to_alone.as_dict(),
        "ranking": found.ranking and found.ranking.as_dict(),
        "tolerance": {
            "max_error": judged.tolerance.max_error,
            "min_cosine": judged.tolerance.min_cosine,
        },
        "failure": judged.fault and judged.fault.text,
    }


def _structural_faults(found: Comparison, inputs: ParityInputs) -> list[Fault]:
    """Return what no tolerance mends."""
    if found.tower == "both":
        return []
    whole = found.inputs == "sentences"
    faults = []
    if found.not_finite is not None:
        name = inputs.item_name(found.tower, found.not_finite, sentence=whole)
        faults.append(Fault(severity=3, excess=0.0, text=f"{name} has no finite embedding"))
    if found.constant:
        faults.append(
            Fault(severity=2, excess=0.0, text=f"every {found.tower} has the same embedding")
        )
    if found.exchanged is not None:
        item, other = (inputs.item_name(found.tower, item) for item in found.exchanged)
        faults.append(Fault(severity=1, excess=0.0, text=f"{item} has the embedding of {other}"))
    return faults


def _closeness_faults(
    found: Comparison,
    closeness: Closeness,
    tolerance: Tolerance,
    expected: str,
    inputs: ParityInputs,
) -> list[Fault]:
    if found.tower == "both":
        return []
    faults = []

    def name(place: int) -> str:
        assert found.tower != "both"
        whole = found.inputs == "sentences"
        return inputs.item_name(found.tower, found.items[place], sentence=whole)

    limit = tolerance.max_error
    if limit is not None and not closeness.max_error <= limit:
        text = (
            f"{name(closeness.worst_error)} differs from {expected} by "
            f"{closeness.max_error:.2e}, expected at most {limit:.0e}"
        )
        faults.append(Fault(severity=0, excess=closeness.max_error / limit, text=text))
    floor = tolerance.min_cosine
    if floor is not None and not closeness.min_cosine >= floor:
        text = (
            f"{name(closeness.worst_cosine)} has cosine {closeness.min_cosine:.5f} to {expected}, "
            f"expected at least {floor:g}"
        )
        excess = (1 - closeness.min_cosine) / max(1 - floor, 1e-9)
        faults.append(Fault(severity=0, excess=excess, text=text))
    return faults


def _place(found: Comparison) -> str:
    inputs = {"all": "", "mixed": ", mixed lengths", "padded": ", padded to the context"}.get(
        found.inputs, f", {found.inputs}"
    )
    tokens = " tokens" if found.inputs[:1].isdigit() else ""
    return (
        f"{found.variant} on {found.backend}, {found.tower} tower, batch {found.batch_size}"
        f"{inputs}{tokens}"
    )


def _all(judged: Judged) -> list[Closeness]:
    found = judged.comparison
    return [c for c in (found.to_reference, found.to_alone) if c is not None]


def _round_up(value: float) -> float:
    """Return the next value with two digits, which as text is not smaller."""
    if not math.isfinite(value) or value <= 0:
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{(math.floor(value / step) + 1) * step:.1e}")


def _round_down(value: float) -> float:
    """Return the next lower value with four digits behind the point."""
    return (math.ceil(value * 10_000) - 1) / 10_000
