"""Graphs with right hashes that no export writes are refused before a library gets them."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.refused import refused
from upperson_rt import onnx_file
from upperson_rt.bundle import Bundle
from upperson_rt.errors import IntegrityError
from upperson_rt.onnx_file import check_graph


def words(model):
    return next(tensor for tensor in model.graph.initializer if tensor.name == "words")


def outside(model):
    """Without a place of its own; `tests.helpers.hostile_graphs` has one with it."""
    words(model).ClearField("raw_data")
    words(model).data_location = TensorProto.EXTERNAL


def declared(*sizes):
    def change(model):
        words(model).dims[:] = sizes

    return change


def sparse(model):
    value = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    place = helper.make_tensor("place", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(value, place, [1 << 40]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (outside, "other_file"),
        (lambda model: words(model).external_data.add(key="location", value="x"), "other_file"),
        (declared(1 << 40, 1 << 20), "tensor_size"),
        (declared(*[1] * 17), "tensor_size"),
        (sparse, "sparse"),
        (lambda model: model.graph.input[0].type.tensor_type.shape.dim.add(), "ends_differ"),
        (lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 1),
         "ends_differ"),
        (lambda model: setattr(
            model.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 17), "ends_differ"),
    ],
)  # fmt: skip
def test_graphs_that_exports_do_not_write_are_refused(toy_bundle, tmp_path, change, reason):
    model = onnx.load(toy_bundle / "text.int8.onnx")
    change(model)
    path = tmp_path / "text.onnx"
    path.write_bytes(model.SerializeToString())
    with refused("graph_unfit", IntegrityError, path=str(path), reason=reason):
        check_graph(path, "text", Bundle.open(toy_bundle).manifest)


def test_places_that_argmax_found_are_taken(toy_bundle, tmp_path):
    model = onnx.load(toy_bundle / "text.int8.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    nodes = model.graph.node
    gather = helper.make_node("GatherND", ["before", "place"], [*nodes[-1].output])
    nodes[-1].output[0] = "before"
    nodes.append(gather)
    nodes.insert(0, helper.make_node("Unsqueeze", ["end", "axis"], ["place"]))
    nodes.insert(0, helper.make_node("ArgMax", ["input_ids"], ["end"], keepdims=0))
    path = tmp_path / "text.onnx"
    path.write_bytes(model.SerializeToString())
    check_graph(path, "text", Bundle.open(toy_bundle).manifest)


def test_a_file_of_endless_small_fields_is_given_up(toy_bundle, tmp_path, monkeypatch):
    assert onnx_file._MOST_FIELDS == 1_000_000
    monkeypatch.setattr(onnx_file, "_MOST_FIELDS", 10_000)  # Reading them takes a second.
    path = tmp_path / "text.onnx"
    path.write_bytes(b"\x08\x07" * 20_000)
    with refused("graph_unfit", IntegrityError, reason="too_many_fields"):
        check_graph(path, "text", Bundle.open(toy_bundle).manifest)
