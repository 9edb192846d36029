import builtins
import dataclasses
import threading

import numpy as np
import pytest

from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.bundle import Bundle
from upperson_rt.canaries import Canaries
from upperson_rt.compile import compile_bundle
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError
from upperson_rt.tensorrt.builder import InputProfile, compare_engine, tower_profile
from upperson_rt.tensorrt.cache import EngineCache


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("compile") / "bundle")


@pytest.fixture
def fake(monkeypatch):
    return install_fake_tensorrt(monkeypatch)[1].behaviour


def compiled(bundle, cache, **options):
    notes = []
    return compile_bundle(bundle, "int8", cache=cache, note=notes.append, **options), notes


@pytest.mark.parametrize("version", VERSIONS)
def test_both_towers_are_built_compared_and_kept(bundle, tmp_path, monkeypatch, version):
    install_fake_tensorrt(monkeypatch, version)
    result, notes = compiled(bundle, tmp_path)
    assert [tower.tower for tower in result.towers] == ["image", "text"]
    assert notes[0].startswith(f"TensorRT {version} on Orin (compute capability 8.7, 16 multi")
    manifest = Bundle.open(bundle, "int8").manifest
    for tower in result.towers:
        record = tower.record
        assert not tower.reused
        assert tower.path.parent == result.folder == tmp_path / "engines"
        assert EngineCache(tmp_path).load(record) == tower.path.read_bytes()
        assert record.target.tensorrt == version
        assert record.variant == "int8"
        assert record.profile == tower_profile(tower.tower, manifest, 32)
        assert {c.batch_size for c in record.comparisons} == {1, 2, 7, 32}
        assert min(c.min_cosine for c in record.comparisons) > 0.9999
        assert record.versions.keys() == {"upperson_rt", "driver", "onnxruntime"}
    lengths = {c.inputs for c in result.towers[1].record.comparisons}
    assert lengths == {"4 tokens", "12 tokens", "3 to 12 tokens"}
    assert sorted(path.suffix for path in result.folder.iterdir() if path.suffix) == [
        ".engine", ".engine", ".json", ".json", ".timing",
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
def test_a_wrong_engine_is_refused_and_nothing_is_written(bundle, tmp_path, fake, batch):
    fake.wrong_batch = batch
    with pytest.raises(IntegrityError, match=rf"image tower at batch {batch} \(images\): row") as e:
        compiled(bundle, tmp_path)
    assert "nothing was written" in str(e.value)
    assert "update TensorRT, or compile another --variant" in str(e.value)
    assert [path.name for path in (tmp_path / "engines").iterdir()] == [".lock"]


def test_engines_are_used_again(bundle, tmp_path, fake):
    first, _ = compiled(bundle, tmp_path)
    fake.no_plan = True
    again, notes = compiled(bundle, tmp_path)
    assert all(tower.reused for tower in again.towers)
    assert [t.record for t in again.towers] == [t.record for t in first.towers]
    assert "the engine of the text tower is there already" in notes


def test_other_settings_build_again(bundle, tmp_path, fake):
    compiled(bundle, tmp_path)
    smaller, _ = compiled(bundle, tmp_path, workspace_mib=64)
    assert not any(tower.reused for tower in smaller.towers)
    assert set(fake.last_config._pools.values()) == {64 << 20}
    larger, _ = compiled(bundle, tmp_path, max_batch=64)
    assert not any(tower.reused for tower in larger.towers)
    assert len(EngineCache(tmp_path).records()[0]) == 4


def test_a_damaged_engine_is_built_again(bundle, tmp_path, fake):
    first, _ = compiled(bundle, tmp_path)
    first.towers[0].path.write_bytes(b"junk")
    again, notes = compiled(bundle, tmp_path)
    assert [tower.reused for tower in again.towers] == [False, True]
    assert any("building the engine of the image tower again: " in note for note in notes)
    assert first.towers[0].path.read_bytes() != b"junk"


def test_timings_are_used_again_or_left_out_with_a_note(bundle, tmp_path, fake):
    compiled(bundle, tmp_path)
    (timings,) = (tmp_path / "engines").glob("*.timing")
    assert timings.read_bytes().endswith(b" 2")  # Two towers.
    _, notes = compiled(bundle, tmp_path, max_batch=16)
    assert timings.read_bytes().endswith(b" 4")
    assert not any("could not be used" in note for note in notes)
    timings.write_bytes(b"junk")
    _, notes = compiled(bundle, tmp_path, max_batch=8)
    assert any("timings of earlier builds could not be used" in note for note in notes)
    assert timings.read_bytes().endswith(b" 2")


def test_two_at_once_build_once(bundle, tmp_path, fake):
    found = []
    waiting = threading.Event()

    def wait_for_the_other(step):
        assert waiting.wait(20)

    fake.on_step = wait_for_the_other

    def work():
        result = compile_bundle(
            bundle,
            "int8",
            cache=tmp_path,
            note=lambda text: waiting.set() if "waiting" in text else None,
        )
        found.append([tower.reused for tower in result.towers])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [[False, False], [True, True]]


def test_a_variant_that_is_not_there(bundle, tmp_path, fake):
    with pytest.raises(UsageError, match=r"no variant 'fp16', only fp32, int8: .*--trt"):
        compile_bundle(bundle, cache=tmp_path)
    with pytest.raises(InputError, match="is not a bundle"):
        compile_bundle(tmp_path, cache=tmp_path)
    with pytest.raises(UsageError, match="max_batch must be at least 1"):
        compiled(bundle, tmp_path, max_batch=0)
    with pytest.raises(UsageError, match="workspace_mib must be at least 1"):
        compiled(bundle, tmp_path, workspace_mib=0)


def test_what_is_missing_is_said_before_anything_is_built(bundle, tmp_path, monkeypatch):
    driver, trt = install_fake_tensorrt(monkeypatch)
    trt.behaviour.on_step = lambda step: pytest.fail("a build was started")
    real_import = builtins.__import__

    def without_onnxruntime(name, *arguments, **options):
        if name.partition(".")[0] == "onnxruntime":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without_onnxruntime)
        with pytest.raises(BackendError, match="needs the package 'onnxruntime'"):
            compiled(bundle, tmp_path)
    with pytest.raises(BackendError, match="GPUs found: cuda:0 Orin"):
        compiled(bundle, tmp_path, device="cuda:3")
    driver.fail["cuInit"] = 100
    with pytest.raises(BackendError, match="TensorRT needs an NVIDIA GPU"):
        compiled(bundle, tmp_path)


