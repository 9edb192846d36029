"""The number formats that a tower is written in: one row each.

All that differs between variants is a column here, and nothing else compares their names. A new
format is a row, the pass that makes it, and their tests. Only `Variant.passes` needs onnx.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

from upperson_rt.machine import PAIR_LIMIT

if TYPE_CHECKING:
    from onnx_ir.passes import InPlacePass

    from upperson_calibration.calibration_file import Smoothness

VariantName: TypeAlias = Literal["fp32", "fp16", "int8", "int8-fp16"]

EXACT: VariantName = "fp32"
"""What the others are made from and compared with; every bundle has it."""

AS_RUN = "onnxruntime"
"""Measured by what ONNX Runtime makes of the file on a CPU."""

SIMULATED = "onnxruntime, float16 simulated"
"""Measured with float16's range and rounding: a CPU computes in float32, which would hide them."""


@dataclass(frozen=True, slots=True)
class Int8Rung:
    """A way to make a tower int8."""

    graph: "Smoothness" = "plain"
    """Which float32 graph is quantized."""

    in_float: Fraction = Fraction(0)
    """Share of the block Linears, the most harmful ones, that stays in float, rounded up."""


INT8_RUNGS: Mapping[str, Int8Rung] = {
    "plain": Int8Rung(),
    "smoothed": Int8Rung("smoothed"),
    "mixed-1/8": Int8Rung("smoothed", Fraction(1, 8)),
    "mixed-1/4": Int8Rung("smoothed", Fraction(1, 4)),
    "mixed-1/2": Int8Rung("smoothed", Fraction(1, 2)),
}
"""From smallest to safest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    """What a pass is told of the tower that it changes."""

    linears: Sequence[str]
    """Names of the block Linears' MatMul nodes that leave float."""

    amax: Mapping[str, float]
    """Calibrated range of what enters them, by tensor name; empty for variants without int8."""

    largest: Mapping[str, float] | None
    """Largest absolute value seen of any float tensor, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A number format, and all that depends on it."""

    name: VariantName

    float_type: Literal["f32", "f16"] = "f32"
    """What is computed in where nothing is quantized."""

    quantized: Literal["INT8"] | None = None
    """What the weights of block Linears are stored in, by ONNX's name; None: a float type."""

    pair_limit: int | None = None
    """See `QuantizeLinears`: what CPUs run may not saturate on any; GPUs add up in 32 bits."""

    rungs: tuple[str, ...]
    """What the ladder may take, smallest first: names of `INT8_RUNGS`, or of float variants. The
    last one loses nothing."""

    ungated_rung: str
    """What ships where accuracy is not measured."""

    min_cosine: float
    """Of an embedding to the one that float32 gives, in `upperson_export.parity`."""

    canary_min_cosine: float
    """To the golden embeddings, which are this variant's own, from the machine that exported. What
    CPUs run in int8 is the same on all of them but for the rounding of floats; of sums that
    saturate, 0.9994 is the mildest ever seen. GPUs sum in other orders and types."""

    measured_on: str = AS_RUN
    """`AS_RUN` or `SIMULATED`."""

    made_for: Literal["any", "cpu", "gpu"]
    """A variant for CPUs keeps its accuracy on every CPU backend that is installed, is timed there,
    and is a bundle's default; one for GPUs is not timed on CPUs."""

    tensorrt: bool = False
    """Whether `--trt` builds engines of it."""

    servers: bool = False
    """Whether Triton and DeepStream take it unasked: the last such row that a bundle has."""

    asked_by: frozenset[str] = frozenset()
    """Options of ``upperson export``; each of them asks for it."""

    passes: Callable[[Tensors], Iterable["InPlacePass"]] = field(repr=False)
    """Make it from the float32 graph."""

    @property
    def int8(self) -> bool:
        """Whether block Linears compute in int8, for which ranges are calibrated."""
        return self.quantized == "INT8"

    @property
    def own_rungs(self) -> tuple[str, ...]:
        """The rungs that are in this format: the others are another, larger variant."""
        return tuple(rung for rung in self.rungs if self.at(rung) is self)

    def at(self, rung: str) -> "Variant":
        """Return what a tower is written in on a rung: a float variant if that is its name."""
        return VARIANTS.get(rung, self)


def _no_pass(_: Tensors) -> Iterable["InPlacePass"]:
    return ()


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
        rungs=("fp32",),
        ungated_rung="fp32",
        min_cosine=0.9999,
        canary_min_cosine=0.9999,
        made_for="any",
        servers=True,
        passes=_no_pass,
    ),
    Variant(
        name="int8",
        quantized="INT8",
        pair_limit=PAIR_LIMIT,
        rungs=(*INT8_RUNGS, "fp32"),
        ungated_rung="smoothed",  # Exact in float, and robust to outliers.
        min_cosine=0.99,
        canary_min_cosine=0.9998,
        made_for="cpu",
        asked_by=frozenset({"int8"}),
        passes=_int8,
    ),
    Variant(
        name="fp16",
        float_type="f16",
        rungs=("fp16", "fp32"),
        ungated_rung="fp16",
        min_cosine=0.999,
        canary_min_cosine=0.999,
        measured_on=SIMULATED,
        made_for="gpu",
        tensorrt=True,
        servers=True,
        asked_by=frozenset({"fp16", "trt"}),
        passes=_fp16,
    ),
    Variant(
        name="int8-fp16",
        float_type="f16",
        quantized="INT8",
        rungs=(*INT8_RUNGS, "fp16", "fp32"),
        ungated_rung="smoothed",
        min_cosine=0.99,
        canary_min_cosine=0.99,
        measured_on=SIMULATED,
        made_for="gpu",
        tensorrt=True,
        asked_by=frozenset({"trt"}),
        passes=_int8_fp16,
    ),
)

VARIANTS: Mapping[str, Variant] = MappingProxyType({row.name: row for row in _ROWS})
"""The table, in the order of reports; what comes later suits TensorRT and servers better."""


def variants_asked(options: Collection[str]) -> tuple[VariantName, ...]:
    """Return the variants that options ask for, without ``int8`` none of int8."""
    return tuple(
        row.name
        for row in _ROWS
        if row.asked_by.intersection(options) and (not row.int8 or "int8" in options)
    )


def is_half(precision: str) -> bool:
    """Whether a manifest's precision has floats in float16; False for one not known here."""
    return precision in VARIANTS and VARIANTS[precision].float_type == "f16"
