import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.refused import refused
from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_rt.files import cache_folder
from upperson_tensorrt.builder import Comparison, InputProfile
from upperson_tensorrt.cache import EngineCache, EngineRecord, Target

ORIN = Target(
    gpu="Orin (nvgpu)", compute_capability="8.7", multiprocessors=16, platform="linux-aarch64",
    tensorrt="10.3.0.30",
)  # fmt: skip
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
ONNX = Path("b/text.fp16.onnx")


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path)


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("UPPERSON_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    default = Path("/home/someone/.cache/upperson")
    for xdg, expected in (("relative", default), ("/var/cache", Path("/var/cache/upperson"))):
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert cache_folder() == expected
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert EngineCache().folder == tmp_path / "engines"
    (tmp_path / "file").write_text("")
    with refused("cannot_write", InputError), EngineCache(tmp_path / "file").lock(lambda: None):
        pass


def test_written_and_read_back_the_latest_first_and_never_damaged(cache):
    assert cache.records() == ([], [])
    path = cache.save(RECORD, PLAN)
    assert path.read_bytes() == PLAN  # Raw: other programs can load it as well.
    assert cache.records() == ([RECORD], [])
    assert cache.load(RECORD) == PLAN
    assert {p.name for p in cache.folder.iterdir()} == {path.name, RECORD.json_name}
    assert path.name == (  # All that makes an engine useless elsewhere.
        "text-abababababababab-b1.8.32x1.32.77-orin-nvgpu-sm87x16-linux-aarch64-trt10.3.0.30"
        "-ef38b0986b37cb1f.engine"
    )
    larger = InputProfile("input_ids", (1, 1), (8, 32), (64, 77))
    later = replace(RECORD, built="2026-11-25T12:00:00.000+00:00", profile=larger)
    cache.save(later, PLAN)
    assert cache.records() == ([later, RECORD], [])
    assert cache.find(ONNX, RECORD.onnx_sha256, ORIN) == later
    path.write_bytes(PLAN[:-1])
    with refused("checksum_differs", IntegrityError, path=str(path)):
        cache.load(RECORD)
    path.unlink()
    with refused("file_missing", IntegrityError, path=str(path)):
        cache.load(RECORD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "version 1, this program reads up to 2: compile again"),
        ({"comparisons": []}, "comparisons: expected at least one"),
        ({"onnx_sha256": "cd" * 32}, "is what the record describes"),
        (None, "is not valid JSON"),
    ],
)
def test_an_edited_record_is_a_problem_and_not_used(cache, change, message):
    json_path = cache.save(RECORD, PLAN).with_name(RECORD.json_name)
    content = json.loads(json_path.read_text())
    json_path.write_text(json.dumps(content | change) if change else "[")
    records, (problem,) = cache.records()
    assert records == []
    assert message in problem
    with refused("no_engine", BackendError):
        cache.find(ONNX, RECORD.onnx_sha256, ORIN)


def test_timings_and_engines_are_of_one_target_and_what_there_is_instead_is_said(cache):
    cache.save(RECORD, PLAN)
    newer = replace(ORIN, tensorrt="10.16.2")
    assert cache.load_timing_cache(ORIN) == b""
    cache.save_timing_cache(ORIN, b"timings")
    assert (cache.load_timing_cache(ORIN), cache.load_timing_cache(newer)) == (b"timings", b"")
    for onnx_sha256, target, found in (
        (RECORD.onnx_sha256, newer, "the engines of this file are for TensorRT 10.3.0.30 on Orin"),
        ("cd" * 32, ORIN, "engines there: fp16 of toy"),
        ("cd" * 32, newer, "engines there: none for this device"),
    ):
        with refused("no_engine", BackendError) as error:
            cache.find(ONNX, onnx_sha256, target)
        assert error.value.fields["found"].startswith(found)


def test_what_a_killed_build_was_writing_goes(cache):
    with cache.lock(lambda: None):
        for name in (".a.engine.a1b2c3d4", ".a.engine.json.zzzzzzzz", "a.engine"):
            (cache.folder / name).write_bytes(b"")
    with cache.lock(lambda: None):
        assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", "a.engine"]
    assert cache.folder.stat().st_mode & 0o077 == 0  # Engines are code: nobody else's business.
