"""Cameras before a Milvus server that is killed, and away for longer than a request may last."""

import pytest

import upperson_rt
from tests.helpers.fake_camera import BOX, START, check_sums, person_frame, wait_for
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_camera import Pipeline
from upperson_camera.late_gallery import open_now_or_later
from upperson_rt.gallery import Gallery

OPTIONS = {"every_s": 0, "min_views": 1, "frame_queue": 64, "save_crops": False}


def submit(pipeline, numbers):
    for number in numbers:
        pipeline.submit("gate", person_frame(), [BOX], START + number, tracks=[number])


@pytest.mark.timeout(180)
def test_nothing_accepted_is_lost_also_where_a_camera_starts_meanwhile(
    server_place, shared_server, tmp_path
):
    server = shared_server.server
    encoder = upperson_rt.open(make_toy_bundle(tmp_path / "bundle"), "fp32", "onnxruntime")
    space = encoder.fingerprint, encoder.embed_dim
    there, later = (f"{server_place.unused()}?timeout=1" for _ in range(2))
    with (
        Gallery.open(there, *space, create=True) as gallery,
        Pipeline(encoder, gallery, buffer=tmp_path / "first", **OPTIONS) as first,
    ):
        first.add_camera("gate")
        submit(first, range(10))
        assert first.drain(60)
        server.kill()
        try:
            submit(first, range(10, 30))
            wait_for(lambda: first.stats().buffered == 20)
            late = open_now_or_later(later, *space)
            second = Pipeline(encoder, late, buffer=tmp_path / "second", **OPTIONS)
            second.start()
            second.add_camera("gate")
            submit(second, range(20))
            wait_for(lambda: second.stats().buffered == 20)
            wait_for(lambda: first._sender._error != "it does not answer")
            submit(first, range(30, 40))
            wait_for(lambda: first.stats().buffered == 30)
        finally:
            server.start()
        assert first.drain(120)
        assert second.drain(120)
        second.stop()
        late.close()
        check_sums(first.stats())
        check_sums(second.stats())
        assert first.stats().total("added_by_others") == 0
        assert sorted(item.time for item in gallery.items()) == [START + n for n in range(40)]
    with Gallery.open(later, encoder.fingerprint) as gallery:
        assert sorted(item.time for item in gallery.items()) == [START + n for n in range(20)]
