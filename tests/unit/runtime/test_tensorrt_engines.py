"""Engines are built, compared with ONNX Runtime, and kept: on stand-ins, and by a real compiler.

TensorRT for RTX has the API of TensorRT and compiles without a GPU; its engines cannot be loaded
here, so nothing is run.
"""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from tests.helpers.refused import refused
from upperson_rt.bundle import Bundle, read_manifest
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError
from upperson_rt.golden_samples import GoldenSamples
from upperson_tensorrt.builder import InputProfile, build_engine, compare_engine, tower_profile
from upperson_tensorrt.cache import EngineCache
from upperson_tensorrt.compile import compile_bundle
from upperson_tensorrt.cuda import Cuda

RTX = "RTX"


def rtx():
    """The compiler, loaded by its own tests alone: it takes 100 MB."""
    return pytest.importorskip(
        "tensorrt_rtx",
        reason="needs tensorrt-rtx-cu13, which is optional (x86-64 or aarch64 Linux)",
    )


@pytest.fixture(params=[*VERSIONS, RTX])
def build(request, toy_bundle, monkeypatch):
    """A function that builds an engine with a stand-in or with TensorRT for RTX."""
    is_rtx, profile = request.param == RTX, tower_profile("image", read_manifest(toy_bundle), 32)
    trt = rtx() if is_rtx else install_fake_tensorrt(monkeypatch, request.param)[1]

    def build(file=toy_bundle / "image.fp32.onnx", profile=profile, **options):
        options |= {"workspace_bytes": 64 << 20, "targets": ("SM86",) if is_rtx else ()}
        with nullcontext() if is_rtx else Cuda().current():
            return build_engine(trt, file, profile, **options)

    build.trt, build.profile = trt, profile
    return build


on_stand_ins = pytest.mark.parametrize("build", VERSIONS, indirect=True)


@on_stand_ins
def test_settings_are_those_all_versions_have(build):
    steps = []
    build(progress=lambda *step: steps.append(step))
    config = build.trt.behaviour.last_config
    assert build.profile == InputProfile("image", (1, 24, 8, 3), (8, 24, 8, 3), (32, 24, 8, 3))
    assert config._flags == set()  # No precision flags, and TF32 is off.
    assert config._pools == {build.trt.MemoryPoolType.WORKSPACE: 64 << 20}
    shapes = {"image": (build.profile.min, build.profile.opt, build.profile.max)}
    assert [one._shapes for one in config._profiles] == [shapes]
    assert steps == [("Building engine", n, 3) for n in range(4)]


def test_every_error_of_the_parser_is_passed_on(toy_bundle, build, tmp_path):
    model = onnx.load(toy_bundle / "image.fp32.onnx")
    model.graph.node.extend(
        helper.make_node("Det", ["raw"], [f"x{i}"], name=f"odd/{i}") for i in range(2)
    )
    onnx.save(model, tmp_path / "odd.onnx")
    with refused("graph_not_parsed", BackendError, path=str(tmp_path / "odd.onnx")) as found:
        build(tmp_path / "odd.onnx")
    assert "node 'odd/0' (Det): " in str(found.value)
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with refused("graph_not_parsed", BackendError):
        build(tmp_path / "junk.onnx")


def test_a_graph_that_is_not_the_tower_and_shapes_that_are_refused(toy_bundle, build, tmp_path):
    model = onnx.load(toy_bundle / "image.fp32.onnx")
    model.graph.output.append(onnx.helper.make_tensor_value_info("raw", 1, None))
    model.graph.output[1].name = model.graph.node[0].output[0]
    onnx.save(model, tmp_path / "two.onnx")
    larger = InputProfile("image", (1, 48, 8, 3), (8, 48, 8, 3), (32, 48, 8, 3))
    upside_down = InputProfile("image", (4, 24, 8, 3), (2, 24, 8, 3), (8, 24, 8, 3))
    for options, code, error in (
        ({"file": toy_bundle / "text.fp32.onnx"}, "no_tower", IntegrityError),
        ({"file": tmp_path / "two.onnx"}, "no_tower", IntegrityError),
        ({"profile": larger}, "no_tower", IntegrityError),
        ({"profile": upside_down}, "shapes_refused", BackendError),
    ):
        with refused(code, error):
            build(**options)


