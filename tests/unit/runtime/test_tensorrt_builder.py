import os
import signal
import threading

import onnx
import pytest
from onnx import helper

from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.bundle import read_manifest
from upperson_rt.errors import BackendError, IntegrityError, UsageError
from upperson_rt.tensorrt.builder import InputProfile, build_engine, tower_profile
from upperson_rt.tensorrt.cuda import Cuda


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("builder") / "bundle")


@pytest.fixture(params=VERSIONS)
def trt(request, monkeypatch):
    _, trt = install_fake_tensorrt(monkeypatch, request.param)
    with Cuda().current():
        yield trt


@pytest.fixture
def profile(bundle):
    return tower_profile("image", read_manifest(bundle), 32)


def build(trt, bundle, profile, file="image.fp32.onnx", **options):
    return build_engine(trt, bundle / file, profile, workspace_bytes=1 << 20, **options)


def test_profiles(bundle):
    manifest = read_manifest(bundle)
    image = tower_profile("image", manifest, 32)
    assert image == InputProfile("image", (1, 24, 8, 3), (8, 24, 8, 3), (32, 24, 8, 3))
    assert image.label == "1.8.32"
    text = tower_profile("text", manifest, 4)
    assert text == InputProfile("input_ids", (1, 2), (4, 12), (4, 12))
    assert text.label == "1.4.4x2.12.12"
    assert tower_profile("image", manifest, 1).label == "fixed"
    with pytest.raises(UsageError, match="max_batch must be at least 1"):
        tower_profile("image", manifest, 0)


def test_settings_are_those_all_versions_have(trt, bundle, profile):
    built = build(trt, bundle, profile)
    config = trt.behaviour.last_config
    assert config._flags == set()  # No precision flags, and TF32 is off.
    assert config._pools == {trt.MemoryPoolType.WORKSPACE: 1 << 20}
    assert [p._shapes for p in config._profiles] == [
        {"image": ((1, 24, 8, 3), (8, 24, 8, 3), (32, 24, 8, 3))}
    ]
    assert built.plan.endswith((bundle / "image.fp32.onnx").read_bytes())
    assert built.timing_cache is None


def test_progress(trt, bundle, profile):
    steps = []
    build(trt, bundle, profile, progress=lambda *step: steps.append(step))
    assert steps == [("Building engine", n, 3) for n in range(4)]


def test_the_timing_cache_grows_from_build_to_build(trt, bundle, profile):
    first = build(trt, bundle, profile, timing_cache=b"")
    assert not first.timing_cache_used
    second = build(trt, bundle, profile, timing_cache=first.timing_cache)
    assert second.timing_cache_used
    assert second.timing_cache == first.timing_cache[:-1] + b"2"


@pytest.mark.parametrize("content", [b"junk", b"timings 9.9.9 4"])
def test_an_unreadable_timing_cache_is_left_out(trt, bundle, profile, content):
    built = build(trt, bundle, profile, timing_cache=content)
    assert not built.timing_cache_used
    assert built.timing_cache.endswith(b" 1")


def test_every_error_of_the_parser_is_listed(trt, bundle, profile, tmp_path):
    model = onnx.load(bundle / "image.fp32.onnx")
    model.graph.node.extend(
        helper.make_node("Det", ["raw"], [f"x{i}"], name=f"odd/{i}") for i in range(2)
    )
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(BackendError) as raised:
        build(trt, tmp_path, profile, "bad.onnx")
    message = str(raised.value)
    assert message.startswith(f"TensorRT {trt.__version__} cannot parse {tmp_path}/bad.onnx: ")
    for i in range(2):
        assert f"node 'odd/{i}' (Det): UNSUPPORTED_NODE: no such importer" in message
    assert "compile another --variant" in message

    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(BackendError, match=r"cannot parse .*Failed to parse the ONNX model"):
        build(trt, tmp_path, profile, "junk.onnx")


def test_a_graph_that_is_not_the_tower(trt, bundle, profile):
    with pytest.raises(IntegrityError, match=r"expected one input 'image' \(-1, 24, 8, 3\)"):
        build(trt, bundle, profile, "text.fp32.onnx")
    larger = InputProfile("image", (1, 48, 8, 3), (8, 48, 8, 3), (32, 48, 8, 3))
    with pytest.raises(IntegrityError, match=r"found inputs \{'image': \(-1, 24, 8, 3\)\}"):
        build(trt, bundle, larger)


def test_a_refused_profile_is_noticed(trt, bundle):
    upside_down = InputProfile("image", (4, 24, 8, 3), (2, 24, 8, 3), (8, 24, 8, 3))
    with pytest.raises(BackendError, match="refuses the shapes"):
        build(trt, bundle, upside_down)


def test_a_failed_build_gives_the_reason_from_the_log(trt, bundle, profile):
    trt.behaviour.no_plan = True
    with pytest.raises(BackendError, match=r"Could not find any implementation\. If memory ran"):
        build(trt, bundle, profile)


def test_without_a_driver_nothing_crashes(bundle, profile, monkeypatch):
    driver, trt = install_fake_tensorrt(monkeypatch)
    driver.fail["cuInit"] = 100
    with pytest.raises(BackendError, match=r"does not start;  upperson-rt doctor  says why"):
        build(trt, bundle, profile)


class StoppedError(Exception):
    """What a program's own handler of a signal raises."""


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, StoppedError)]
)
def test_a_signal_cancels_the_build_and_goes_on_to_its_handler(
    trt, bundle, profile, number, raised
):
    seen = []

    def interrupt(step):
        seen.append(step)
        if step == 1:
            os.kill(os.getpid(), number)

    def stop(signum, frame):
        raise raised

    trt.behaviour.on_step = interrupt
    before = signal.signal(number, stop)
    try:
        with pytest.raises(raised):
            build(trt, bundle, profile)
        assert seen == [0, 1]
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


def test_builds_in_other_threads(trt, bundle, profile):
    found = []

    def work():
        with Cuda().current():
            found.append(build(trt, bundle, profile))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1
