"""ONNX Runtime's own kernels: fp32 without TF32, fp16 as it was simulated."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.helpers.toy_graphs import TOWERS, min_cosine, toy_graph, toy_inputs
from upperson_export.graphs import build_variant, open_simulated
from upperson_export.variants import VARIANTS
from upperson_rt.backends import open_backend
from upperson_rt.towers import run_tower

FP32_TOLERANCE = 2e-5
"""Of elements of unit-norm embeddings. Ten bits of mantissa, as in TF32, move them by 3e-4."""

pytestmark = pytest.mark.usefixtures("toy_graphs")


@pytest.mark.parametrize("tower", TOWERS)
def test_fp32_is_that_of_the_cpu(onnxruntime_device, tower):
    file, rows = toy_graph(tower).file, toy_inputs(tower, 17)
    expected = run_tower(open_backend(file, "onnxruntime"), tower, rows)
    found = run_tower(open_backend(file, "onnxruntime", onnxruntime_device), tower, rows)
    print(f"{tower} fp32: differs by {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=FP32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("tower", TOWERS)
def test_fp16_is_what_was_simulated(onnxruntime_device, tower, tmp_path):
    file, rows = tmp_path / "fp16.onnx", toy_inputs(tower, 17)
    ir.save(build_variant(toy_graph(tower), "fp16"), file)
    expected = run_tower(open_simulated(file), tower, rows)
    found = run_tower(open_backend(file, "onnxruntime", onnxruntime_device), tower, rows)
    lowest = min_cosine(found, expected)
    print(f"{tower} fp16: lowest cosine to the simulation {lowest:.7f}")
    assert lowest >= VARIANTS["fp16"].canary_min_cosine