class StoppedError(Exception):
    """What a program's own handler of a signal raises."""


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, StoppedError)]
)
def test_a_signal_cancels_the_build_and_goes_on_to_its_handler(build, number, raised):
    seen = []

    def interrupt(phase, step, steps):
        seen.append(step)
        if step == 1:
            os.kill(os.getpid(), number)

    def stop(signum, frame):
        raise raised("the program's own")

    before = signal.signal(number, stop)
    try:
        with pytest.raises(raised, match="the program's own"):
            build(progress=interrupt)
        assert max(seen) == 1
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


@on_stand_ins
def test_a_build_that_fails_gives_the_reason(build, monkeypatch):
    build.trt.behaviour.no_plan = True
    with refused("engine_not_built", BackendError) as found:
        build()
    assert "Could not find any implementation" in str(found.value)
    driver, trt = install_fake_tensorrt(monkeypatch)
    driver.fail["cuInit"] = 100
    with refused("tensorrt_not_started", BackendError):
        build_engine(trt, "image.onnx", build.profile, workspace_bytes=1)


@pytest.fixture
def fake(monkeypatch):
    return install_fake_tensorrt(monkeypatch)[1].behaviour


@pytest.fixture
def compiled(toy_bundle, tmp_path):
    """A function that compiles; it returns the result, what was reused, and the notes."""

    def compiled(bundle=toy_bundle, **options):
        notes = []
        found = compile_bundle(bundle, "int8", cache=tmp_path, note=notes.append, **options)
        return found, [tower.reused for tower in found.towers], " ".join(notes)

    return compiled


@pytest.mark.parametrize("version", VERSIONS)
def test_both_towers_are_built_compared_and_kept(
    toy_bundle, compiled, tmp_path, monkeypatch, version
):
    install_fake_tensorrt(monkeypatch, version)
    result, reused, notes = compiled()
    assert [tower.tower for tower in result.towers] == ["image", "text"]
    assert reused == [False, False]
    assert notes.startswith(f"TensorRT {version} on Orin (compute capability 8.7, 16 multi")
    manifest = Bundle.open(toy_bundle, "int8").manifest
    for tower in result.towers:
        record = tower.record
        assert tower.path.parent == result.folder == tmp_path / "engines"
        assert EngineCache(tmp_path).load(record) == tower.path.read_bytes()
        assert (record.target.tensorrt, record.variant) == (version, "int8")
        assert record.profile == tower_profile(tower.tower, manifest, 32)
        assert {c.batch_size for c in record.comparisons} == {1, 2, 7, 32}
        assert min(c.min_cosine for c in record.comparisons) > 0.9999
        assert record.versions.keys() == {"upperson_rt", "driver", "onnxruntime"}
    lengths = {c.inputs for c in result.towers[1].record.comparisons}
    assert lengths == {"4 tokens", "12 tokens", "3 to 12 tokens"}
    suffixes = sorted(path.suffix for path in result.folder.iterdir() if path.suffix)
    assert suffixes == [".engine", ".engine", ".json", ".json", ".timing"]


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_a_wrong_engine_is_refused_and_nothing_is_written(compiled, tmp_path, fake, batch):
    fake.wrong_batch = batch
    with refused("embeds_differ", IntegrityError, tower="image", batch_size=batch):
        compiled()
    assert [path.name for path in (tmp_path / "engines").iterdir()] == [".lock"]


