"""What becomes of decoded frames: interlaced, turned, of several sizes, damaged, on no device."""

import functools
import http.server
import logging
import os
from contextlib import closing

import cv2
import numpy as np
import pytest

from tests.helpers.fake_camera import FakeTime
from tests.helpers.made_video import combing, error, picture_at, woven, write_video
from tests.helpers.refused import refused
from tests.helpers.small_servers import served
from upperson_camera import decoding
from upperson_camera.crops import sharpness
from upperson_camera.decoding import find_hwaccel
from upperson_camera.source import Source, parse_source
from upperson_camera.stream import StreamReader
from upperson_rt.errors import InputError, UsageError

COUNT = 16
H264 = {"qp": "18", "preset": "ultrafast"}
MPEG2 = {"b": "6M"}


def read_all(source):
    """Return the pictures of a source, and their times."""
    with closing(StreamReader(source, 20.0)) as reader:
        pictures = []
        while (picture := reader.read()) is not None:
            pictures.append((picture, reader.position_s))
    return [picture for picture, _ in pictures], [at for _, at in pictures]


def of_file(path):
    return parse_source(str(path))


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """What a camera that is not interlaced sends of the first fields."""
    path = tmp_path_factory.mktemp("truth") / "film.mp4"
    write_video(path, [picture_at(2 * number) for number in range(COUNT)], **H264)
    return read_all(of_file(path))[0]


@pytest.mark.parametrize(
    ("codec", "ending", "fields", "options"),
    [
        ("libx264", "mp4", "tff", H264),
        ("libx264", "mkv", "bff", H264),
        ("libx264", "ts", "tff", {"qp": "18", "bf": "2"}),
        ("mpeg2video", "ts", "tff", MPEG2),
        ("mpeg2video", "mpg", "bff", MPEG2),
    ],
)
def test_interlaced_files_are_deinterlaced(tmp_path, truth, codec, ending, fields, options):
    path, raw = tmp_path / f"film.{ending}", list(woven(COUNT, fields == "tff"))
    write_video(path, raw, codec, fields=fields, **options)
    pictures, times = read_all(of_file(path))
    assert times == pytest.approx([number / 25 for number in range(COUNT)], abs=1e-3)
    for picture, combed, progressive in zip(pictures, raw, truth, strict=True):
        assert combing(picture) < 0.002
        assert combing(combed) > 0.05
        assert error(picture, progressive) < 0.25 * error(combed, progressive)
        assert sharpness(picture) == pytest.approx(sharpness(progressive), rel=0.2)


