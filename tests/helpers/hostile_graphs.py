"""Graphs with right hashes that no export writes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.hostile_changes import Change, changed

_bytes = partial(changed, "text.int8.onnx")


def _graph(change: Callable[[onnx.ModelProto], object]) -> Change:
    def made(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        change(model)
        return model.SerializeToString()

    return _bytes(made)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _behind(more: bytes) -> Change:
    return _bytes(lambda content: content + more)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _added(operator: str, *constants: NDArray[Any], **attributes: Any) -> Change:
    """Add to the embeddings the sum of what an operator gives for some constants."""

    def change(model: onnx.ModelProto) -> None:
        names = [f"constant{number}" for number in range(len(constants))]
        for name, value in zip(names, constants, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        _summed(model, helper.make_node(operator, names or ["before"], ["odd"], **attributes))

    return _graph(change)


def _summed(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Let nodes, the last of which gives ``odd``, have a part in the embeddings."""
    model.graph.node[-1].output[0] = "before"
    model.graph.node.extend(nodes)
    for node in (
        helper.make_node("Cast", ["odd"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["float"], ["sum"], keepdims=0),
        helper.make_node("Add", ["before", "sum"], ["text_embeds"]),
    ):
        model.graph.node.append(node)


def _divided(*nodes: onnx.NodeProto) -> Change:
    """Divide what nodes call ``whole`` by itself."""
    return _graph(
        lambda model: _summed(model, *nodes, helper.make_node("Div", ["whole", "whole"], ["odd"]))
    )


def _with_node(node: bytes) -> Change:
    """Add a node as bytes, which no library may put in order before."""

    def made(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        _summed(model)
        graph = model.graph.SerializeToString() + _field(1, node)
        model.ClearField("graph")
        return model.SerializeToString() + _field(7, graph)

    return _bytes(made)


def _called_floats(model: onnx.ModelProto) -> None:
    """Divide whole constants with an attribute that would make a Cast's result floating."""
    names = ["first", "second"]
    constants = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in zip(names, _LEAST, strict=True)
    ]
    for constant in constants:
        constant.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    _summed(model, *constants, helper.make_node("Div", names, ["odd"]))


def _cast_with_a_tensor(model: onnx.ModelProto) -> None:
    """Divide whole numbers, cast with a tensor that would make a Constant floating."""
    cast = helper.make_node(
        "Cast", ["before"], ["whole"], to=TensorProto.INT32, value=numpy_helper.from_array(_ONE)
    )
    zero = helper.make_node("Sub", ["whole", "whole"], ["zero"])
    _summed(model, cast, zero, helper.make_node("Div", ["whole", "zero"], ["odd"]))


def _declared_floats(model: onnx.ModelProto) -> None:
    """Divide whole constants that are floating inputs, too."""
    names = ["first", "second"]
    for name, value in zip(names, _LEAST, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))
    _summed(model, helper.make_node("Div", names, ["odd"]))


def _counted(model: onnx.ModelProto) -> None:
    """Take from places that ArgMax found, and a sum moved far away."""
    for name, value in (("far", _long(10**12)), ("axis", _long(1)), ("square", _SQUARE)):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    _summed(
        model,
        helper.make_node("ArgMax", ["before"], ["found"], axis=1, keepdims=0),
        helper.make_node("Add", ["found", "far"], ["moved"]),
        helper.make_node("Unsqueeze", ["moved", "axis"], ["place"]),
        helper.make_node("GatherND", ["square", "place"], ["odd"]),
    )


def _constant(*fields: tuple[int, bytes]) -> Change:
    """Add a constant whose attribute has these fields."""
    attribute = _field(1, b"value") + b"".join(_field(*one) for one in fields)
    return _with_node(_field(2, b"odd") + _field(4, b"Constant") + _field(5, attribute))


