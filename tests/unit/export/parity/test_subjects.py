"""What is compared: bundles on backends, and a model with its folded towers and their export."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_graphs import TOWERS, min_cosine, run_graph, toy_graph, toy_inputs
from tests.helpers.toy_parity import BATCH_SIZES, check
from upperson_export.graphs import build_variant
from upperson_export.parity.comparisons import ParityComparison, iter_comparisons, make_reference
from upperson_export.parity.inputs import ParityInputs
from upperson_export.parity.subjects import (
    BackendChoice,
    NotRun,
    Subject,
    Tolerance,
    bundle_reference,
    choose_backends,
    export_subjects,
    folded_towers,
    iter_bundle_subjects,
    open_subject,
    torch_subject,
)
from upperson_rt.errors import BackendError, IntegrityError, UsageError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "bundle")


def bundle_comparisons(bundle: Path, inputs: ParityInputs) -> list[ParityComparison]:
    reference = make_reference(bundle_reference(bundle, threads=1), inputs)
    found = []
    for one in iter_bundle_subjects(bundle, choose_backends([]), threads=1):
        assert isinstance(one, Subject)
        found += iter_comparisons(one, reference, inputs, BATCH_SIZES)
    return found


def test_every_variant_runs_on_every_backend(bundle: Path, inputs: ParityInputs) -> None:
    found = bundle_comparisons(bundle, inputs)
    backends = ["onnxruntime", "openvino"]
    assert list(dict.fromkeys((one.variant, one.backend.split()[0]) for one in found)) == [
        (variant, backend) for variant in ("fp32", "int8") for backend in backends
    ]
    for one in found:
        if one.to_reference is not None:
            assert one.to_reference.max_error < (1e-5 if one.variant == "fp32" else 0.5)
            assert one.not_finite is None
        assert (one.to_alone is None) == (
            one.tower == "both"
            or one.inputs in ("files", "sentences")
            or (one.batch_size == 1 and one.inputs != "padded")
        )
    int8 = [one.to_reference for one in found if one.variant == "int8" and one.to_reference]
    assert max(one.max_error for one in int8) > 1e-4


def test_tolerances_come_from_the_manifest_or_from_the_user(bundle: Path) -> None:
    def tolerances(asked: Tolerance) -> list[Tolerance]:
        backend = [BackendChoice("onnxruntime", "cpu")]
        return [one.tolerance for one in iter_bundle_subjects(bundle, backend, asked)
                if isinstance(one, Subject)]  # fmt: skip

    assert tolerances(Tolerance()) == [Tolerance(max_error=1e-5), Tolerance(min_cosine=0.9999)]
    assert tolerances(Tolerance(max_error=0.1, min_cosine=0.5)) == [
        Tolerance(max_error=0.1),
        Tolerance(min_cosine=0.5),
    ]


def test_a_variant_that_does_not_load_is_reported_and_the_rest_runs(bundle: Path) -> None:
    replace_in_bundle(bundle, "image.int8.onnx", b"no graph")
    subjects = list(iter_bundle_subjects(bundle, [BackendChoice("onnxruntime", "cpu")]))
    assert [type(one) for one in subjects] == [Subject, NotRun]
    assert isinstance(subjects[1], NotRun)
    assert subjects[1].variant == "int8"
    assert "cannot load" in subjects[1].reason


def test_a_backend_that_was_asked_for_and_runs_nothing_is_an_error(bundle: Path) -> None:
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        list(iter_bundle_subjects(bundle, [BackendChoice("onnxruntime", "cuda")]))
    with pytest.raises(UsageError, match="no backend 'onxruntime'"):
        list(iter_bundle_subjects(bundle, [BackendChoice("onxruntime", "cpu")]))
    unasked = iter_bundle_subjects(bundle, [BackendChoice("onnxruntime", "cuda", asked=False)])
    assert [type(one) for one in unasked] == [NotRun, NotRun]


def test_backends_are_chosen_by_name_and_device() -> None:
    assert [(one.name, one.device, one.asked) for one in choose_backends([])] == [
        ("onnxruntime", "cpu", False),
        ("openvino", "cpu", False),
    ]
    assert choose_backends(["onnxruntime:cuda:1", "tensorrt", "tensorrt"]) == [
        BackendChoice("onnxruntime", "cuda:1"),
        BackendChoice("tensorrt", "cuda"),
    ]
    for name in ("auto", ""):
        with pytest.raises(UsageError, match="is no backend to compare"):
            choose_backends([name])


def test_a_bundle_whose_reference_fails_its_canaries_is_refused(
    bundle: Path, tmp_path: Path
) -> None:
    other = make_toy_bundle(tmp_path / "other", seed=5)
    replace_in_bundle(bundle, "image.fp32.onnx", (other / "image.fp32.onnx").read_bytes())
    with pytest.raises(IntegrityError, match="canary"):
        bundle_reference(bundle)


def test_a_trained_model_its_folded_towers_and_its_export_agree(
    inputs: ParityInputs, tmp_path: Path
) -> None:
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


def test_a_cpu_compares_what_float16_does_to_a_typed_variant(tmp_path: Path) -> None:
    exact, paths = toy_graph("image"), {}
    for kind in TOWERS:
        paths[kind] = tmp_path / f"{kind}.fp16.onnx"
        onnx.save(build_variant(toy_graph(kind), kind, "fp16"), paths[kind])
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