def test_engines_are_used_again_unless_damaged_or_made_otherwise(compiled, tmp_path, fake):
    first, *_ = compiled()
    fake.no_plan = True
    again, reused, notes = compiled()
    assert reused == [True, True]
    assert [t.record for t in again.towers] == [t.record for t in first.towers]
    assert "the engine of the text tower is there already" in notes
    fake.no_plan = False
    first.towers[0].path.write_bytes(b"junk")
    _, reused, notes = compiled()
    assert reused == [False, True]
    assert "building the engine of the image tower again: " in notes
    assert first.towers[0].path.read_bytes() != b"junk"
    assert compiled(workspace_mib=64)[1] == [False, False]
    assert set(fake.last_config._pools.values()) == {64 << 20}
    assert compiled(max_batch=64)[1] == [False, False]
    assert len(EngineCache(tmp_path).records()[0]) == 4


def test_two_at_once_build_once(toy_bundle, tmp_path, fake):
    waiting = threading.Event()
    fake.on_step = lambda step: waiting.wait(20) or pytest.fail("nobody waits")

    def note(text):
        if "waiting" in text:
            waiting.set()

    def work(_):
        towers = compile_bundle(toy_bundle, "int8", cache=tmp_path, note=note).towers
        return [tower.reused for tower in towers]

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(work, range(2))) == [[False, False], [True, True]]


def test_what_is_wrong_is_said_before_anything_is_built(
    toy_bundle, folder, compiled, tmp_path, monkeypatch
):
    driver, trt = install_fake_tensorrt(monkeypatch)
    trt.behaviour.on_step = lambda step: pytest.fail("a build was started")
    with refused("variant_unknown", UsageError, variant="fp16"):
        compile_bundle(toy_bundle, cache=tmp_path)
    (folder / "text.int8.onnx").write_bytes(b"junk")
    for options, code, error, fields in (
        ({"bundle": tmp_path}, "no_bundle", InputError, {}),
        ({"max_batch": 0}, "out_of_range", UsageError, {"what": "max_batch"}),
        ({"workspace_mib": 0}, "out_of_range", UsageError, {"what": "workspace_mib"}),
        ({"bundle": folder}, "size_differs", IntegrityError, {"found": 4}),
        ({"device": "cuda:3"}, "device_missing", BackendError, {"device": "cuda:3"}),
    ):
        with refused(code, error, **fields):
            compiled(**options)
    driver.fail["cuInit"] = 100
    with refused("no_driver", BackendError):
        compiled()


def tower(rows):
    """Embeddings that depend on every number of their row."""
    flat = rows.reshape(len(rows), -1).astype(np.float32)
    weights = np.random.default_rng(0).normal(size=(flat.shape[1], 8))
    return (flat @ weights).astype(np.float32)


GOLDEN = GoldenSamples(
    images=np.random.default_rng(1).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8),
    input_ids=np.array([[90, 5, 6, 7, 91, 0, 0], [90, 8, 91, 0, 0, 0, 0]], np.int32),
    image_embeds=np.zeros((3, 8), np.float32),
    text_embeds=np.zeros((2, 8), np.float32),
)
IMAGES = InputProfile("image", (1, 6, 5, 3), (8, 6, 5, 3), (20, 6, 5, 3))


@pytest.mark.parametrize(
    ("damage", "code", "batch_size"),
    [
        (lambda rows: np.where(np.arange(8) == 3, np.nan, rows), "embeds_not_finite", 1),
        (lambda rows: rows[:, :4], "shape_differs", 1),
        (lambda rows: rows * 0, "embeds_differ", 1),
        (lambda rows: rows if len(rows) < 7 else np.roll(rows, 1, axis=0), "embeds_differ", 7),
    ],
)
def test_what_counts_as_different(damage, code, batch_size):
    def engine(rows):
        return damage(tower(rows))

    with refused(code, IntegrityError, batch_size=batch_size):
        compare_engine("image", engine, tower, GOLDEN, IMAGES, 0.9999, "x")
