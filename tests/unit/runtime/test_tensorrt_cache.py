import dataclasses
import hashlib
import json
import threading
from pathlib import Path

import pytest

from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_rt.files import cache_folder
from upperson_rt.tensorrt.builder import Comparison, InputProfile
from upperson_rt.tensorrt.cache import EngineCache, EngineRecord, Target

ORIN = Target(
    gpu="Orin (nvgpu)",
    compute_capability="8.7",
    multiprocessors=16,
    platform="linux-aarch64",
    tensorrt="10.3.0.30",
)
PLAN = b"a serialized engine"
RECORD = EngineRecord(
    target=ORIN,
    onnx_sha256="ab" * 32,
    profile=InputProfile("input_ids", (1, 1), (8, 32), (32, 77)),
    workspace_mib=1024,
    variant="fp16",
    model="toy",
    sha256=hashlib.sha256(PLAN).hexdigest(),
    size_bytes=len(PLAN),
    built="2026-11-24T12:00:00.000+00:00",
    build_seconds=12.5,
    versions={"driver": "12.6", "onnxruntime": "1.23.2"},
    min_cosine=0.999,
    comparisons=(Comparison(1, "4 tokens", min_cosine=1.0, max_error=0.0),),
)


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path)


def changed(**fields):
    return dataclasses.replace(RECORD, **fields)


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("UPPERSON_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/upperson")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/someone/.cache/upperson")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/upperson")
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert EngineCache().folder == tmp_path / "engines"


def test_a_user_without_a_home_has_to_name_a_folder(monkeypatch):
    for name in ("UPPERSON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(InputError, match=r"no home folder for a cache: set \$UPPERSON_CACHE"):
        cache_folder()


def test_the_name_has_everything_that_invalidates():
    assert RECORD.name == (
        "text-abababababababab-b1.8.32x1.32.77-orin-nvgpu-sm87x16-linux-aarch64-trt10.3.0.30"
        "-ef38b0986b37cb1f.engine"
    )
    others = [
        changed(onnx_sha256="cd" * 32),
        changed(profile=InputProfile("input_ids", (1, 1), (8, 32), (16, 77))),
        *(
            changed(target=dataclasses.replace(ORIN, **{field: value}))
            for field, value in {
                "gpu": "L4",
                "compute_capability": "8.9",
                "multiprocessors": 8,
                "platform": "linux-x86_64",
                "tensorrt": "10.3.1",
            }.items()
        ),
    ]
    assert len({RECORD.name, *(other.name for other in others)}) == 8


def test_written_and_read_back(cache):
    assert cache.records() == ([], [])
    path = cache.save(RECORD, PLAN)
    assert path.read_bytes() == PLAN  # Raw: other programs can load it as well.
    assert cache.records() == ([RECORD], [])
    assert cache.load(RECORD) == PLAN
    assert {p.name for p in cache.folder.iterdir()} == {path.name, RECORD.json_name}
    later = changed(
        built="2026-11-25T12:00:00.000+00:00",
        profile=InputProfile("input_ids", (1, 1), (8, 32), (64, 77)),
    )
    cache.save(later, PLAN)
    assert cache.records() == ([later, RECORD], [])
    assert cache.find(Path("b/text.fp16.onnx"), RECORD.onnx_sha256, ORIN) == later


def test_a_damaged_engine_is_not_loaded(cache):
    path = cache.save(RECORD, PLAN)
    path.write_bytes(PLAN[:-1])
    with pytest.raises(IntegrityError, match=r"changed or damaged; build it again"):
        cache.load(RECORD)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"cannot read .*\.engine"):
        cache.load(RECORD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "version 1, this program reads up to 2: compile again"),
        ({"sha256": 5}, "sha256: expected a non-empty string"),
        ({"comparisons": []}, "comparisons: expected at least one"),
        ({"comparisons": [{"batch_size": 0}]}, r"comparisons[0].batch_size: expected"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"onnx_sha256": "cd" * 32}, "is what the record describes"),
        (
            {"profile": {"name": "x", "min": [0], "opt": [1], "max": [1]}},
            "profile.min[0]: expected",
        ),
    ],
)
def test_an_edited_record_is_a_problem_and_not_used(cache, change, message):
    path = cache.save(RECORD, PLAN)
    json_path = path.with_name(RECORD.json_name)
    json_path.write_text(json.dumps(json.loads(json_path.read_text()) | change))
    records, (problem,) = cache.records()
    assert records == []
    assert message in problem
    with pytest.raises(BackendError, match=r"no engine for .*upperson-rt compile b "):
        cache.find(Path("b/text.fp16.onnx"), RECORD.onnx_sha256, ORIN)
    json_path.write_text("[")
    assert "is not valid JSON" in cache.records()[1][0]


def test_what_there_is_instead_is_said(cache):
    cache.save(RECORD, PLAN)
    newer = dataclasses.replace(ORIN, tensorrt="10.16.2")
    with pytest.raises(BackendError, match=r"no engine .* with TensorRT 10\.16\.2 on Orin") as no:
        cache.find(Path("b/text.fp16.onnx"), RECORD.onnx_sha256, newer)
    assert "the engines of this file are for TensorRT 10.3.0.30 on Orin" in str(no.value)
    with pytest.raises(BackendError, match="engines there: fp16 of toy"):
        cache.find(Path("b/text.int8.onnx"), "cd" * 32, ORIN)
    with pytest.raises(BackendError, match="engines there: none for this device"):
        cache.find(Path("b/text.int8.onnx"), "cd" * 32, newer)


def test_timings_are_kept_per_target(cache):
    assert cache.load_timing_cache(ORIN) == b""
    cache.save_timing_cache(ORIN, b"timings")
    assert cache.load_timing_cache(ORIN) == b"timings"
    assert cache.load_timing_cache(dataclasses.replace(ORIN, tensorrt="10.3.1")) == b""


def test_one_builds_at_a_time(cache):
    order = []

    def second():
        with cache.lock(lambda: order.append("waits")):
            order.append("second")

    with cache.lock(lambda: order.append("never")):
        thread = threading.Thread(target=second)
        thread.start()
        while not order:
            thread.join(0.01)
        order.append("first")
    thread.join()
    assert order == ["waits", "first", "second"]
    assert cache.folder.stat().st_mode & 0o077 == 0  # Engines are code: nobody else's business.


def test_what_a_killed_build_was_writing_goes(cache):
    with cache.lock(lambda: None):
        pass
    kept = cache.folder / "image.engine"
    for name in (".image.engine.a1b2c3d4", ".image.engine.json.zzzzzzzz", kept.name):
        (cache.folder / name).write_bytes(b"")
    with cache.lock(lambda: None):
        assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", kept.name]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="choose another --cache"),
        EngineCache(tmp_path / "file").lock(lambda: None),
    ):
        pass
