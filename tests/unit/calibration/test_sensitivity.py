"""Damage of single Linears, on two-layer towers made by hand and computed again in numpy."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from upperson_calibration.graph import BlockLinear, TowerGraph
from upperson_calibration.ranges import round_activation, round_weight
from upperson_calibration.sensitivity import rank_by_damage
from upperson_rt.errors import InputError
from upperson_rt.towers import Tower

WIDTH, DIM = 12, 8
FC1, FC2 = "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"


def unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class HandMade:
    """relu(x W1) W2, normalised; x is pixels, or the sum of one-hot tokens."""

    def __init__(self, folder: Path, kind: Tower, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.kind = kind
        self.weights = {
            FC1: rng.normal(size=(WIDTH, 16)).astype(np.float32),
            FC2: rng.normal(size=(16, DIM)).astype(np.float32),
        }
        self.table = rng.normal(size=(60, WIDTH)).astype(np.float32)
        self.table[0] = 0
        if kind == "image":
            self.inputs = rng.integers(0, 256, (30, 2, 2, 3), dtype=np.uint8)
        else:
            self.inputs = rng.integers(1, 60, (30, 5), dtype=np.int32)  # type: ignore[assignment]
            self.inputs[::2, 3:] = 0
        self.path = folder / f"{kind}.onnx"
        self._save()
        self.graph = TowerGraph(
            kind,
            self.path,
            tuple(
                BlockLinear(f"{name}/MatMul", activation, f"{name}.weight", None)
                for name, activation in ((FC1, "x"), (FC2, "r"))
            ),
        )

    def _save(self) -> None:
        if self.kind == "image":
            head = [
                helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
                helper.make_node("Flatten", ["float"], ["x"]),
            ]
            value = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 2, 2, 3])
        else:
            head = [
                helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
                helper.make_node("ReduceSum", ["tokens", "axis"], ["x"], keepdims=0),
            ]
            value = helper.make_tensor_value_info("input_ids", TensorProto.INT32, ["N", "L"])
        nodes = [
            *head,
            helper.make_node("MatMul", ["x", f"{FC1}.weight"], ["h"], name=f"{FC1}/MatMul"),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", f"{FC2}.weight"], ["y"], name=f"{FC2}/MatMul"),
            helper.make_node("LpNormalization", ["y"], ["embeds"], axis=1),
        ]
        constants = {"table": self.table, "axis": np.array([1])} | {
            f"{name}.weight": value for name, value in self.weights.items()
        }
        graph = helper.make_graph(
            nodes,
            "hand made",
            [value],
            [helper.make_tensor_value_info("embeds", TensorProto.FLOAT, ["N", DIM])],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        opset = helper.make_opsetid("", 18)
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), self.path)

    def x(self) -> NDArray[np.float32]:
        if self.kind == "image":
            return self.inputs.reshape(-1, WIDTH).astype(np.float32)
        return self.table[self.inputs].sum(axis=1)

    def embeds(self, amax: dict[str, float], rounded: str | None = None) -> NDArray[np.float32]:
        value = self.x()
        for name, tensor in ((FC1, "x"), (FC2, "r")):
            weight = self.weights[name]
            if name == rounded:
                value, weight = round_activation(value, amax[tensor]), round_weight(weight)
            value = value @ weight
            if name == FC1:
                value = np.maximum(value, 0)
        return unit(value)


def others(count: int = 20) -> NDArray[np.float32]:
    return unit(np.random.default_rng(9).normal(size=(count, DIM)).astype(np.float32))


@pytest.mark.parametrize("kind", ["image", "text"])
def test_damage_is_that_of_one_rounded_linear(tmp_path: Path, kind: Tower) -> None:
    tower = HandMade(tmp_path, kind)
    # A hundred times too wide a range for fc2: it must come first. A few values of fc1 saturate.
    amax = {"x": 0.9 * float(np.abs(tower.x()).max()), "r": 100 * float(tower.x().max())}
    other = others()
    ranking = rank_by_damage(tower.graph, amax, tower.inputs, other, batch_size=7, threads=1)
    assert [layer.node for layer in ranking] == [f"{FC2}/MatMul", f"{FC1}/MatMul"]
    exact = tower.embeds(amax)
    for layer in ranking:
        found = tower.embeds(amax, layer.node.removesuffix("/MatMul"))
        assert layer.cosine_loss == pytest.approx(
            1 - (exact * found).sum(axis=1, dtype=np.float64).mean(), rel=0.02, abs=2e-7
        )
        scores = [(other @ e.T if kind == "image" else e @ other.T) for e in (exact, found)]
        tops = [np.argsort(-score, axis=1)[:, :10] for score in scores]
        kept = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*tops, strict=True)])
        assert layer.overlap_loss == pytest.approx(100 * (1 - kept), abs=0.5)
        before, after = (score[:, :, None] > score[:, None, :] for score in scores)
        pairs = scores[0].shape[1] * (scores[0].shape[1] - 1) / 2
        swapped = np.triu(before != after, 1).sum(axis=(1, 2)).mean() / pairs
        assert layer.order_loss == pytest.approx(100 * swapped, abs=0.2)
    assert ranking[0].order_loss > ranking[1].order_loss


def test_progress_and_no_file_left(tmp_path: Path) -> None:
    tower = HandMade(tmp_path, "text")
    told: list[tuple[int, int]] = []
    rank_by_damage(
        tower.graph,
        {"x": 5.0, "r": 9.0},
        tower.inputs,
        others(),
        threads=1,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 2), (2, 2)]
    assert list(tmp_path.iterdir()) == [tower.path]


def test_no_sample_is_an_error(tmp_path: Path) -> None:
    tower = HandMade(tmp_path, "image")
    with pytest.raises(InputError, match="at least one sample"):
        rank_by_damage(tower.graph, {"x": 1.0, "r": 1.0}, tower.inputs[:0], others())
