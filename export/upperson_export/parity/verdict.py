"""Hold one comparison to its tolerance."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from upperson_export.parity.check import Comparison
from upperson_export.parity.inputs import ParityInputs
from upperson_export.parity.subjects import Tolerance
from upperson_rt.agreement import Agreement

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


def judge(comparison: Comparison, tolerance: Tolerance, inputs: ParityInputs) -> Judged:
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


def _structural_faults(found: Comparison, name: Callable[[int], str]) -> Iterator[Fault]:
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
    found: Comparison,
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
