"""What is compared: bundles on backends, and a model with its folded towers and their export."""

from dataclasses import replace

import pytest

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from tests.helpers.toy_parity import BATCH_SIZES
from upperson_export.parity.comparisons import iter_comparisons, make_reference
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
def bundle(tmp_path):
    return make_toy_bundle(tmp_path / "bundle")


def test_every_variant_runs_on_every_backend(bundle, inputs):
    reference, found = make_reference(bundle_reference(bundle, threads=1), inputs), []
    for one in iter_bundle_subjects(bundle, choose_backends([]), threads=1):
        found += iter_comparisons(one, reference, inputs, BATCH_SIZES)
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


def test_tolerances_come_from_the_table_the_manifest_or_the_user(bundle):
    def tolerances(given):
        backend = [BackendChoice("onnxruntime", "cpu")]
        return [one.tolerance for one in iter_bundle_subjects(bundle, backend, given)
                if isinstance(one, Subject)]  # fmt: skip

    assert tolerances(Tolerance()) == [Tolerance(max_error=1e-5), Tolerance(min_cosine=0.99)]
    later = replace(Bundle.open(bundle).entry, precision="later", canary_min_cosine=0.95)
    assert tolerance_of(later, Tolerance()) == Tolerance(min_cosine=0.95)
    assert tolerances(Tolerance(max_error=0.1, min_cosine=0.5)) == [
        Tolerance(max_error=0.1),
        Tolerance(min_cosine=0.5),
    ]


def test_a_variant_that_does_not_load_is_reported_and_the_rest_runs(bundle):
    replace_in_bundle(bundle, "image.int8.onnx", b"no graph")
    subjects = list(iter_bundle_subjects(bundle, [BackendChoice("onnxruntime", "cpu")]))
    assert [type(one) for one in subjects] == [Subject, NotRun]
    assert isinstance(subjects[1], NotRun)
    assert subjects[1].variant == "int8"
    assert "cannot load" in subjects[1].reason


def test_a_named_backend_that_runs_no_variant_is_an_error(bundle):
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        list(iter_bundle_subjects(bundle, [BackendChoice("onnxruntime", "cuda")]))
    with pytest.raises(UsageError):
        list(iter_bundle_subjects(bundle, [BackendChoice("onxruntime", "cpu")]))
    unnamed = iter_bundle_subjects(bundle, [BackendChoice("onnxruntime", "cuda", named=False)])
    assert [type(one) for one in unnamed] == [NotRun, NotRun]


def test_backends_are_chosen_by_name_and_device():
    assert choose_backends([]) == [
        BackendChoice("onnxruntime", "cpu", named=False),
        BackendChoice("openvino", "cpu", named=False),
    ]
    assert choose_backends(["onnxruntime:cuda:1", "tensorrt", "tensorrt"]) == [
        BackendChoice("onnxruntime", "cuda:1"),
        BackendChoice("tensorrt", "cuda"),
    ]
    for name in ("auto", ""):
        with refused("backend_not_single", UsageError, found=name):
            choose_backends([name])


def test_a_reference_that_differs_from_its_golden_samples_is_refused(bundle, tmp_path):
    other = make_toy_bundle(tmp_path / "other", seed=5)
    replace_in_bundle(bundle, "image.fp32.onnx", (other / "image.fp32.onnx").read_bytes())
    with pytest.raises(IntegrityError):
        bundle_reference(bundle)
