"""Detectors that would run for ever are refused before a library gets them."""

import onnx
import pytest
from onnx import TensorProto, helper

from upperson_camera.detectors import OnnxDetector
from upperson_rt.errors import InputError
from upperson_rt.onnx_file import require_no_loops

FLOATS = TensorProto.FLOAT


def endless_loop():
    """Return a node that adds 1 to ``pixels`` until the end of time."""
    values = [
        helper.make_tensor_value_info(name, FLOATS, [1, 3, 64, 64]) for name in ("before", "after")
    ]
    step = helper.make_tensor_value_info("step", TensorProto.INT64, [])
    go_on, goes_on = (
        helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go_on", "goes_on")
    )
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["goes_on"]),
            helper.make_node("Mul", ["before", "before"], ["after"]),
        ],
        "body",
        [step, go_on, values[0]],
        [goes_on, values[1]],
    )
    return helper.make_node("Loop", ["", "true", "pixels"], ["boxes"], body=body)


def write(path, *nodes):
    """Write a graph of nodes, of which each may be in a function."""
    functions = [function(node) for node in nodes if node.name == "in a function"]
    graph = helper.make_graph(
        [CALL] if functions else nodes,
        "detector",
        [helper.make_tensor_value_info("pixels", FLOATS, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("boxes", FLOATS, [1, 3, 64, 64])],
        [helper.make_tensor("true", TensorProto.BOOL, [], [True])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, ir_version=9, opset_imports=opsets, functions=functions)
    path.write_bytes(model.SerializeToString())
    return path


def branch(node):
    """Return If, one branch of which has a node."""
    output = helper.make_tensor_value_info("boxes", FLOATS, [1, 3, 64, 64])
    graphs = [
        helper.make_graph([inner], "branch", [], [output])
        for inner in (node, helper.make_node("Identity", ["pixels"], ["boxes"]))
    ]
    return helper.make_node("If", ["true"], ["boxes"], then_branch=graphs[0], else_branch=graphs[1])


def function(node):
    return helper.make_function(
        "mine", "Endless", ["pixels", "true"], ["boxes"], [node], [helper.make_opsetid("", 17)]
    )


CALL = helper.make_node("Endless", ["pixels", "true"], ["boxes"], domain="mine")


def in_function(node):
    node.name = "in a function"
    return node


@pytest.mark.parametrize("place", [lambda n: n, branch, lambda n: branch(branch(n)), in_function])
def test_a_detector_that_repeats_a_graph_is_refused(tmp_path, place):
    path = write(tmp_path / "endless.onnx", place(endless_loop()))
    onnx.checker.check_model(onnx.load(path))
    with pytest.raises(InputError, match="'Loop'"):
        OnnxDetector(path)
    plain = helper.make_node("Identity", ["pixels"], ["boxes"])
    require_no_loops(write(tmp_path / "plain.onnx", place(plain)))


def test_graphs_inside_each_other_have_an_end(tmp_path):
    node = helper.make_node("Identity", ["pixels"], ["boxes"])
    for _ in range(20):
        node = branch(node)
    with pytest.raises(InputError):
        require_no_loops(write(tmp_path / "deep.onnx", node))
