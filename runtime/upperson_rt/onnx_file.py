"""An ONNX file, looked through before a library gets it: is it one that exports write?

Hashes say that a file is the one of the manifest, not that it is harmless. Libraries read further
files that it names, run its loops for as long as they like, and allocate what it declares. This
reads the protocol buffers by themselves, without the package onnx: large tensors are stepped over,
so it takes a few milliseconds. What is declared is held against
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, whose field numbers are below.
"""

import dataclasses
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.manifest import Manifest
from upperson_rt.printable import escape_for_display, one_line, safe_repr
from upperson_rt.towers import GRAPH_NAMES, Tower

_DOMAINS = ("", "ai.onnx")
_EXTERNAL = 1
_UINT8, _INT32, _FLOAT = 2, 6, 1
_FLOATS = (_FLOAT, 10, 11, 16)

_OPERATORS = frozenset({
    "Abs", "Add", "And", "ArgMax", "ArgMin", "AveragePool", "BatchNormalization", "Cast", "Ceil",
    "Clip", "Concat", "Constant", "Conv", "DequantizeLinear", "Div", "Elu", "Equal", "Erf", "Exp",
    "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
    "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GroupNormalization",
    "HardSigmoid", "HardSwish", "Identity", "LayerNormalization", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "MaxPool", "Mean", "Min", "Mish", "Mul",
    "Neg", "Not", "Or", "Pow", "PRelu", "QuantizeLinear", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "RMSNormalization", "Shape", "Sigmoid",
    "Sign", "Size", "Slice", "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Sum",
    "Tanh", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
"""What towers are made of, by exports and others. Left out are loops, operators that write where an
index says or take texts, and those found to end the process. A few of these still make tensors of
any size from small ones, such as Expand and products."""

_DIVIDING = ("Div", "Reciprocal", "ReduceMean")

_TYPED = {"Cast": "to", "Constant": "value"}
"""Their only attribute, which says the type of what they give."""

_PLACE = -1
"""Stands for the type of what ArgMax gives: places in a tensor that is there."""

_WHOLE = frozenset({
    "And", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or",
    "QuantizeLinear", "Shape", "Size",
})  # fmt: skip
"""Those of them, beside ArgMax, that give no floating point numbers, whatever they get."""

_MOST_FIELDS = 1_000_000
"""ViT-L/14 has some 40,000."""

_MOST_AXES = 16

_MOST_LEVELS = 16
"""Graphs inside each other."""

_Message: TypeAlias = tuple[int, int]
"""Where a message, text or array begins and ends in the file."""
_Content: TypeAlias = int | _Message
"""Of a field."""


class _UnfitError(Exception):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass
class _Node:
    """What the types of a node's outputs follow from."""

    operator: str = ""
    inputs: list[str] = dataclasses.field(default_factory=list)
    outputs: list[str] = dataclasses.field(default_factory=list)
    attributes: dict[str, int | None] = dataclasses.field(default_factory=dict)
    """By name: a number, or the type of a tensor."""


def check_graph(path: str | os.PathLike[str], tower: Tower, manifest: Manifest) -> None:
    """Refuse a graph that is no plain one of standard operators, complete in its file."""
    sizes: dict[Tower, tuple[int, list[int | None]]] = {
        "image": (_UINT8, [None, manifest.image.height_px, manifest.image.width_px, 3]),
        "text": (_INT32, [None, None]),
    }
    source, result = GRAPH_NAMES[tower]
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            inputs, outputs = _Reader(data).model()
        for found, name, kind, shape in (
            (inputs, source, *sizes[tower]),
            (outputs, result, _FLOAT, [None, manifest.model.embed_dim]),
        ):
            if list(found) != [name] or not _fits(found[name], kind, shape):
                expected = _described({name: (kind, shape)})
                raise _UnfitError("ends_differ", f"expected {expected}, found {_described(found)}")
    except (_UnfitError, OSError, ValueError) as error:
        name = os.fspath(path)
        message = f"{name} is not a graph that exports write: {error}. Do not use this bundle "
        message += "unless you trust where it came from"
        reason = error.reason if isinstance(error, _UnfitError) else "unreadable"
        raise IntegrityError(message, code="graph_unfit", path=name, reason=reason) from error


def require_no_loops(path: str | os.PathLike[str]) -> None:
    """Refuse a detector that may run forever: an operator other than If with a graph."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            operator = next(_Reader(data).repeating(), None)
    except (_UnfitError, OSError, ValueError) as error:
        message = f"cannot load the detector {os.fspath(path)}: no file in ONNX format"
        raise InputError(f"{message}: {one_line(error)}") from error
    if operator is not None:
        raise InputError(
            f"the detector {os.fspath(path)} has the operator {safe_repr(operator)}, which may "
            "repeat a graph for ever: export the network without loops, such as those of "
            "non-maximum suppression"
        )


_Value: TypeAlias = tuple[int, list[int | None]]
"""Type of the elements, and the sizes; None where any will do."""


def _check_types(nodes: Iterable[_Node], kinds: dict[str, int]) -> None:
    """Refuse what may end the process with some numbers, unless the types rule those out.

    Whole numbers are not divided. GatherND, which text towers of before 27 November 2026 have, gets
    places that ArgMax found, no others: a library may read at any place.
    """
    known: dict[str, int | None] = dict(kinds)
    for node in nodes:
        # Two operators give what the second of their inputs is, all others what the first is.
        place = 1 if node.operator in ("DequantizeLinear", "Where") else 0
        kind = known.get(node.inputs[place]) if len(node.inputs) > place else None
        if node.operator in _DIVIDING and kind not in _FLOATS:
            raise _UnfitError("whole_division", "it divides numbers that may be whole ones")
        if node.operator == "GatherND" and known.get("".join(node.inputs[1:2])) != _PLACE:
            raise _UnfitError("gather_places", "it gathers from places that ArgMax did not find")
        if node.operator in _TYPED:
            kind = node.attributes[_TYPED[node.operator]]
        elif node.operator == "ArgMax":
            kind = _PLACE
        elif node.operator in _WHOLE or (kind == _PLACE and node.operator != "Unsqueeze"):
            kind = None
        for number, name in enumerate(filter(None, node.outputs)):
            if name in known:
                raise _UnfitError("name_reused", f"it has two values of the name {safe_repr(name)}")
            known[name] = kind if number == 0 or node.operator == "Split" else None


def _enter(kinds: dict[str, int], name: str, kind: int) -> None:
    """Note the type of a constant or input; one that is both has one type."""
    if kinds.setdefault(name, kind) != kind:
        raise _UnfitError("name_reused", f"it has two values of the name {safe_repr(name)}")


def _fits(found: _Value, kind: int, sizes: list[int | None]) -> bool:
    return (
        found[0] == kind
        and len(found[1]) == len(sizes)
        and all(None in pair or pair[0] == pair[1] for pair in zip(found[1], sizes, strict=True))
    )


def _described(values: dict[str, _Value]) -> str:
    described = (
        f"{escape_for_display(name)} of type {kind} and shape {sizes}"
        for name, (kind, sizes) in values.items()
    )
    return ", ".join(described)[:200] or "nothing"


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._left = _MOST_FIELDS

    def model(self) -> tuple[dict[str, _Value], dict[str, _Value]]:
        """Check all, and return the graph's inputs and outputs."""
        graphs: list[_Content] = []
        for field, value in self._fields((0, len(self._data))):
            match field:
                case 7:
                    graphs.append(value)
                case 8:
                    for part, domain in self._fields(value):
                        if part == 1:
                            self._standard(domain)
                case 20 | 25:
                    raise _UnfitError("functions", "it has functions or training in it")
        if len(graphs) != 1:
            raise _UnfitError("graph_count", f"it has {len(graphs)} graphs, expected one")
        inputs: dict[str, _Value] = {}
        outputs: dict[str, _Value] = {}
        constants: set[str] = set()
        kinds: dict[str, int] = {}
        nodes: list[_Node] = []
        for field, value in self._fields(graphs[0]):
            match field:
                case 1:
                    nodes.append(self._node(value))
                case 5:
                    name, kind = self._tensor(value)
                    constants.add(name)
                    _enter(kinds, name, kind)
                case 11:
                    name, inputs[name] = self._value(value)
                    _enter(kinds, name, inputs[name][0])
                case 12:
                    outputs.update([self._value(value)])
                case 13:
                    self._value(value)
                case 15:
                    raise _UnfitError("sparse", "it has sparse tensors in it")
        _check_types(nodes, kinds)
        return {name: inputs[name] for name in inputs if name not in constants}, outputs

    def repeating(self) -> Iterator[str]:
        """Yield operators, other than If, that have a graph inside; look at nothing else."""
        for field, value in self._fields((0, len(self._data))):
            if field in (7, 25):  # The graph, or a function.
                yield from self._repeating(value, 1 if field == 7 else 7, _MOST_LEVELS)

    def _repeating(self, graph: _Content, nodes: int, levels: int) -> Iterator[str]:
        if levels == 0:
            raise _UnfitError(
                "too_deep", f"it has more than {_MOST_LEVELS} graphs inside each other"
            )
        for field, value in self._fields(graph):
            if field != nodes:
                continue
            operators, inside = list[str](), list[_Content]()
            for part, content in self._fields(value):
                if part == 4:
                    operators.append(self._text(content))
                elif part == 5:
                    attribute = self._fields(content)
                    inside += [found for kind, found in attribute if kind in (6, 11)]
            if inside and operators != ["If"]:
                yield ", ".join(operators)
            for message in inside:
                yield from self._repeating(message, 1, levels - 1)

    def _node(self, message: _Content) -> "_Node":
        node = _Node()
        for field, value in self._fields(message):
            match field:
                case 1:
                    node.inputs.append(self._text(value))
                case 2:
                    node.outputs.append(self._text(value))
                case 3:
                    self._text(value)
                case 4:
                    node.operator = self._text(value)
                case 5:
                    self._attribute(value, node)
                case 7:
                    self._standard(value)
        if node.operator not in _OPERATORS:
            raise _UnfitError("operator", f"it has the operator {safe_repr(node.operator)}")
        if (typed := _TYPED.get(node.operator)) and list(node.attributes) != [typed]:
            raise _UnfitError(
                "attributes",
                f"{node.operator} has the attributes {safe_repr(', '.join(node.attributes))}, "
                f"expected {typed}",
            )
        return node

    def _attribute(self, attribute: _Content, node: "_Node") -> None:
        name, found, tensors = "", dict[int, int](), 0
        for part, content in self._fields(attribute):
            if part == 1:
                name = self._text(content)
            elif part == 3 and isinstance(content, int):
                found[part] = content
            elif part in (5, 10):
                _, found[part] = self._tensor(content)
                tensors += part == 5
            elif part in (6, 11):
                raise _UnfitError("graph_inside", "it has a loop, or another graph inside")
            elif part in (22, 23):
                raise _UnfitError("sparse", "it has sparse tensors in it")
        if tensors > 1:  # Readers put them together as one.
            raise _UnfitError("tensor_parts", "it has a tensor in several parts")
        if name in node.attributes:
            raise _UnfitError(
                "name_reused", f"it has two attributes {safe_repr(name)} at one place"
            )
        node.attributes[name] = found.get(3 if name == "to" else 5)

    def _tensor(self, tensor: _Content) -> tuple[str, int]:
        name, kind, sizes, size_bytes = "", 0, [], 0
        for field, value in self._fields(tensor):
            match field:
                case 1:
                    sizes += [value] if isinstance(value, int) else self._packed(value)
                case 2 if isinstance(value, int):
                    kind = value
                case 8:
                    name = self._text(value)
                case 4 | 5 | 6 | 7 | 9 | 10 | 11:
                    size_bytes += 8 if isinstance(value, int) else value[1] - value[0]
                case 13:
                    raise _UnfitError("other_file", "it names another file for its tensors")
                case 14 if value == _EXTERNAL:
                    raise _UnfitError("other_file", "it names another file for its tensors")
        if (
            len(sizes) > _MOST_AXES or math.prod(sizes) > 2 * size_bytes
        ):  # Two numbers of 4 bits in a byte.
            raise _UnfitError(
                "tensor_size", f"a tensor of shape {sizes[:8]} has {size_bytes} bytes of numbers"
            )
        return name, kind

    def _value(self, info: _Content) -> tuple[str, _Value]:
        name, kind, sizes = "", 0, list[int | None]()
        for field, value in self._fields(info):
            if field == 1:
                name = self._text(value)
            elif field == 2:
                for form, content in self._fields(value):
                    if form != 1:
                        raise _UnfitError("ends_differ", "its inputs and outputs are no tensors")
                    for part, found in self._fields(content):
                        if part == 1:
                            kind = found if isinstance(found, int) else 0
                        elif part == 2:
                            sizes += self._sizes(found)
        return name, (kind, sizes)

    def _sizes(self, shape: _Content) -> Iterator[int | None]:
        for field, dimension in self._fields(shape):
            if field == 1:
                size = None
                for kind, value in self._fields(dimension):
                    if kind == 1 and isinstance(value, int):
                        size = value
                    elif kind == 2:
                        self._text(value)
                yield size

    def _standard(self, domain: _Content) -> None:
        if (found := self._text(domain)) not in _DOMAINS:
            raise _UnfitError(
                "operator_domain", f"it has operators of {found!r}, expected those of ONNX"
            )

    def _text(self, name: _Content) -> str:
        """Return a name; libraries that quote one which is no text fail in their own way."""
        start, end = _place(name)
        if end - start > 1000:
            raise _UnfitError("name_too_long", "a name in it has more than 1000 bytes")
        return self._data[start:end].decode("utf-8")

    def _packed(self, place: _Message) -> list[int]:
        at, numbers = place[0], []
        while at < place[1]:
            number, at = self._varint(at, place[1])
            numbers.append(number)
            self._count()
        return numbers

    def _fields(self, message: _Content) -> Iterator[tuple[int, _Content]]:
        """Yield number and content of each field: a number, or where text or a message lies."""
        at, end = _place(message)
        while at < end:
            self._count()
            tag, at = self._varint(at, end)
            field, wire = tag >> 3, tag & 7
            if wire == 0:
                number, at = self._varint(at, end)
                yield field, number
                continue
            if wire == 2:
                size, at = self._varint(at, end)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise _UnfitError("no_field", f"no field can be read at byte {at}")
            if tag >= 1 << 32 or field == 0 or size > end - at:
                raise _UnfitError("no_field", f"a field at byte {at} is longer than what it is in")
            yield field, (at, at + size)
            at += size

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        number = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number, at
            shift += 7
        raise _UnfitError("no_field", f"no number can be read at byte {at}")

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise _UnfitError("too_many_fields", f"it has more than {_MOST_FIELDS} fields")


def _place(content: _Content) -> _Message:
    if isinstance(content, int):
        raise _UnfitError("no_field", "a number stands where text or a message was expected")
    return content
