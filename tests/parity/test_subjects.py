"""What parity compares, on real towers: folded, exported, and in float16 on a CPU."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_graphs import (
    TOWERS,
    export_exchanged,
    min_cosine,
    run_graph,
    toy_graph,
    toy_inputs,
)
from tests.helpers.toy_parity import check, toy_parity_inputs
from upperson_export.graphs import build_variant
from upperson_export.parity import subjects
from upperson_export.parity.inputs import ParityInputs
from upperson_export.parity.subjects import (
    BackendChoice,
    Subject,
    export_subjects,
    folded_towers,
    open_subject,
    torch_subject,
)

pytestmark = pytest.mark.usefixtures("toy_graphs")


def test_a_trained_model_its_folded_towers_and_its_export_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "export_onnx", export_exchanged)
    inputs = toy_parity_inputs(tmp_path)
    model = toy_model(seed=3)
    rng = np.random.default_rng(0)
    ids = [np.array([49406, *rng.integers(1, 49000, n), 49407], np.int32) for n in (1, 5, 30, 75)]
    pixels = rng.integers(0, 256, (4, *model.image_size, 3), dtype=np.uint8)
    given = ParityInputs(
        source="toys",
        files=inputs.files[:4],
        image_names=list("abcd"),
        pixels_NHW3=pixels,
        sentences=inputs.sentences[:4],
        sentence_ids_NL=inputs.sentence_ids_NL[:4],
        ids=ids,
        context_length=77,
    )
    towers = folded_towers(model)
    reference = torch_subject("folded", towers)
    backend = BackendChoice("onnxruntime", "cpu")
    (exported,) = export_subjects(towers, given, tmp_path, [backend], threads=1)
    assert isinstance(exported, Subject)
    result = check(exported, given, reference)
    assert result.ok, result.message()
    assert "torch " + torch.__version__ in result.reference


def test_a_cpu_compares_what_float16_does_to_a_typed_variant(tmp_path):
    exact, paths = toy_graph("image"), {}
    for kind in TOWERS:
        paths[kind] = tmp_path / f"{kind}.fp16.onnx"
        ir.save(build_variant(toy_graph(kind), "fp16"), paths[kind])
    subject, _ = open_subject("fp16", paths, BackendChoice("onnxruntime", "cpu"), threads=1)
    assert subject.backend.endswith("on cpu, float16 simulated")
    images = toy_inputs("image")
    expected, computed_in_float32 = (
        run_graph(model, images)[0] for model in (exact, onnx.load(paths["image"]))
    )
    found = subject.run("image", images)
    # Rounded weights alone are closer than rounded weights and results.
    assert min_cosine(found, expected) > 0.999
    assert np.abs(found - expected).max() > 1.2 * np.abs(computed_in_float32 - expected).max()
