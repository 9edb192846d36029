"""A real RTSP server: both transports, logins, losses, a change of size, silence and rubbish.

Skipped without GStreamer's server; ``UPPERSON_TEST_RTSP=required`` makes that a failure.
"""

import time
from contextlib import suppress
from itertools import pairwise
from urllib.parse import quote

import pytest

from tests.helpers.fake_camera import Watched, wait_for
from tests.helpers.made_video import combing, woven, write_video
from tests.helpers.refused import refused
from tests.helpers.rtsp_camera import rtsp_camera
from upperson_camera.source import parse_source
from upperson_camera.stream import StreamReader, open_source
from upperson_rt.errors import InputError

pytestmark = pytest.mark.usefixtures("there_is_a_server")

USER, PASSWORD = "anna", "s:e/c ret@1"


@pytest.mark.parametrize(("transport", "encoding"), [("tcp", "h264"), ("udp", "jpeg")])
def test_pictures_come_by_either_transport_and_in_any_size(transport, encoding):
    with rtsp_camera(transport=transport, encoding=encoding) as camera:
        watched = Watched(parse_source(camera.address), open_source)
        wait_for(lambda: len(watched.frames) >= 20)
        for size in ((480, 640), (120, 160)):
            camera.tell(f"size {size[1]}x{size[0]}")
            before = len(watched.frames)
            wait_for(lambda size=size: watched.frames[-1][0].shape == (*size, 3))
            wait_for(lambda before=before: len(watched.frames) >= before + 20)
        watched.stop()
    assert watched.counts == ["resolution_changes"] * 2
    pictures = [image for image, _, _ in watched.frames]
    assert {image.shape[:2] for image in pictures} == {(240, 320), (480, 640), (120, 160)}
    # A ball moves: nothing is repeated, before and after.
    for one, next_one in pairwise(pictures):
        assert one.shape != next_one.shape or (one != next_one).any()
        assert one.max() > 200


def test_interlaced_pictures_are_deinterlaced(tmp_path):
    film = tmp_path / "film.mp4"
    write_video(film, woven(60, True), fields="tff", preset="ultrafast", qp="18", g="10")
    with rtsp_camera(film=film) as camera:
        watched = Watched(parse_source(camera.address), open_source)
        wait_for(lambda: sum(image.size > 0 for image, _, _ in watched.frames) >= 30)
        watched.stop()
    pictures = [image for image, _, _ in watched.frames if image.size]
    assert max(map(combing, woven(60, True))) > 0.05
    assert max(map(combing, pictures)) < 0.002


def test_logins_that_are_right_wrong_and_missing():
    def opened(login, path="stream"):
        return StreamReader(parse_source(f"rtsp://{login}127.0.0.1:{camera.port}/{path}"), 20.0)

    with rtsp_camera(login=(USER, PASSWORD)) as camera:
        right = f"{USER}:{quote(PASSWORD, safe='')}@"
        reader = opened(right)
        assert reader.read().shape == (240, 320, 3)
        reader.close()
        for login, path, code in (
            ("", "stream", "credentials_missing"),
            (f"{USER}:other@", "stream", "credentials_wrong"),
            (right, "nothing", "stream_not_found"),
        ):
            shown = f"rtsp://127.0.0.1:{camera.port}/{path}"
            with refused(code, InputError, source=shown) as raised:
                opened(login, path)
            assert raised.value.__cause__ is None, "PyAV's own error holds the password"
            assert not {"other", PASSWORD} & set(str(raised.value).split())


def test_a_camera_that_is_killed_and_comes_back(caplog):
    with rtsp_camera() as camera:
        watched = Watched(parse_source(camera.address), open_source)
        for _ in range(2):
            before = len(watched.frames)
            wait_for(lambda before=before: len(watched.frames) > before + 10)
            camera.kill()
            wait_for(lambda: "refuses connections" in (watched.capture.error or ""))
            assert watched.capture.state == "reconnecting"
            camera.start()
        before = len(watched.frames)
        wait_for(lambda: len(watched.frames) > before + 10)
        assert (watched.capture.state, watched.capture.error) == ("running", None)
        watched.stop()
    assert watched.counts.count("outages") == 2
    assert watched.counts.count("reconnects") >= 4
    clocks = [clock for _, _, clock in watched.frames]
    assert clocks == sorted(clocks)
    assert [record.event for record in caplog.records].count("back") == 2


def test_a_reader_keeps_to_its_time_limit():
    limit_s = 2.0
    with rtsp_camera() as camera:
        source = parse_source(camera.address)
        reader = None
        while reader is None:  # A busy machine may take longer to open it.
            with suppress(InputError):
                reader = StreamReader(source, limit_s)
        camera.freeze()
        began = time.monotonic()
        while reader.read() is not None:
            began = time.monotonic()
        assert time.monotonic() - began >= 0.9 * limit_s
        reader.close()
        with refused("no_answer", InputError):
            StreamReader(source, 0.5)


def test_rubbish_in_mid_stream_is_counted_and_what_follows_is_seen():
    with rtsp_camera() as camera:
        watched = Watched(parse_source(camera.address), open_source)
        wait_for(lambda: len(watched.frames) > 10)
        camera.tell("rubbish")
        wait_for(lambda: sum(image.size == 0 for image, _, _ in watched.frames) > 10)
        camera.tell("sound")
        before = len(watched.frames)
        wait_for(lambda: sum(image.size > 0 for image, _, _ in watched.frames[before:]) > 20)
        watched.stop()
    # No outage; random bytes now and then decode to a picture of one colour.
    assert set(watched.counts) <= {"blank_frames"}