def test_a_damaged_bundle_is_refused(bundle, tmp_path, fake):
    damaged = make_toy_bundle(tmp_path / "damaged")
    (damaged / "text.int8.onnx").write_bytes(b"junk")
    with pytest.raises(IntegrityError, match=r"text\.int8\.onnx has 4 bytes"):
        compiled(damaged, tmp_path)


class Recorder:
    """Stands for a tower: an embedding that depends on every number of its row."""

    def __init__(self, dim=8):
        self.shapes, self.rows, self.dim = [], [], dim

    def __call__(self, rows):
        self.shapes.append(rows.shape)
        self.rows.append(rows)
        flat = rows.reshape(len(rows), -1).astype(np.float32)
        weights = np.random.default_rng(0).normal(size=(flat.shape[1], self.dim))
        return (flat @ weights).astype(np.float32)


CANARIES = Canaries(
    images=np.random.default_rng(1).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8),
    input_ids=np.array([[90, 5, 6, 7, 91, 0, 0], [90, 8, 91, 0, 0, 0, 0]], np.int32),
    image_embeds=np.zeros((3, 8), np.float32),
    text_embeds=np.zeros((2, 8), np.float32),
)
TEXTS = InputProfile("input_ids", (1, 1), (8, 9), (20, 12))
IMAGES = InputProfile("image", (1, 6, 5, 3), (8, 6, 5, 3), (20, 6, 5, 3))


def test_the_inputs_of_a_comparison_are_many_and_different():
    engine, reference = Recorder(), Recorder()
    compare_engine("image", engine, reference, CANARIES, IMAGES, 0.99, "x")
    assert [shape[0] for shape in engine.shapes] == [1, 2, 7, 20]
    (images,) = reference.rows
    assert len(np.unique(images.reshape(16, -1), axis=0)) == 15  # 3 canaries, 5 shifts each.

    engine, reference = Recorder(), Recorder()
    compare_engine("text", engine, reference, CANARIES, TEXTS, 0.99, "x")
    assert [shape[1] for shape in reference.shapes] == [4, 9, 12, 12]
    for ids in reference.rows:
        for row in ids:
            tokens = row[: np.flatnonzero(row).max() + 1]
            assert (tokens[0], tokens[-1]) == (90, 91)
            assert set(tokens[1:-1]) <= {5, 6, 7, 8}
    lengths = [[int(np.flatnonzero(row).max()) + 1 for row in ids] for ids in reference.rows]
    assert [set(found) for found in lengths[:3]] == [{4}, {9}, {12}]
    assert (min(lengths[3]), max(lengths[3])) == (3, 12)


def test_small_engines_are_compared_at_the_batches_they_have():
    engine = Recorder()
    profile = dataclasses.replace(IMAGES, max=(3, 6, 5, 3))
    found = compare_engine("image", engine, Recorder(), CANARIES, profile, 0.99, "x")
    assert [comparison.batch_size for comparison in found] == [1, 2, 3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: np.where(np.arange(8) == 3, np.nan, rows), "1 of 1 embeddings are not fin"),
        (lambda rows: rows[:, :4], r"gives embeddings of shape \(1, 4\), ONNX Runtime \(1, 8\)"),
        (lambda rows: -rows, r"row 0 has cosine -1\.00000"),
        (lambda rows: rows * 0, r"row 0 has cosine 0\.00000"),
        (lambda rows: rows if len(rows) < 7 else np.roll(rows, 1, axis=0), "batch 7"),
    ],
)
def test_what_counts_as_different(damage, message):
    tower = Recorder()
    with pytest.raises(IntegrityError, match=message):
        compare_engine(
            "image", lambda rows: damage(tower(rows)), tower, CANARIES, IMAGES, 0.9999, "x"
        )
