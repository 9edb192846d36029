"""Cameras before a Milvus server that is killed, and away for longer than a request may last."""

import pytest

import upperson_rt
from tests.helpers.fake_camera import BOX, START, check_sums, person_frame, wait_for
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_camera import Pipeline
from upperson_rt.gallery import Gallery
from upperson_rt.ingest.late_gallery import open_now_or_later


@pytest.mark.timeout(180)
def test_nothing_that_was_accepted_is_lost(server_place, shared_server, tmp_path):
    server = shared_server.server
    encoder = upperson_rt.open(make_toy_bundle(tmp_path / "bundle"), "fp32", "onnxruntime")
    location = f"{server_place.unused()}?timeout=1"
    options = {"every_s": 0, "min_views": 1, "frame_queue": 64, "save_crops": False}
    with (
        Gallery.open(location, encoder.fingerprint, encoder.embed_dim, create=True) as gallery,
        Pipeline(encoder, gallery, buffer=tmp_path / "buffer", **options) as pipeline,
    ):
        pipeline.add_camera("gate")

        def submit(numbers):
            for number in numbers:
                pipeline.submit("gate", person_frame(), [BOX], START + number, tracks=[number])

        submit(range(10))
        assert pipeline.drain(60)
        server.kill()
        try:
            submit(range(10, 30))
            wait_for(lambda: pipeline.stats().buffered == 20)
            wait_for(lambda: pipeline._sender._error != "it does not answer")
            submit(range(30, 40))
            wait_for(lambda: pipeline.stats().buffered == 30)
        finally:
            server.start()
        assert pipeline.drain(120)
        check_sums(pipeline.stats())
        assert pipeline.stats().total("added_by_others") == 0
        assert sorted(item.time for item in gallery.items()) == [START + n for n in range(40)]


@pytest.mark.timeout(180)
def test_cameras_start_while_the_server_is_away(server_place, shared_server, tmp_path):
    server = shared_server.server
    encoder = upperson_rt.open(make_toy_bundle(tmp_path / "bundle"), "fp32", "onnxruntime")
    location = f"{server_place.unused()}?timeout=1"
    options = {"every_s": 0, "min_views": 1, "frame_queue": 64, "save_crops": False}
    server.kill()
    try:
        late = open_now_or_later(location, encoder.fingerprint, encoder.embed_dim)
        pipeline = Pipeline(encoder, late, buffer=tmp_path / "buffer", **options)
        pipeline.start()
        pipeline.add_camera("gate")
        for number in range(20):
            pipeline.submit("gate", person_frame(), [BOX], START + number, tracks=[number])
        wait_for(lambda: pipeline.stats().buffered == 20)
    finally:
        server.start()
    assert pipeline.drain(120)
    pipeline.stop()
    check_sums(pipeline.stats())
    late.close()
    with Gallery.open(location, encoder.fingerprint) as gallery:
        assert sorted(item.time for item in gallery.items()) == [START + n for n in range(20)]
