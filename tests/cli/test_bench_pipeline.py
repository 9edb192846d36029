"""``upperson-rt bench pipeline`` on a toy bundle."""

import json
import threading
import time
from functools import partial

import pytest

from tests.helpers.invoke import refusal, run_rt
from upperson_camera import bench
from upperson_rt.encoder import Encoder
from upperson_rt.gallery.sqlite import SqliteGallery


@pytest.fixture
def run(bundle_and_crops):
    options = ("-b", bundle_and_crops / "bundle", "--threads", 1, "--duration", 1)
    return partial(run_rt, "bench", "pipeline", *options)


@pytest.fixture(autouse=True)
def overload(monkeypatch):
    """Slow while it is measured, the encoder does nothing at all while frames are submitted."""
    encode_pixels, run_load = Encoder.encode_pixels, bench._Load.run
    submit_all = bench._Load._submit
    loaded, held, submitted = threading.Event(), threading.Event(), threading.Event()

    def slow(self, pixels, batch_size=32):
        if loaded.is_set():
            held.set()
            submitted.wait()
        else:
            time.sleep(0.01 * len(pixels))
        return encode_pixels(self, pixels, batch_size)

    def run_all(self, *arguments):
        loaded.set()
        try:
            run_load(self, *arguments)
        finally:
            submitted.set()

    def submit(self, *given):
        submit_all(self, *given)
        held.wait(20)  # On a busy machine the encoder may not have come that far in a second,
        time.sleep(0.3)  # and its time is sampled while frames are submitted.

    monkeypatch.setattr(bench._Load, "_submit", submit)
    monkeypatch.setattr(Encoder, "encode_pixels", slow)
    monkeypatch.setattr(bench._Load, "run", run_all)
    monkeypatch.setattr(bench, "Pipeline", partial(bench.Pipeline, crop_queue=8))
    monkeypatch.setattr(bench, "_CAPACITY_S", 0.05)
    monkeypatch.setattr(bench, "_SAMPLE_S", 0.05)


@pytest.mark.parametrize("options", [(), ("--vectors-only", "--drop", "newest", "--cameras", "1")])
def test_what_goes_in_comes_out_or_is_counted(run, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    result = run("--json", "--overload", "8", *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    frames, crops = found["frames"], found["crops"]
    assert frames["submitted"] == frames["processed"] + sum(frames["dropped"].values())
    assert crops["detections"] == crops["committed"] + sum(crops["dropped"].values())
    assert crops["detections"] == found["people_per_frame"] * frames["processed"]
    assert found["acknowledged"] == found["rows"] == crops["committed"] > 0
    assert sum(frames["dropped"].values()) + sum(crops["dropped"].values()) > 0
    assert 4 <= found["people_per_frame"] <= 200
    assert 0 < found["encoder_busy_share"] <= 1
    assert 0 < found["submit_ms"]["p50"] <= found["submit_ms"]["p99"] <= found["submit_ms"]["max"]
    assert found["cameras"] == (1 if options else 2)
    assert found["pictures_saved"] == (not options)
    assert found["problems"] == []
    assert list(tmp_path.glob("upperson-bench-*")) == [], "nothing is left behind"


def test_a_broken_promise_is_printed_and_ends_with_6(run, monkeypatch):
    table = run()
    assert table.exit_code == 0, table.stderr
    rows = {line.split()[0]: line.split() for line in table.stdout.splitlines() if line}
    assert int(rows["frames"][1]) > 0
    assert rows["promises"][1:] == ["all", "kept"]
    add = SqliteGallery.add

    def forgetful(self, items, vectors, variant=None):
        return add(self, items[1:], vectors[1:], variant)

    monkeypatch.setattr(SqliteGallery, "add", forgetful)
    result = run("--json")
    assert result.exit_code == 6
    assert "acknowledged rows" in json.loads(result.stdout)["problems"][0]


def test_errors_are_one_line_and_a_code(run):
    for code, *options in (
        ("only_files_wait", "--drop", "block"),
        ("unknown_policy", "--drop", "some"),
        ("setting_out_of_range", "--overload", "inf"),
        (None, "--variant", "int4"),
    ):
        refusal(run(*options, "--json"), 2, code)
