"""Graphs with right hashes that no export writes are refused before a library gets them."""

import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.hostile_graphs import GRAPHS
from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from upperson_rt.bundle import Bundle
from upperson_rt.errors import IntegrityError
from upperson_rt.onnx_file import check_graph


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("onnx") / "bundle")


def words(model):
    return next(tensor for tensor in model.graph.initializer if tensor.name == "words")


def outside(location):
    def change(model):
        tensor = words(model)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def named_only(model):
    words(model).external_data.add(key="location", value="extra.bin")


def declared(*sizes):
    def change(model):
        del words(model).dims[:]
        words(model).dims.extend(sizes)

    return change


def appended(model, node):
    """Put a node between the graph and its output."""
    last = model.graph.node[-1]
    node.output.append(last.output[0])
    last.output[0] = "before"
    model.graph.node.append(node)


def custom_operator(model):
    model.opset_import.append(helper.make_opsetid("evil", 1))
    appended(model, helper.make_node("Evil", ["before"], [], domain="evil"))


def domain_without_import(model):
    appended(model, helper.make_node("Evil", ["before"], [], domain="com.microsoft"))


def loop(model):
    value = [
        helper.make_tensor_value_info(name, kind, [])
        for name, kind in (("i", TensorProto.INT64), ("c", TensorProto.BOOL))
    ]
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "body", value, [])
    model.graph.initializer.append(numpy_helper.from_array(np.array(1 << 60), "steps"))
    appended(model, helper.make_node("Loop", ["steps", "", "before"], [], body=body))


def function(model):
    node, opset = helper.make_node("Identity", ["x"], ["y"]), helper.make_opsetid("", 17)
    model.functions.append(helper.make_function("", "F", ["x"], ["y"], [node], [opset]))


def sparse(model):
    value = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    place = helper.make_tensor("place", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(value, place, [1 << 40]))


def constant_outside(model):
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    appended(model, helper.make_node("Constant", [], [], value=tensor))


def wider_input(model):
    model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=10**9)


def float_input(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def second_input(model):
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def other_output(model):
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 17


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (outside("extra.bin"), "names another file"),
        (outside("../extra.bin"), "names another file"),
        (outside("/etc/passwd"), "names another file"),
        (named_only, "names another file"),
        (constant_outside, "names another file"),
        (declared(1 << 40, 1 << 20), "a tensor of shape"),
        (declared(-1, 16), "a tensor of shape"),
        (declared(*[1] * 17), "a tensor of shape"),
        (custom_operator, "operators of 'evil'"),
        (domain_without_import, r"operators of 'com\.microsoft'"),
        (loop, "a loop, or another graph inside"),
        (function, "functions"),
        (sparse, "sparse tensors"),
        (wider_input, r"expected input_ids of type 6 and shape \[None, None\], found input_ids"),
        (float_input, "found input_ids of type 1"),
        (second_input, "found input_ids .*, more"),
        (other_output, r"expected text_embeds of type 1 and shape \[None, 16\], found"),
    ],
)
def test_graphs_that_exports_do_not_write_are_refused(bundle, tmp_path, change, message):
    model = onnx.load(bundle / "text.int8.onnx")
    change(model)
    path = tmp_path / "text.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match=f"is not a graph that exports write: .*{message}"):
        check_graph(path, "text", Bundle.open(bundle).manifest)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("whole constants that an attribute calls floating ones", "attributes 'value, to'"),
        ("whole numbers that a cast's tensor calls floating ones", "attributes 'to, value'"),
        ("whole constants that are floating inputs", "two values of the name 'first'"),
        ("places far outside, of several axes", "places that ArgMax did not find"),
        ("places found and then moved far outside", "places that ArgMax did not find"),
        ("variances of nothing", "operator 'InstanceNormalization'"),
    ],
)
def test_graphs_that_may_end_the_process_reach_no_library(bundle, tmp_path, graph, message):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    GRAPHS[f"graph: {graph}"](folder)
    with pytest.raises(IntegrityError, match=message):
        check_graph(folder / "text.int8.onnx", "text", Bundle.open(folder).manifest)


def test_places_that_argmax_found_are_taken(bundle, tmp_path):
    model = onnx.load(bundle / "text.int8.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    appended(model, helper.make_node("GatherND", ["before", "place"], []))
    model.graph.node.insert(0, helper.make_node("Unsqueeze", ["end", "axis"], ["place"]))
    model.graph.node.insert(0, helper.make_node("ArgMax", ["input_ids"], ["end"], keepdims=0))
    path = tmp_path / "text.onnx"
    path.write_bytes(model.SerializeToString())
    check_graph(path, "text", Bundle.open(bundle).manifest)


def test_no_library_sees_such_a_graph(bundle, monkeypatch):
    model = onnx.load(bundle / "text.int8.onnx")
    loop(model)
    before = (bundle / "text.int8.onnx").read_bytes()
    replace_in_bundle(bundle, "text.int8.onnx", model.SerializeToString())
    opened = Bundle.open(bundle)
    monkeypatch.setattr(opened, "_load", lambda *_: pytest.fail("it was loaded"))
    for use in (lambda: opened.backend("text"), opened.check_files):
        with pytest.raises(IntegrityError, match=r"text\.int8\.onnx is not a graph"):
            use()
    replace_in_bundle(bundle, "text.int8.onnx", before)


def test_damaged_files_are_refused_or_read(bundle, tmp_path):
    """Random damage ends in one error and soon, or is in a place that does not count."""
    manifest = Bundle.open(bundle).manifest
    content = (bundle / "image.int8.onnx").read_bytes()
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "image.onnx", 0
    for trial in range(300):
        changed = bytearray(content)
        for _ in range(1 + trial % 4):
            changed[rng.integers(len(changed))] = rng.integers(256)
        path.write_bytes(changed[: rng.integers(len(changed))] if trial % 5 == 0 else changed)
        try:
            check_graph(path, "image", manifest)
        except IntegrityError:
            refused += 1
    assert refused > 100
    for junk in (b"", b"\x3a", b"\xff" * 99, os.urandom(999), b"\x3a\xff\xff\xff\xff\xff\xff\x7f"):
        path.write_bytes(junk)
        with pytest.raises(IntegrityError, match="is not a graph"):
            check_graph(path, "image", manifest)


@pytest.mark.parametrize("name", [b"norm", b"ReduceL2", b"projection", b"scaled"])
def test_names_are_text(bundle, tmp_path, name):
    """Libraries quote them in errors, and what is no text becomes another kind of error."""
    content = (bundle / "image.int8.onnx").read_bytes()
    assert name in content
    path = tmp_path / "image.onnx"
    path.write_bytes(content.replace(name, b"\xf7" * len(name)))
    with pytest.raises(IntegrityError, match="is not a graph that exports write: 'utf-8' codec"):
        check_graph(path, "image", Bundle.open(bundle).manifest)


def test_a_file_of_endless_small_fields_is_given_up(bundle, tmp_path):
    path = tmp_path / "text.onnx"
    path.write_bytes(b"\x08\x07" * 2_000_000)
    with pytest.raises(IntegrityError, match="more than 1000000 fields"):
        check_graph(path, "text", Bundle.open(bundle).manifest)