def test_an_interlaced_stream_is_deinterlaced(tmp_path, truth):
    write_video(tmp_path / "film.ts", woven(COUNT, True), "mpeg2video", fields="tff", **MPEG2)

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Silent, directory=os.fspath(tmp_path))
    with served(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as port:
        pictures, _ = read_all(parse_source(f"http://127.0.0.1:{port}/film.ts"))
    assert len(pictures) == COUNT
    assert max(map(combing, pictures)) < 0.002
    assert max(map(error, pictures, truth)) < 1


def test_frames_that_are_not_interlaced_pass_without_a_deinterlacer(tmp_path):
    write_video(tmp_path / "film.mp4", [picture_at(0)] * 3, **H264)
    with closing(StreamReader(of_file(tmp_path / "film.mp4"), 20.0)) as reader:
        assert reader.read() is not None
        assert reader._pictures._graph is None


def test_a_stream_may_become_interlaced_and_change_its_size(tmp_path):
    """Program streams of different cameras, one behind the other as a recorder leaves them."""
    small = [cv2.resize(picture, (160, 120)) for picture in woven(COUNT, True)]
    parts = [
        ([picture_at(2 * number) for number in range(COUNT)], "prog"),
        (woven(COUNT, True), "tff"),
        (small, "tff"),
    ]
    for number, (pictures, fields) in enumerate(parts):
        write_video(tmp_path / f"{number}.mpg", pictures, "mpeg2video", fields=fields, **MPEG2)
    content = b"".join((tmp_path / f"{number}.mpg").read_bytes() for number in range(len(parts)))
    (tmp_path / "all.mpg").write_bytes(content)
    pictures, _ = read_all(of_file(tmp_path / "all.mpg"))
    heights = [picture.shape[0] for picture in pictures]
    assert heights == sorted(heights, reverse=True)
    assert heights.count(240) >= 2 * COUNT - 2, "the decoder itself may lose one where two meet"
    assert heights.count(120) == COUNT
    assert max(map(combing, pictures[: heights.count(240)])) < 0.002


@pytest.mark.parametrize("turn", [90, -90, 180])
def test_a_turned_video_is_upright(tmp_path, turn):
    write_video(tmp_path / "film.mp4", [picture_at(0)] * 3, turn=turn, **H264)
    write_video(tmp_path / "upright.mp4", [picture_at(0)] * 3, **H264)
    (upright, *_), _ = read_all(of_file(tmp_path / "upright.mp4"))
    for picture in read_all(of_file(tmp_path / "film.mp4"))[0]:
        assert np.array_equal(picture, np.rot90(upright, turn // 90))
        assert picture.flags.c_contiguous


def test_a_file_is_read_as_opencv_reads_it(tmp_path):
    path = tmp_path / "film.mkv"
    noise = np.random.default_rng(0).integers(0, 256, (6, 12, 16, 3), np.uint8)
    large = [cv2.resize(one, (320, 240), interpolation=cv2.INTER_CUBIC) for one in noise]
    write_video(path, large, bf="2", preset="ultrafast")
    capture, (pictures, times) = cv2.VideoCapture(str(path)), read_all(of_file(path))
    for picture, at in zip(pictures, times, strict=True):
        assert np.array_equal(picture, capture.read()[1])
        assert at == pytest.approx(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, abs=1e-3)
    assert not capture.read()[0]
    capture.release()


def test_one_camera_starts_no_thread(tmp_path):
    write_video(tmp_path / "film.mp4", woven(COUNT, True), fields="tff", **H264)
    with closing(StreamReader(of_file(tmp_path / "film.mp4"), 20.0)) as reader:
        before = len(os.listdir("/proc/self/task"))
        while reader.read() is not None:
            assert len(os.listdir("/proc/self/task")) <= before


@pytest.mark.parametrize(
    "name", ["concat:a.mp4|b.mp4", "subfile,,start,0,end,9,,:a.mp4", "a?b:c.mp4"]
)
def test_the_name_of_a_file_is_no_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", [picture_at(0)] * 3, **H264)
    (tmp_path / "a.mp4").rename(tmp_path / name)
    assert len(read_all(parse_source(name))[0]) == 3


def test_a_file_that_names_a_stream_is_no_video(tmp_path):
    lines = ["v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=x", "c=IN IP4 127.0.0.1", "t=0 0"]
    lines += ["m=video 5004 RTP/AVP 96", "a=rtpmap:96 H264/90000", ""]
    (tmp_path / "film.sdp").write_text("\r\n".join(lines))
    with refused("video_unreadable", InputError, source=str(tmp_path / "film.sdp")):
        StreamReader(of_file(tmp_path / "film.sdp"), 20.0)


def test_a_file_that_ends_early_or_is_damaged(tmp_path):
    write_video(tmp_path / "film.ts", [picture_at(number) for number in range(40)], **H264)
    content = bytearray((tmp_path / "film.ts").read_bytes())
    (tmp_path / "cut.ts").write_bytes(content[: len(content) // 2])
    assert 10 < len(read_all(of_file(tmp_path / "cut.ts"))[0]) < 30
    write_video(tmp_path / "film.h264", [picture_at(number) for number in range(40)], **H264)
    content = bytearray((tmp_path / "film.h264").read_bytes())
    content[len(content) // 2 : len(content) * 3 // 4] = bytes(range(1, 255)) * (
        len(content) // 1016
    )
    (tmp_path / "damaged.h264").write_bytes(content)
    with closing(StreamReader(of_file(tmp_path / "damaged.h264"), 20.0)) as reader:
        pictures, lines = [], []
        while (picture := reader.read()) is not None:
            pictures.append(picture)
            lines += reader.take_errors()
    assert sum(picture.size > 0 for picture in pictures) > 10
    assert any(line.startswith("h264: ") for line in lines)
    write_video(tmp_path / "film.mp4", [picture_at(0)] * 3, **H264)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "film.mp4").read_bytes()[:2000])
    with refused("video_unreadable", InputError, source=str(tmp_path / "cut.mp4")):
        StreamReader(of_file(tmp_path / "cut.mp4"), 20.0)


def test_what_the_threads_of_a_decoder_report_is_logged_once_a_minute(caplog, monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(decoding, "time", clock)
    handler = decoding._StrayErrors()
    for more_s in (0, 1, 1, 61):
        clock.more_s += more_s
        handler.emit(logging.makeLogRecord({"msg": "top block unavailable\n"}))
    assert [(one.event, one.lines) for one in caplog.records] == [
        ("decoder_error", 1),
        ("decoder_error", 3),
    ]


def test_decoding_on_a_device_falls_back_to_software(tmp_path, monkeypatch):
    path = tmp_path / "film.mp4"
    write_video(path, woven(COUNT, True), fields="tff", **H264)
    names = ("none", "auto", "cuda")
    found = [read_all(Source(address=str(path), kind="file", hwaccel=name))[0] for name in names]
    assert all(len(pictures) == COUNT for pictures in found)
    assert all(combing(pictures[-1]) < 0.002 for pictures in found)
    with refused("unknown_hwaccel", UsageError, found="abacus"):
        StreamReader.require(Source(address=str(path), kind="file", hwaccel="abacus"))
    assert find_hwaccel("none")[0] is None
