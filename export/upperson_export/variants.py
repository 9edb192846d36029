"""The precision variants, one row each.

All that differs between variants is a column here, and no other code compares their names. A new
variant is a row, the pass that makes it, and their tests. Only `Variant.passes` needs onnx.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

from upperson_machine.int8 import PAIR_LIMIT

if TYPE_CHECKING:
    from onnx_ir.passes import InPlacePass

    from upperson_calibration.calibration_file import Smoothness

VariantName: TypeAlias = Literal["fp32", "fp16", "int8", "int8-fp16"]

EXACT: VariantName = "fp32"
"""The reference that the others are made from and compared with; every bundle has it."""

AS_RUN = "onnxruntime"
"""Measured in ONNX Runtime on a CPU, as the file is."""

SIMULATED = "onnxruntime, float16 simulated"
"""Measured with float16's range and rounding, which a CPU, computing in float32, would hide."""


@dataclass(frozen=True, slots=True)
class Int8Candidate:
    """A candidate of an int8 tower."""

    graph: "Smoothness" = "plain"
    in_float: Fraction = Fraction(0)
    """Share of the block Linears, the most sensitive ones, that stays in float, rounded up."""


INT8_CANDIDATES: Mapping[str, Int8Candidate] = {
    "plain": Int8Candidate(),
    "smoothed": Int8Candidate("smoothed"),
    "mixed-1/8": Int8Candidate("smoothed", Fraction(1, 8)),
    "mixed-1/4": Int8Candidate("smoothed", Fraction(1, 4)),
    "mixed-1/2": Int8Candidate("smoothed", Fraction(1, 2)),
}
"""From smallest to safest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    """Tensors of a tower, for passes."""

    linears: Sequence[str]
    """MatMul nodes of the block Linears that become int8."""
    amax: Mapping[str, float]
    """Activation ranges of their inputs, by tensor; empty for variants without int8."""
    largest: Mapping[str, float] | None
    """Largest absolute value observed of each float tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A precision variant, and all that depends on it."""

    name: VariantName
    float_type: Literal["f32", "f16"] = "f32"
    """Type of all that is not quantized."""
    quantized: Literal["INT8"] | None = None
    """ONNX type of the weights of block Linears; None: a float type."""
    candidates: tuple[str, ...]
    """Candidates of the precision search, smallest first: names of `INT8_CANDIDATES`, or of float
    variants. The last one loses nothing."""
    ungated_candidate: str
    """The candidate that ships if accuracy is not measured."""
    min_cosine: float
    """Minimum cosine of an embedding to that of float32, in `upperson_export.parity`."""
    canary_min_cosine: float
    """Minimum cosine to the variant's own golden embeddings, made on the machine that exported. On
    CPUs int8 differs by the rounding of floats alone; saturated sums gave 0.9994 at best. GPUs sum
    in other orders and types."""
    measured_on: str = AS_RUN
    made_for: Literal["any", "cpu", "gpu"]
    """A variant for CPUs keeps its accuracy on every CPU backend that is installed, is timed there,
    and is a bundle's default; one for GPUs is not timed on CPUs."""
    tensorrt: bool = False
    """Whether `--trt` builds engines of it."""
    servers: bool = False
    """Whether Triton and DeepStream take it by default: the last such row that a bundle has."""
    chosen_by: frozenset[str] = frozenset()
    """Options of ``upperson export``, each of which chooses it."""
    passes: Callable[[Tensors], Iterable["InPlacePass"]] = field(repr=False)

    @property
    def int8(self) -> bool:
        """Whether block Linears compute in int8, which needs activation ranges."""
        return self.quantized == "INT8"

    @property
    def own_candidates(self) -> tuple[str, ...]:
        """The candidates that are this variant; the others are larger variants."""
        return tuple(name for name in self.candidates if self.variant_of(name) is self)

    def variant_of(self, candidate: str) -> "Variant":
        """Return the variant of a candidate: a float variant if that is its name."""
        return VARIANTS.get(candidate, self)


def _int8(given: Tensors) -> Iterable["InPlacePass"]:
    from upperson_export.passes.linears import QuantizeLinears, TransposePacked

    return QuantizeLinears(given.linears, given.amax, PAIR_LIMIT), TransposePacked()


def _fp16(given: Tensors) -> Iterable["InPlacePass"]:
    from upperson_export.passes.half import ToHalf

    return (ToHalf(given.largest),)


def _int8_fp16(given: Tensors) -> Iterable["InPlacePass"]:
    from upperson_export.passes.half import ToHalf
    from upperson_export.passes.linears import QuantizeLinears, UnpackProjections, unpacked

    linears = [part for name in given.linears for part in unpacked(name)]
    return UnpackProjections(), QuantizeLinears(linears, given.amax), ToHalf(given.largest)


_ROWS = (
    Variant(
        name="fp32",
        candidates=("fp32",),
        ungated_candidate="fp32",
        min_cosine=0.9999,
        canary_min_cosine=0.9999,
        made_for="any",
        servers=True,
        passes=lambda _: (),
    ),
    Variant(
        name="int8",
        quantized="INT8",
        candidates=(*INT8_CANDIDATES, "fp32"),
        ungated_candidate="smoothed",  # Exact in float, and robust to outliers.
        min_cosine=0.99,
        canary_min_cosine=0.9998,
        made_for="cpu",
        chosen_by=frozenset({"int8"}),
        passes=_int8,
    ),
    Variant(
        name="fp16",
        float_type="f16",
        candidates=("fp16", "fp32"),
        ungated_candidate="fp16",
        min_cosine=0.999,
        canary_min_cosine=0.999,
        measured_on=SIMULATED,
        made_for="gpu",
        tensorrt=True,
        servers=True,
        chosen_by=frozenset({"fp16", "trt"}),
        passes=_fp16,
    ),
    Variant(
        name="int8-fp16",
        float_type="f16",
        quantized="INT8",
        candidates=(*INT8_CANDIDATES, "fp16", "fp32"),
        ungated_candidate="smoothed",
        min_cosine=0.99,
        canary_min_cosine=0.99,
        measured_on=SIMULATED,
        made_for="gpu",
        tensorrt=True,
        chosen_by=frozenset({"trt"}),
        passes=_int8_fp16,
    ),
)

VARIANTS: Mapping[str, Variant] = MappingProxyType({row.name: row for row in _ROWS})
"""The table, in the order of reports; what comes later suits TensorRT and servers better."""


def variants_for(options: Collection[str]) -> tuple[VariantName, ...]:
    """Return the variants that options choose; none of int8 without ``int8``."""
    return tuple(
        row.name
        for row in _ROWS
        if row.chosen_by.intersection(options) and (not row.int8 or "int8" in options)
    )


def is_half(precision: str) -> bool:
    """Whether a manifest's precision has floats in float16; False if it is unknown here."""
    return precision in VARIANTS and VARIANTS[precision].float_type == "f16"
