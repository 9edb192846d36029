"""One projection that is split afterwards, to one projection a part."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class UnpackProjections(ir.passes.InPlacePass):
    """Replace MatMul, Add, Split by one MatMul and Add for each part of the Split.

    TensorRT pushes a Split into the weights and then misses the int8 pattern: the GEMM runs in
    float16. Separate MatMuls on one quantized tensor it merges again, in int8. The parts of
    ``attention.qkv`` are called ``attention.q``, ``attention.k`` and ``attention.v``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace in place."""
        graph = model.graph
        modified = False
        for split in [node for node in graph if node.op_type == "Split"]:
            packed = split.inputs[0]
            add = None if packed is None else packed.producer()
            matmul = None if add is None else next(iter(add.predecessors()), None)
            if add is None or matmul is None or not _is_linear(matmul, add):
                continue
            x, weight = matmul.inputs
            bias = add.inputs[1]
            if weight is None or bias is None:
                continue
            module, _, parts = str(weight.name).removesuffix(".weight").rpartition(".")
            weights = np.split(_array(weight), len(split.outputs), axis=1)
            biases = np.split(_array(bias), len(split.outputs))
            for part, part_w, part_b, output in zip(
                parts, weights, biases, split.outputs, strict=True
            ):
                name = f"{module}.{part}"
                multiply = ir.node("MatMul", [x, _initializer(graph, f"{name}.weight", part_w)])
                product = multiply.outputs[0]
                shift = ir.node("Add", [product, _initializer(graph, f"{name}.bias", part_b)])
                multiply.name = product.name = f"{name}/MatMul"
                shift.name = shift.outputs[0].name = f"{name}/Add"
                for value in (product, shift.outputs[0]):
                    value.type, value.shape = output.type, output.shape
                graph.insert_before(split, [multiply, shift])
                output.replace_all_uses_with(shift.outputs[0])
            graph.remove([split, add, matmul], safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def unpacked(linear: str) -> list[str]:
    """Return the names of the MatMul nodes that one becomes, three of ``attention.qkv/MatMul``."""
    module, _, parts = linear.removesuffix("/MatMul").rpartition(".")
    return [f"{module}.{part}/MatMul" for part in parts] if parts in ("qkv", "kv") else [linear]


def _is_linear(matmul: ir.Node, add: ir.Node) -> bool:
    constants = (matmul.inputs[-1], add.inputs[-1])
    return (
        (matmul.op_type, add.op_type) == ("MatMul", "Add")
        and all(value is not None and value.is_initializer() for value in constants)
        and len(add.outputs[0].uses()) == len(matmul.outputs[0].uses()) == 1
    )


def _array(value: ir.Value) -> npt.NDArray[Any]:
    assert value.const_value is not None  # an initializer
    return value.const_value.numpy()


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value
