"""All comparisons together: what is worst, and what tolerance would let everything pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from upperson_export.parity.check import Comparison
from upperson_export.parity.inputs import ParityInputs
from upperson_export.parity.pixel_paths import PixelPaths
from upperson_export.parity.subjects import NotRun
from upperson_export.parity.verdict import Judged
from upperson_rt.agreement import Agreement


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
        """Return the options that would let everything pass.

        Returns:
            ``max_error`` (which fp32 is held to), ``min_cosine`` (all else) or both; None if no
            tolerance helps, or none is needed.
        """
        faults = [judged.fault for judged in self.judged if judged.fault]
        if not faults or any(fault.severity for fault in faults) or not self.pixel_paths.are_equal:
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


def _place(found: Comparison) -> str:
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
