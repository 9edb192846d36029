"""The builder against real bindings: TensorRT for RTX has the same API and compiles without a GPU.

Engines cannot be loaded without a GPU, so nothing is run here.
"""

from importlib import import_module

import onnx
import pytest
from onnx import helper

from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.bundle import read_manifest
from upperson_rt.errors import BackendError, IntegrityError
from upperson_rt.tensorrt.builder import InputProfile, build_engine, tower_profile


@pytest.fixture(scope="module", autouse=True)
def trt():
    """The compiler, loaded by its own tests alone: it takes 100 MB."""
    return pytest.importorskip(
        "tensorrt_rtx",
        reason="needs tensorrt-rtx-cu13, which is optional (x86-64 or aarch64 Linux)",
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("rtx") / "bundle")


def build(file, profile, **options):
    trt = import_module("tensorrt_rtx")
    return build_engine(trt, file, profile, workspace_bytes=64 << 20, targets=("SM86",), **options)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_compiles(bundle, tower):
    profile = tower_profile(tower, read_manifest(bundle), 32)
    steps = []
    built = build(bundle / f"{tower}.fp32.onnx", profile, progress=lambda *step: steps.append(step))
    assert len(built.plan) > 10_000
    assert ("Building engine", 0, 6) in steps
    assert all(0 <= done <= total for _, done, total in steps)


def test_the_parsers_errors_are_passed_on(bundle, tmp_path):
    profile = tower_profile("image", read_manifest(bundle), 32)
    model = onnx.load(bundle / "image.fp32.onnx")
    model.graph.node.append(helper.make_node("Det", ["raw"], ["x"], name="odd"))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(BackendError, match=r"cannot parse .*odd\.onnx: node 'odd' \(Det\): "):
        build(tmp_path / "odd.onnx", profile)
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(BackendError, match=r"cannot parse .*Failed to parse the ONNX model"):
        build(tmp_path / "junk.onnx", profile)
    with pytest.raises(IntegrityError, match=r"found inputs \{'input_ids': \(-1, -1\)\}"):
        build(bundle / "text.fp32.onnx", profile)


def test_a_refused_profile_is_noticed(bundle):
    upside_down = InputProfile("image", (4, 24, 8, 3), (2, 24, 8, 3), (8, 24, 8, 3))
    with pytest.raises(BackendError, match="refuses the shapes"):
        build(bundle / "image.fp32.onnx", upside_down)


def test_a_cancelled_build_ends_at_once(bundle):
    profile = tower_profile("image", read_manifest(bundle), 32)
    import signal

    def interrupt(phase, step, steps):
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(bundle / "image.fp32.onnx", profile, progress=interrupt)


def test_without_targets_a_gpu_is_needed(trt, bundle):
    from upperson_rt.tensorrt.cuda import probe_cuda_driver

    if probe_cuda_driver().devices:
        pytest.skip("there is a GPU here")
    profile = tower_profile("image", read_manifest(bundle), 32)
    with pytest.raises(BackendError, match="cannot build"):
        build_engine(trt, bundle / "image.fp32.onnx", profile, workspace_bytes=1 << 20)