def _long(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


_ONE = np.ones(1, np.float32)
_SQUARE = np.ones((4, 4), np.float32)
_LEAST = np.array([[-(2**31)], [-1]], np.int32)
"""The smallest number, and what it cannot be divided by."""

_PART = TensorProto(data_type=1, dims=[1 << 16], raw_data=bytes(1 << 18)).SerializeToString()
_ELSEWHERE = TensorProto(
    data_type=1,
    dims=[4],
    external_data=[onnx.StringStringEntryProto(key="location", value="/dev/zero")],
).SerializeToString()

GRAPHS = {
    "graph: an empty file": _bytes(lambda _: b""),
    "graph: zeros": _bytes(lambda content: bytes(len(content))),
    "graph: another one behind it": _bytes(lambda content: content + content),
    "graph: a group, as of 2008": _behind(b"\x0b\x0c"),
    "graph: a field of number 0": _behind(b"\x02\x00"),
    "graph: a length of 2^63": _behind(b"\x3a" + b"\xff" * 8 + b"\x7f"),
    "graph: a number without an end": _behind(b"\x08" + b"\xff" * 12),
    "graph: training in it": _behind(_field(20, b"")),
    "graph: a function in it": _behind(_field(25, b"")),
    "graph: operators of another domain": _behind(_field(8, _field(1, b"ai.onnx.ml") + b"\x10\3")),
    "graph: operators of a domain of bytes": _behind(_field(8, _field(1, b"\xff\xfe"))),
    "graph: a tensor in two parts, which readers put together": _constant((5, _PART), (5, _PART)),
    "graph: a tensor elsewhere, in an attribute": _constant((5, _ELSEWHERE)),
    "graph: a tensor elsewhere, in a list": _constant((10, _ELSEWHERE)),
    "graph: a sparse tensor in an attribute": _constant((22, _ELSEWHERE)),
    "graph: a graph in an attribute": _constant((6, b"")),
    "graph: graphs in a list": _constant((11, b"")),
    "graph: a tensor whose sizes come to 2^64": _graph(
        lambda model: model.graph.initializer.append(
            TensorProto(name="t", data_type=1, dims=[1 << 32, 1 << 32], raw_data=b"")
        )
    ),
    "graph: a name of a megabyte": _graph(
        lambda model: setattr(model.graph.node[0], "name", "a" * (1 << 20))
    ),
    "graph: a sequence for an input": _graph(
        lambda model: model.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent()
    ),
    "graph: an input that is a constant": _graph(
        lambda model: model.graph.initializer.append(
            numpy_helper.from_array(np.zeros((1, 4), np.int32), "input_ids")
        )
    ),
    "graph: no output": _graph(lambda model: model.graph.output.pop()),
    "graph: an output of another name": _graph(
        lambda model: setattr(model.graph.output[0], "name", "norm")
    ),
    "graph: a circle": _graph(
        lambda model: model.graph.node[0].input.__setitem__(0, model.graph.node[-2].output[0])
    ),
    "graph: an operator that nobody knows": _added("Abort"),
    "graph: a division of whole numbers by zero": _added("Div", _long(7), _long(0)),
    "graph: the smallest number by -1": _added(
        "Div", np.array([-(2**31)], np.int32), np.array([-1], np.int32)
    ),
    "graph: whole numbers that were cast from floating ones": _divided(
        helper.make_node("Cast", ["before"], ["whole"], to=TensorProto.INT32)
    ),
    "graph: whole numbers that an attribute calls floating ones": _divided(
        helper.make_node("Add", ["last", "last"], ["whole"], to=TensorProto.FLOAT)
    ),
    "graph: whole constants that an attribute calls floating ones": _graph(_called_floats),
    "graph: whole numbers that a cast's tensor calls floating ones": _graph(_cast_with_a_tensor),
    "graph: whole constants that are floating inputs": _graph(_declared_floats),
    "graph: whole numbers that were quantized": _divided(
        helper.make_node("QuantizeLinear", ["before", "norm"], ["whole"])
    ),
    "graph: places of the largest": _divided(helper.make_node("ArgMax", ["before"], ["whole"])),
    "graph: one name for whole and floating numbers": _divided(
        helper.make_node("Identity", ["before"], ["whole"]),
        helper.make_node("Identity", ["last"], ["whole"]),
    ),
    "graph: the mean of no whole numbers": _added(
        "ReduceMean", np.zeros((2, 0), np.int32), axes=[1]
    ),
    "graph: a value written far outside": _added(
        "ScatterElements", np.ones((4, 4), np.float32), np.full((1, 1), -(10**9)), _ONE[:, None]
    ),
    "graph: a rest after zero": _added("Mod", _long(7), _long(0)),
    "graph: a rest of the smallest number": _added("Mod", _long(-(2**63)), _long(-1)),
    "graph: zeros without end": _added("ConstantOfShape", _long(1 << 44)),
    "graph: numbers without end": _added("Range", _long(0)[0], _long(1 << 44)[0], _long(1)[0]),
    "graph: copies without end": _added("Tile", _ONE, _long(1 << 44)),
    "graph: a value stretched": _added("Expand", _ONE, _long(1 << 22, 1 << 22)),
    "graph: a border of 2^44": _added("Pad", _ONE, _long(1 << 44, 0)),
    "graph: a picture enlarged": _added(
        "Resize", np.ones((1, 1, 4, 4), np.float32), _ONE[:0], _ONE.repeat(4) * 1e6
    ),
    "graph: random numbers": _added("RandomNormal", shape=[1 << 22, 1 << 22]),
    "graph: a rank of 2^44": _added(
        "OneHot", _long(0), _long(1 << 44)[0], np.array([0, 1], np.float32)
    ),
    "graph: a window of 2^44": _added("HannWindow", _long(1 << 44)[0]),
    "graph: a shape of 2^64": _added("Reshape", _ONE, _long(1 << 32, 1 << 32)),
    "graph: a place far outside": _added("Gather", _ONE, _long(-(10**12))),
    "graph: places far outside": _added("GatherElements", _SQUARE, np.full((4, 4), 10**12)),
    "graph: places far outside, of several axes": _added(
        "GatherND", _SQUARE, _long(-(10**12), 10**12)[None]
    ),
    "graph: places found and then moved far outside": _graph(_counted),
    "graph: variances of nothing": _added(
        "InstanceNormalization", *(np.ones(shape, np.float32) for shape in ((1, 4, 0), 4, 4))
    ),
    "graph: a step of zero": _added(
        "Slice", _ONE, _long(-(2**63)), _long(2**63 - 1), _long(0), _long(0)
    ),
    "graph: a stride of zero": _added(
        "AveragePool", np.ones((1, 1, 4, 4), np.float32), kernel_shape=[2, 2], strides=[0, 0]
    ),
    "graph: no group": _added(
        "Conv", np.ones((1, 4, 4, 4), np.float32), np.ones((1, 4, 2, 2), np.float32), group=0
    ),
    "graph: an axis that is not there": _added("Softmax", _ONE, axis=99),
}  # fmt: skip
