"""Metrics of a pipeline: what Prometheus would read is what the statistics say."""

import socket
import sys
import threading
import urllib.request

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import upperson_rt
from tests.helpers.fake_camera import ALL, BOX, person_frame, wait_for
from tests.helpers.refused import refused
from upperson_camera import Pipeline
from upperson_camera.prometheus import MetricsFile, MetricsServer
from upperson_camera.stats import Durations
from upperson_rt.errors import BackendError, InputError
from upperson_rt.gallery import Gallery


@pytest.fixture(scope="module")
def pipeline(bundle, tmp_path_factory):
    """A pipeline that has worked and ended: three frames, a box outside, a frame without pixels."""
    folder = tmp_path_factory.mktemp("metrics") / "gallery"
    encoder = upperson_rt.open(bundle, "fp32", "onnxruntime", threads=1)
    with Gallery.open(folder, encoder.fingerprint, encoder.embed_dim, create=True) as gallery:
        with Pipeline(encoder, gallery, max_delay_s=0, **ALL) as found:
            found.add_camera('gate "1"\n')
            for second in range(3):
                boxes = [BOX, [900, 900, 950, 990]]
                found.submit('gate "1"\n', person_frame(), boxes, 1e9 + second)
                found.drain()
            found.submit('gate "1"\n', person_frame()[:0], [])
            found.add_camera("hall")
            found.remove_camera("hall")
        yield found


def check(text):
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    camera = ("camera", 'gate "1"\n')
    for name, value in {
        "frames_read": 4, "frames_processed": 3, "detections": 6, "tracks": 1, "accepted": 3,
        "embedded": 3, "committed": 3, "replaced": 0, "added_by_others": 0, "reconnects": 0,
        "stalls": 0, "resolution_changes": 0, "blank_frames": 0, "decoder_errors": 0,
    }.items():  # fmt: skip
        assert found[f"upperson_{name}_total", camera] == value, name
    assert found["upperson_frames_dropped_total", camera, ("reason", "empty")] == 1
    assert found["upperson_crops_dropped_total", camera, ("reason", "outside")] == 3
    assert found["upperson_camera_up", camera] == 0
    assert ("upperson_camera_up", ("camera", "hall")) not in found, "it was removed"
    assert found["upperson_queue_depth", camera, ("queue", "frames")] == 0
    assert found["upperson_encoder_busy_seconds_total",] > 0
    for name in ("latency", "encode_latency"):
        buckets = [
            value for key, value in found.items() if key[0] == f"upperson_{name}_seconds_bucket"
        ]
        assert buckets == sorted(buckets)
        assert buckets[-1] == found[f"upperson_{name}_seconds_count",] == 3


def test_the_server_answers_on_this_machine_only(pipeline):
    server = MetricsServer(pipeline, 0)
    try:
        assert server.url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(server.url) as answer:
            check(answer.read().decode())
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        with refused("port_not_usable", InputError, port=port):
            MetricsServer(pipeline, port)
    finally:
        server.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "nothing listens any more"


def test_the_file_is_written_at_once_again_and_at_the_end(pipeline, tmp_path):
    path = tmp_path / "upperson.prom"
    file = MetricsFile(pipeline, path, every_s=0.01)
    check(path.read_text())
    first = path.stat().st_mtime_ns
    wait_for(lambda: path.stat().st_mtime_ns != first)
    path.unlink()
    file.close()
    check(path.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["upperson.prom"]


def test_a_file_that_cannot_be_written_is_an_error_at_the_start_and_a_log_line_later(
    pipeline, tmp_path, caplog
):
    with refused("file_not_writable", InputError, path=tmp_path / "none" / "a.prom"):
        MetricsFile(pipeline, tmp_path / "none" / "a.prom")
    (tmp_path / "there").mkdir()
    file = MetricsFile(pipeline, tmp_path / "there" / "a.prom", every_s=0.01)
    (tmp_path / "there" / "a.prom").unlink()
    (tmp_path / "there").rename(tmp_path / "gone")
    wait_for(lambda: "metrics" in [record.event for record in caplog.records])
    (tmp_path / "gone").rename(tmp_path / "there")
    file.close()
    check((tmp_path / "there" / "a.prom").read_text())


def test_a_disk_that_hangs_does_not_hold_up_the_end(pipeline, tmp_path, monkeypatch, caplog):
    file = MetricsFile(pipeline, tmp_path / "a.prom", every_s=0.01)
    hangs, answers = threading.Event(), threading.Event()

    def hang(path, registry):
        hangs.set()
        answers.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(prometheus_client, "write_to_textfile", hang)
        assert hangs.wait(60)
    file.close(within_s=0.05)
    assert [record.event for record in caplog.records] == ["metrics"]
    answers.set()
    file.close()
    check((tmp_path / "a.prom").read_text())


def test_without_the_package_it_says_what_to_install(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with refused("extra_missing", BackendError, extra="metrics"):
        MetricsServer(pipeline, 0)


def test_a_bucket_counts_what_lasted_up_to_its_edge(pipeline, monkeypatch, tmp_path):
    durations = Durations()
    for seconds in (0.001, 0.0015, 0.003):
        durations.add(seconds)
    monkeypatch.setattr(Pipeline, "durations", {"latency": durations})
    MetricsFile(pipeline, tmp_path / "a.prom").close()
    text = (tmp_path / "a.prom").read_text()
    for edge, count in (("0.001", 1), ("0.002", 2), ("0.004", 3), ("+Inf", 3)):
        assert f'upperson_latency_seconds_bucket{{le="{edge}"}} {count}.0' in text
