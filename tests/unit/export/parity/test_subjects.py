"""What is compared: bundles on backends, and a model with its folded towers and their export."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from tests.helpers.toy_parity import BATCH_SIZES
from upperson_export.parity.comparisons import ParityComparison, iter_comparisons, make_reference
from upperson_export.parity.inputs import ParityInputs
from upperson_export.parity.subjects import (
    BackendChoice,
    NotRun,
    Subject,
    Tolerance,
    bundle_reference,
    choose_backends,
    iter_bundle_subjects,
    tolerance_of,
)
from upperson_rt.bundle import Bundle
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


def test_tolerances_come_from_the_table_the_manifest_or_the_user(bundle: Path) -> None:
    def tolerances(asked: Tolerance) -> list[Tolerance]:
        backend = [BackendChoice("onnxruntime", "cpu")]
        return [one.tolerance for one in iter_bundle_subjects(bundle, backend, asked)
                if isinstance(one, Subject)]  # fmt: skip

    assert tolerances(Tolerance()) == [Tolerance(max_error=1e-5), Tolerance(min_cosine=0.99)]
    later = replace(Bundle.open(bundle).entry, precision="later", canary_min_cosine=0.95)
    assert tolerance_of(later, Tolerance()) == Tolerance(min_cosine=0.95)
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
