"""The Linears of transformer blocks in a float32 graph: what INT8 covers, and nothing else."""

import re
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

_WEIGHT = re.compile(r"(blocks\.\d+\.(?:attention\.(?:qkv|q|kv|out)|mlp\.(?:fc1|fc2)))\.weight")


@dataclass(frozen=True, slots=True)
class BlockLinear:
    """One of the MatMuls qkv (in the last block q and kv), out, fc1 and fc2."""

    node: str
    """Name of the MatMul node."""

    module: str
    """Path of the module, such as ``blocks.0.attention.qkv``."""

    activation: str
    """Name of the tensor [N, L, in] that enters."""

    weight: str
    """Name of the initializer [in, out]."""


def block_linears(model: onnx.ModelProto) -> list[BlockLinear]:
    """Return the block Linears of a tower in graph order."""
    return [
        BlockLinear(node.name, match[1], node.input[0], node.input[1])
        for node in model.graph.node
        if node.op_type == "MatMul" and (match := _WEIGHT.fullmatch(node.input[1]))
    ]


def weights_of(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    """Return the weights [in, out] of the block Linears by module path."""
    wanted = {linear.weight: linear.module for linear in block_linears(model)}
    return {
        wanted[item.name]: numpy_helper.to_array(item)
        for item in model.graph.initializer
        if item.name in wanted
    }
