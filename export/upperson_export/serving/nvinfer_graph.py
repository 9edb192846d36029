"""The image tower as nvinfer feeds it: float32 planar RGB instead of uint8 interleaved."""

import onnx
from onnx import TensorProto, helper

from upperson_rt.errors import IntegrityError

_INTERLEAVED = "pixels_nhwc"


def planar_float_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the image tower with the input float32 [N, 3, H, W] of values 0 to 255.

    One Transpose is put before the graph; everything behind it stays, so equal pixels give equal
    embeddings. A Cast to float32 that read the pixels would do nothing any more and goes; one to
    another type stays, because typed graphs allow no mixed operands.

    Args:
        model: An image tower with the one input uint8 [N, H, W, 3]; it is not changed.

    Raises:
        IntegrityError: The input is another one.
    """
    adapted = onnx.ModelProto()
    adapted.CopyFrom(model)
    graph = adapted.graph
    pixels = graph.input[0]
    tensor = pixels.type.tensor_type
    if len(graph.input) != 1 or tensor.elem_type != TensorProto.UINT8 or len(tensor.shape.dim) != 4:
        raise IntegrityError(
            "expected an image tower with one input uint8 [N, H, W, 3]: export the bundle again"
        )
    batch, height, width, channels = tensor.shape.dim
    shape = [_size(dim) for dim in (batch, channels, height, width)]

    renamed = {pixels.name: _unused(graph, _INTERLEAVED)}
    interleaved = renamed[pixels.name]
    kept = []
    for node in graph.node:
        if _is_cast_to_float32(node) and node.input[0] == pixels.name:
            renamed[node.output[0]] = interleaved
        else:
            kept.append(node)
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    transpose = helper.make_node(
        "Transpose", [pixels.name], [interleaved], name="planar/Transpose", perm=[0, 2, 3, 1]
    )
    nodes = [transpose, *kept]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(pixels.name, TensorProto.FLOAT, shape))
    stale = set(renamed)
    values = [value for value in graph.value_info if value.name not in stale]
    del graph.value_info[:]
    graph.value_info.extend(values)
    onnx.checker.check_model(adapted, full_check=True)
    return adapted


def _is_cast_to_float32(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and any(
        attribute.name == "to" and attribute.i == TensorProto.FLOAT for attribute in node.attribute
    )


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param


def _unused(graph: onnx.GraphProto, name: str) -> str:
    taken = {output for node in graph.node for output in node.output}
    taken.update(value.name for value in (*graph.input, *graph.initializer))
    while name in taken:
        name += "_"
    return name
