"""Layer sensitivity on towers made by hand, and the search for smoothing factors."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from tests.helpers.refused import refused
from upperson_calibration.graph import BlockLinear, TowerGraph
from upperson_calibration.ranges import AbsHistogram, Observed, round_activation, round_weight
from upperson_calibration.sensitivity import rank_by_sensitivity
from upperson_calibration.smoothing import choose_smoothing
from upperson_rt.errors import InputError

INPUTS, DIM = 12, 8
FC1, FC2 = "fc1", "fc2"


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


HEADS = {
    "image": ("uint8[N, 2, 2, 3] image", "f = Cast<to = 1>(image)\n x = Flatten(f)"),
    "text": (
        "int32[N, L] input_ids",
        "t = Gather(table, input_ids)\n x = ReduceSum<keepdims = 0>(t, axis)",
    ),
}


class HandMade:
    """relu(x W1) W2, normalised; x is pixels, or the sum of one-hot tokens."""

    def __init__(self, folder, kind):
        rng = np.random.default_rng(0)
        self.kind = kind
        self.weights = {
            name: rng.normal(size=shape).astype(np.float32)
            for name, shape in ((FC1, (INPUTS, 16)), (FC2, (16, DIM)))
        }
        self.table = rng.normal(size=(60, INPUTS)).astype(np.float32)
        self.table[0] = 0
        if kind == "image":
            self.inputs = rng.integers(0, 256, (30, 2, 2, 3), dtype=np.uint8)
        else:
            self.inputs = rng.integers(1, 60, (30, 5), dtype=np.int32)
            self.inputs[::2, 3:] = 0
        ends, head = HEADS[kind]
        proto = parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 18]>
        g ({ends}) => (float[N, {DIM}] embeds) {{
            {head}
            h = MatMul(x, {FC1})
            r = Relu(h)
            y = MatMul(r, {FC2})
            embeds = LpNormalization<axis = 1>(y)
        }}""")
        for node in proto.graph.node:
            node.name = f"{node.input[1]}/MatMul" if node.op_type == "MatMul" else ""
        for name, array in {"table": self.table, "axis": np.array([1]), **self.weights}.items():
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        self.path = folder / f"{kind}.onnx"
        onnx.save(proto, self.path)
        linears = ((FC1, "x"), (FC2, "r"))
        self.graph = TowerGraph(
            kind, self.path, tuple(BlockLinear(f"{n}/MatMul", x, n, None) for n, x in linears)
        )

    def x(self):
        if self.kind == "image":
            return self.inputs.reshape(-1, INPUTS).astype(np.float32)
        return self.table[self.inputs].sum(axis=1)

    def embeds(self, amax, rounded=None):
        value = self.x()
        for name, tensor in ((FC1, "x"), (FC2, "r")):
            weight = self.weights[name]
            if name == rounded:
                value, weight = round_activation(value, amax[tensor]), round_weight(weight)
            value = value @ weight
            if name == FC1:
                value = np.maximum(value, 0)
        return unit(value)


def others(count=20):
    return unit(np.random.default_rng(9).normal(size=(count, DIM)).astype(np.float32))


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_loss_is_that_of_one_rounded_linear(tmp_path, kind):
    tower = HandMade(tmp_path, kind)
    # A hundred times too wide a range for fc2: it must come first. A few values of fc1 saturate.
    amax = {"x": 0.9 * float(np.abs(tower.x()).max()), "r": 100 * float(tower.x().max())}
    other = others()
    calls = []
    ranking = rank_by_sensitivity(
        tower.graph, amax, tower.inputs, other, batch_size=7, threads=1,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert calls == [(1, 2), (2, 2)]
    assert list(tmp_path.iterdir()) == [tower.path]
    with refused("no_samples", InputError):
        rank_by_sensitivity(tower.graph, amax, tower.inputs[:0], other)
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


WIDTH = 32
SITES = {"qkv": "ln_1", "q": "ln_1", "kv": "ln_1", "fc1": "ln_2", "fc2": None}


def observed(rows):
    half = np.arange(len(rows)) % 2
    maxima = [np.abs(rows[half == value]).max(axis=0) for value in (0, 1)]
    return Observed(AbsHistogram(), np.stack(maxima), rows, half)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rows(seed, largest=1.0):
    """Inputs whose channels grow up to a factor."""
    return normal(seed, 200, WIDTH) * np.geomspace(1, largest, WIDTH).astype(np.float32)


@pytest.fixture
def choose(tmp_path):
    def run(weights, inputs):
        """Choose factors for Linears by name, from the rows or statistics that enter them."""
        constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
        file = tmp_path / "linears.onnx"
        onnx.save(helper.make_model(helper.make_graph([], "linears", [], [], constants)), file)
        linears = (BlockLinear(f"{name}/M", name, name, SITES[name]) for name in weights)
        seen = {
            name: one if isinstance(one, Observed) else observed(one)
            for name, one in inputs.items()
        }
        return choose_smoothing(TowerGraph("image", file, tuple(linears)), seen)

    return run


def test_loud_channels_are_evened_out(choose):
    """Inputs 64 times as large, weights as much smaller."""
    loud = np.ones(WIDTH, np.float32)
    loud[[3, 17]] = 64
    weight = normal(1, WIDTH, 48)
    found = choose({"fc1": weight / loud[:, None]}, {"fc1": rows(0) * loud})
    assert list(found) == ["ln_2"]
    smoothing = found["ln_2"]
    quiet = choose({"fc1": weight}, {"fc1": rows(0)})["ln_2"]
    assert smoothing.error_before > 100 * quiet.error_before
    assert smoothing.error_after < 2 * quiet.error_before
    others = np.delete(smoothing.factors, [3, 17])
    np.testing.assert_allclose(smoothing.factors[[3, 17]] / np.median(others), 64, rtol=0.5)


def test_no_factors_are_chosen_if_they_do_not_help(choose):
    """The numbers are in int8 already: any factor only coarsens some weights."""
    exact = np.random.default_rng(0).integers(-127, 128, (200, WIDTH)).astype(np.float32)
    exact[:, 0] = 127
    exact[:2] = 127  # Both halves have the same maxima.
    whole = np.random.default_rng(1).integers(-127, 128, (WIDTH, 8)).astype(np.float32)
    whole[0] = 127
    smoothing = choose({"fc1": whole}, {"fc1": exact})["ln_2"]
    assert smoothing.alpha is None
    assert (smoothing.factors == 1).all()
    assert smoothing.error_after == smoothing.error_before


def test_silent_channels_and_unread_rows_keep_factor_one(choose):
    silent, unread = rows(4, 200), normal(5, WIDTH, 48)
    silent[:, 7] = 0
    unread[9] = 0
    smoothing = choose({"fc1": unread}, {"fc1": silent})["ln_2"]
    assert smoothing.alpha is not None
    assert smoothing.exponents[[7, 9]].tolist() == [0, 0]
    assert np.isfinite(smoothing.factors).all()


def test_alpha_is_judged_on_held_out_samples_unless_there_is_one(choose):
    """Channels that are quiet in one half and loud in the other: equalising them saturates."""
    unseen = rows(6)
    unseen[::2, :16] *= 0.02
    unseen[1::2, 16:] *= 0.02
    assert choose({"fc1": normal(7, WIDTH, 48)}, {"fc1": unseen})["ln_2"].alpha is None
    alone = observed(rows(0, 30))
    alone.half_max[1] = 0
    alone.row_half[:] = 0
    smoothing = choose({"fc1": normal(7, WIDTH, 48)}, {"fc1": alone})["ln_2"]
    assert smoothing.error_after < smoothing.error_before
