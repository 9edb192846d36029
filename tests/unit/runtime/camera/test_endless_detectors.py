"""Detectors that would run for ever are refused before a library gets them."""

import onnx
import pytest
from onnx import TensorProto, helper

from upperson_camera.detectors import OnnxDetector
from upperson_rt.errors import InputError
from upperson_rt.onnx_file import require_no_loops


def value(name, kind=TensorProto.FLOAT, shape=(1, 3, 64, 64)):
    return helper.make_tensor_value_info(name, kind, shape)


def endless_loop():
    """Return a node that squares ``pixels`` for ever."""
    steps = value("step", TensorProto.INT64, ()), value("go_on", TensorProto.BOOL, ())
    nodes = [
        helper.make_node("Identity", ["go_on"], ["goes_on"]),
        helper.make_node("Mul", ["before", "before"], ["after"]),
    ]
    outputs = value("goes_on", TensorProto.BOOL, ()), value("after")
    body = helper.make_graph(nodes, "body", [*steps, value("before")], outputs)
    return helper.make_node("Loop", ["", "true", "pixels"], ["boxes"], body=body)


def nothing():
    return helper.make_node("Identity", ["pixels"], ["boxes"])


def branch(node):
    """Return If, one branch of which has a node."""
    then, other = (
        helper.make_graph([n], "branch", [], [value("boxes")]) for n in (node, nothing())
    )
    return helper.make_node("If", ["true"], ["boxes"], then_branch=then, else_branch=other)


def write(path, node, *, in_function=False):
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    names, functions = ["pixels", "true"], []
    if in_function:
        functions.append(
            helper.make_function("mine", "Endless", names, ["boxes"], [node], opsets[:1])
        )
        node = helper.make_node("Endless", names, ["boxes"], domain="mine")
    true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
    graph = helper.make_graph([node], "detector", [value("pixels")], [value("boxes")], [true])
    model = helper.make_model(graph, ir_version=9, opset_imports=opsets, functions=functions)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("place", [lambda n: n, branch, lambda n: branch(branch(n))])
def test_a_detector_that_repeats_a_graph_is_refused(tmp_path, place, in_function):
    path = write(tmp_path / "endless.onnx", place(endless_loop()), in_function=in_function)
    onnx.checker.check_model(onnx.load(path))
    with pytest.raises(InputError, match="'Loop'"):
        OnnxDetector(path)
    require_no_loops(write(tmp_path / "plain.onnx", place(nothing()), in_function=in_function))


def test_graphs_inside_each_other_have_an_end(tmp_path):
    node = nothing()
    for _ in range(20):
        node = branch(node)
    with pytest.raises(InputError):
        require_no_loops(write(tmp_path / "deep.onnx", node))
