"""Reading sources: ends, losses, stalls, blank pictures, and what becomes of decoded frames."""

import logging
import os
import threading
import time
from contextlib import closing, contextmanager
from fractions import Fraction
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest

from tests.helpers.fake_camera import (
    FILE,
    LIVE,
    RULES,
    FakeOpener,
    FakeReader,
    FakeTime,
    Watched,
    person_frame,
    wait_for,
)
from tests.helpers.hostile_cameras import film
from tests.helpers.made_video import combing, error, picture_at, woven, write_video
from tests.helpers.refused import refused
from tests.helpers.small_servers import other_server
from upperson_camera import decoding
from upperson_camera.crops import sharpness
from upperson_camera.decoding import find_hwaccel
from upperson_camera.settings import CaptureRules
from upperson_camera.source import OpenCVReader, Source, parse_source
from upperson_camera.stream import StreamReader, guess_start_time, open_source
from upperson_rt.errors import InputError, UsageError

FRAME = person_frame()
EMPTY = np.zeros((0, 0, 3), np.uint8)
BLACK = np.full((240, 320, 3), 1, np.uint8)
LOST = ["outages", "reconnects"]


def ended(source, opener=open_source, **options):
    """Return a capture that has come to its end by itself."""
    watched = Watched(source, opener, **options)
    wait_for(lambda: watched.capture.is_over)
    return watched


def test_a_file_ends_takes_its_time_and_may_change_its_resolution():
    small, began = person_frame(size=(120, 160), box=(10, 10, 60, 100)), time.monotonic()
    script = [FRAME, small, EMPTY, small, FRAME]
    watched = ended(FILE, FakeOpener(script), start_time=1000.0, realtime=True)
    assert time.monotonic() - began >= 0.4
    assert watched.capture.state == "ended"
    assert [round(t, 3) for _, t, _ in watched.frames] == [1000.0, 1000.1, 1000.2, 1000.3, 1000.4]
    assert watched.counts == ["resolution_changes"] * 2


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ([], "clip.avi"),
        (InputError("cannot open clip.avi"), "cannot open clip.avi"),
        ([FRAME, RuntimeError("broken")], "RuntimeError: broken"),
    ],
)
def test_a_file_that_cannot_be_read_fails(script, error, caplog):
    watched = ended(FILE, FakeOpener(script))
    assert watched.capture.state == "failed"
    assert error in watched.capture.error
    assert [(record.camera, record.event) for record in caplog.records] == [("gate", "failed")]


def test_a_live_source_is_opened_again_and_an_outage_is_logged_once(caplog):
    caplog.set_level("INFO")
    ends, away = [FRAME] * 2, InputError("unplugged")
    opener = FakeOpener(ends, away, away, ends, away, away, InputError("busy"), ends)
    began = time.time()
    watched = Watched(LIVE, opener)
    wait_for(lambda: len(watched.frames) == 6 and watched.counts.count("reconnects") >= 11)
    watched.stop()
    assert all(reader.closed.is_set() for reader in opener.readers)
    waits = [record.wait_s for record in caplog.records if hasattr(record, "wait_s")]
    # After pictures the wait is short, and doubles with each failure up to its limit.
    expected = [0.02, 0.04, 0.08, 0.02, 0.04, 0.08, 0.1, 0.02, 0.04, 0.08, 0.1]
    assert waits[:11] == pytest.approx(expected)
    assert max(waits) <= 0.1
    clocks = [clock for _, _, clock in watched.frames]
    assert clocks == sorted(clocks)
    assert began <= watched.frames[-1][1] <= time.time()
    events = [(record.levelname, record.event) for record in caplog.records]
    assert events[:2] == [("INFO", "connected"), ("WARNING", "lost")]
    assert sum(event == "connected" for _, event in events) == 1
    assert events.count(("INFO", "lost")) >= 4
    loud = [event for level, event in events if level == "WARNING"]
    # Lost, for another reason, back; lost, for two other reasons, back; lost, for another reason.
    assert loud[:9] == [*["lost"] * 2, "back", *["lost"] * 3, "back", *["lost"] * 2]
    assert watched.counts.count("outages") == 3


def test_a_wall_clock_that_jumps_changes_the_times_of_frames_and_nothing_else(fake_time):
    jumps = [0, 86400, -86400, 3600]

    def frame_at(jump):
        def read():
            fake_time.wall_s = jump
            return FRAME

        return read

    began, began_unix = time.monotonic(), time.time()
    watched = Watched(LIVE, FakeOpener([frame_at(jump) for jump in jumps], [FRAME]))
    wait_for(lambda: len(watched.frames) == len(jumps) + 1)
    watched.stop()
    passed = time.monotonic() - began
    times = [unix - began_unix for _, unix, _ in watched.frames]
    for jump, unix in zip([*jumps, jumps[-1]], times, strict=True):
        assert jump - 1 <= unix <= jump + passed + 1
    clocks = [clock for _, _, clock in watched.frames]
    assert clocks == sorted(clocks)
    assert clocks[-1] - clocks[0] <= passed
    assert "stalls" not in watched.counts


def test_a_stalled_stream_is_abandoned_and_opened_again(fake_time):
    hangs = [threading.Event(), threading.Event()]

    def late():
        hangs[0].wait()
        return FRAME

    opener = FakeOpener([FRAME, late, FRAME], [FRAME] * 3 + hangs[1:])
    watched = Watched(LIVE, opener)
    wait_for(lambda: len(watched.frames) == 1)
    assert watched.counts == []
    fake_time.more_s += RULES.stall_s + 1
    wait_for(lambda: len(watched.frames) == 4)
    assert watched.counts == ["stalls", *LOST]
    assert watched.capture.state == "running"
    assert not opener.readers[0].closed.is_set(), "it still hangs"
    hangs[0].set()
    opener.readers[0].closed.wait()
    assert len(watched.frames) == 4, "an abandoned reader delivers nothing more"
    watched.stop()
    hangs[1].set()
    opener.readers[1].closed.wait()


def test_a_stream_that_its_reader_gives_up_after_a_long_silence_has_stalled(fake_time):
    def silence():
        fake_time.more_s += 0.95 * RULES.stall_s

    watched = Watched(LIVE, FakeOpener([FRAME, silence], [FRAME, None], [FRAME]))
    wait_for(lambda: len(watched.frames) == 3)
    watched.stop()
    assert watched.counts[:5] == ["stalls", *LOST, *LOST], "the second one just ended"


def test_only_a_few_readers_may_hang_at_a_time():
    hang = threading.Event()
    opener = FakeOpener(*[[hang]] * 20)
    rules = CaptureRules(stall_s=0.05, first_wait_s=0.01, longest_wait_s=0.01)
    watched = Watched(LIVE, opener, rules)
    wait_for(lambda: watched.capture.error is not None and "hang" in watched.capture.error)
    wait_for(lambda: watched.counts.count("reconnects") > 6)
    assert watched.counts.count("stalls") == 4
    wait_for(lambda: len(opener.readers) == 4)
    hang.set()
    wait_for(lambda: len(opener.readers) > 4)
    watched.stop()


def test_a_real_file_has_its_own_times(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5.0, (320, 240))
    for _ in range(6):
        writer.write(FRAME)
    writer.release()
    source = parse_source(str(path))
    assert guess_start_time(source) == pytest.approx(path.stat().st_mtime - 6 / 5, abs=0.01)
    times = [t for _, t, _ in ended(source, start_time=50.0).frames]
    assert times == pytest.approx([50 + i / 5 for i in range(6)])


def write_variable(path):
    """Write 2 s at 25 pictures a second, of which two of three are missing after the first one."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuvj420p"
        for number in [*range(25), *range(25, 50, 3)]:
            frame = av.VideoFrame.from_ndarray(FRAME, format="bgr24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_a_file_of_a_variable_rate_is_not_taken_for_one_that_was_cut_short(tmp_path, caplog):
    path = tmp_path / "film.mkv"
    write_variable(path)
    whole = ended(parse_source(str(path)), start_time=0.0)
    assert (whole.capture.state, len(whole.frames), caplog.records) == ("ended", 34, [])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    cut = ended(parse_source(str(path)), start_time=0.0)
    assert (cut.capture.state, len(cut.frames) < 34) == ("ended", True)
    assert "cut_short" in [record.event for record in caplog.records]


def test_what_no_reader_takes(tmp_path):
    """A frame of 16000 x 16000, 4 MB as JPEG, took 1.9 GB before its size was checked."""
    lines = ["v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=x", "c=IN IP4 127.0.0.1", "t=0 0"]
    lines += ["m=video 5004 RTP/AVP 96", "a=rtpmap:96 H264/90000", ""]
    write_video(tmp_path / "film.mp4", [picture_at(0)] * 3, **H264)
    for name, content in (
        ("text.avi", b"hello"),
        ("names_a_stream.sdp", "\r\n".join(lines).encode()),
        ("cut.mp4", (tmp_path / "film.mp4").read_bytes()[:2000]),
    ):
        (tmp_path / name).write_bytes(content)
        with refused("video_unreadable", InputError, source=str(tmp_path / name)):
            StreamReader(parse_source(str(tmp_path / name)), 20.0)
    for side in (6_400, 64):
        path = tmp_path / f"{side}.mjpeg"
        path.write_bytes(cv2.imencode(".jpg", np.zeros((side, side), np.uint8))[1].tobytes() * 3)
        source = parse_source(str(path))
        if side == 6_400:
            with refused("frame_too_large", InputError, width=side, height=side):
                StreamReader(source, 10.0)
        else:
            with closing(StreamReader(source, 10.0)) as reader:
                assert reader.read().shape == (64, 64, 3)
    device = Source(address="0", kind="device")
    for reader, source in ((OpenCVReader, LIVE), (OpenCVReader, FILE), (StreamReader, device)):
        with refused("wrong_reader", UsageError):
            reader(source, 1.0)


@contextmanager
def mjpeg_camera(pictures):
    """Serve pictures, or bytes that may be none, and close each connection then."""
    stream = b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"
    for picture in pictures:
        jpeg = picture if isinstance(picture, bytes) else cv2.imencode(".jpg", picture)[1].tobytes()
        stream += b"--frame\r\nContent-Type: image/jpeg\r\n"
        stream += b"Content-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg)
    with other_server(stream) as port:
        yield parse_source(f"http://127.0.0.1:{port}/stream.mjpg")


def test_a_real_stream_may_have_other_sizes_and_rubbish_and_is_opened_again_at_its_end():
    sizes = [(120, 160), (240, 320), (60, 80)]
    frames = [np.full((*size, 3), 40, np.uint8) for size in sizes]
    for frame in frames:
        frame[-8:, -8:] = 220
    no_picture = b"\xff\xd8" + bytes(range(256)) * 8 + b"\xff\xd9"
    too_large = cv2.imencode(".jpg", np.zeros((6400, 6400), np.uint8))[1].tobytes()
    pictures = [frames[0]] * 5 + [no_picture] * 3 + [frames[1]] * 5 + [too_large] * 3
    pictures += [frames[2]] * 5
    with mjpeg_camera(pictures) as source:
        assert source.is_live
        watched = Watched(source, open_source)
        wait_for(lambda: len(watched.frames) > len(pictures))
        watched.stop()
    assert watched.counts[:4] == ["resolution_changes"] * 2 + LOST
    assert watched.decoder_errors > 0
    for picture, (image, _, _) in zip(pictures, watched.frames[: len(pictures)], strict=True):
        if isinstance(picture, bytes):
            assert image.size == 0
            continue
        assert image.shape == picture.shape
        assert image[:4, :4].max() < 60
        assert image[-4:, -4:].min() > 200
        assert image[-16:, -16:-12].max() < 60, "it was not scaled"


def test_a_camera_that_sends_nothing_but_rubbish_has_stalled(fake_time, caplog):
    rubbish = later(fake_time, RULES.stall_s / 20, EMPTY)
    opener = FakeOpener([FRAME, *[rubbish] * 30, *[FRAME] * 9], [FRAME])
    watched = Watched(LIVE, opener)
    wait_for(lambda: len(opener.readers) == 2)
    watched.stop()
    assert watched.counts[:3] == ["stalls", *LOST]
    assert "no picture for 1000 s, only" in caplog.text
    assert 18 <= sum(image.size == 0 for image, _, _ in watched.frames) <= 22


def later(clock, seconds, picture):
    """Return a step of a script that lets time pass before its picture."""

    def read():
        clock.more_s += seconds
        return picture

    return read


def test_frames_of_one_colour_are_reported_once_and_never_stop_a_camera(fake_time, caplog):
    black = later(fake_time, 3, BLACK)
    grey = later(fake_time, 3, np.full((240, 320), 90, np.uint16))
    night = BLACK.copy()
    night[200, 300] = 40  # One light far away is a picture.
    script = [FRAME, *[black] * 8, later(fake_time, 3, FRAME), grey, night, *[black] * 5]
    hang = threading.Event()
    watched = Watched(LIVE, FakeOpener([*script, hang]))
    wait_for(lambda: len(watched.frames) == len(script))
    watched.stop(patience_s=0)
    hang.set()
    assert watched.counts.count("blank_frames") == 8 + 1 + 5
    assert watched.counts.count("outages") == watched.counts.count("stalls") == 0
    events = [record.event for record in caplog.records]
    assert events[:3] == ["blank", "not_blank", "blank"]


def test_a_file_of_which_all_frames_have_one_colour_fails(caplog):
    watched = ended(FILE, FakeOpener([BLACK] * 120))
    assert watched.capture.state == "failed"
    assert watched.counts.count("failures.source_blank") == 1
    # 12 s at ten frames a second: that is said before the end.
    assert [record.event for record in caplog.records] == ["blank", "failed"]
    begins_black = ended(FILE, FakeOpener([BLACK] * 30 + [FRAME]))
    assert (begins_black.capture.state, len(begins_black.frames)) == ("ended", 31)


class Complaining(FakeReader):
    """Has a line of its decoder for each picture."""

    def take_errors(self):
        return ["h264: no frame!", "h264: concealing 12 errors"]


def test_what_the_decoder_reports_is_counted_and_logged_once_a_minute(fake_time, caplog):
    caplog.set_level("INFO")
    much_later = later(fake_time, 61, FRAME)
    script = [EMPTY, FRAME, FRAME, much_later, FRAME, much_later, FRAME]
    watched = ended(FILE, lambda source, timeout_s: Complaining(script))
    assert watched.decoder_errors == 2 * (len(script) + 1)
    logged = [record for record in caplog.records if record.event == "decoder_error"]
    levels = [record.levelname for record in logged]
    assert levels == ["INFO", "WARNING", "WARNING", "WARNING"], "INFO counts for itself"
    assert [record.lines for record in logged] == [2, 4, 2, 4]
    (damaged,) = [record for record in caplog.records if record.event == "damaged"]
    assert (damaged.levelname, damaged.errors, damaged.unreadable) == ("WARNING", 16, 1)
    nothing = ended(FILE, lambda source, timeout_s: Complaining([EMPTY] * 3))
    assert nothing.capture.error.endswith("decoder: h264: concealing 12 errors")


def test_a_picture_smeared_over_the_last_one_counts_as_none(tmp_path):
    (tmp_path / "film.ts").write_bytes(film())
    with closing(of_file(tmp_path / "film.ts")) as reader:
        reader._packets = iter([SimpleNamespace(decode=lambda: [SimpleNamespace(is_corrupt=True)])])
        assert reader.read().size == 0


# --- Decoded frames: interlaced, turned, of several sizes, damaged, on no device


COUNT = 16
H264 = {"qp": "18", "preset": "ultrafast"}
MPEG2 = {"b": "6M"}


def of_file(path, **options):
    """Return a reader of a file."""
    return StreamReader(Source(address=str(path), kind="file", **options), 20.0)


def read_all(path, **options):
    """Return the pictures of a file, and their times."""
    pictures, times = [], []
    with closing(of_file(path, **options)) as reader:
        while (picture := reader.read()) is not None:
            pictures.append(picture)
            times.append(reader.position_s)
    return pictures, times


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """What a camera that is not interlaced sends of the first fields, without a deinterlacer."""
    path = tmp_path_factory.mktemp("truth") / "film.mp4"
    write_video(path, [picture_at(2 * number) for number in range(COUNT)], **H264)
    with closing(of_file(path)) as reader:
        pictures = [reader.read() for _ in range(COUNT)]
        assert reader.read() is reader._pictures._graph is None
    return pictures


@pytest.mark.parametrize(
    ("codec", "ending", "fields", "options"),
    [
        ("libx264", "mkv", "bff", H264),
        ("libx264", "ts", "tff", {"qp": "18", "bf": "2"}),
        ("mpeg2video", "mpg", "bff", MPEG2),
    ],
)
def test_interlaced_files_are_deinterlaced(tmp_path, truth, codec, ending, fields, options):
    path, raw = tmp_path / f"film.{ending}", list(woven(COUNT, fields == "tff"))
    write_video(path, raw, codec, fields=fields, **options)
    pictures, times = read_all(path)
    assert times == pytest.approx([number / 25 for number in range(COUNT)], abs=1e-3)
    for picture, combed, progressive in zip(pictures, raw, truth, strict=True):
        assert combing(picture) < 0.002
        assert combing(combed) > 0.05
        assert error(picture, progressive) < 0.25 * error(combed, progressive)
        assert sharpness(picture) == pytest.approx(sharpness(progressive), rel=0.2)


def test_a_stream_may_become_interlaced_and_change_its_size(tmp_path):
    """Program streams of different cameras, one behind the other as a recorder leaves them."""
    path, content = tmp_path / "film.mpg", b""
    for pictures, fields in (
        ([picture_at(2 * number) for number in range(COUNT)], "prog"),
        (woven(COUNT, True), "tff"),
        ([cv2.resize(picture, (160, 120)) for picture in woven(COUNT, True)], "tff"),
    ):
        write_video(path, pictures, "mpeg2video", fields=fields, **MPEG2)
        content += path.read_bytes()
    path.write_bytes(content)
    pictures, _ = read_all(path)
    heights = [picture.shape[0] for picture in pictures]
    assert heights == sorted(heights, reverse=True)
    assert heights.count(240) >= 2 * COUNT - 2, "the decoder itself may lose one where two meet"
    assert heights.count(120) == COUNT
    assert max(map(combing, pictures[: heights.count(240)])) < 0.002


@pytest.mark.parametrize("turn", [90, 180])
def test_a_turned_video_is_upright(tmp_path, turn):
    write_video(tmp_path / "film.mp4", [picture_at(0)] * 3, turn=turn, **H264)
    write_video(tmp_path / "upright.mp4", [picture_at(0)] * 3, **H264)
    (upright, *_), _ = read_all(tmp_path / "upright.mp4")
    for picture in read_all(tmp_path / "film.mp4")[0]:
        assert np.array_equal(picture, np.rot90(upright, turn // 90))
        assert picture.flags.c_contiguous


def test_a_file_is_read_as_opencv_reads_it(tmp_path):
    path = tmp_path / "film.mkv"
    noise = np.random.default_rng(0).integers(0, 256, (6, 12, 16, 3), np.uint8)
    large = [cv2.resize(one, (320, 240), interpolation=cv2.INTER_CUBIC) for one in noise]
    write_video(path, large, bf="2", preset="ultrafast")
    capture, (pictures, times) = cv2.VideoCapture(str(path)), read_all(path)
    for picture, at in zip(pictures, times, strict=True):
        assert np.array_equal(picture, capture.read()[1])
        assert at == pytest.approx(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, abs=1e-3)
    assert not capture.read()[0]
    capture.release()


def test_one_camera_starts_no_thread(tmp_path):
    write_video(tmp_path / "film.mp4", woven(COUNT, True), fields="tff", **H264)
    with closing(of_file(tmp_path / "film.mp4")) as reader:
        before = len(os.listdir("/proc/self/task"))
        while reader.read() is not None:
            assert len(os.listdir("/proc/self/task")) <= before


def test_the_name_of_a_file_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", [picture_at(0)] * 3, **H264)
    for name in ("concat:a.mp4|b.mp4", "subfile,,start,0,end,9,,:a.mp4", "a?b:c.mp4"):
        (tmp_path / name).hardlink_to(tmp_path / "a.mp4")
        assert parse_source(name).kind == "file"
        assert len(read_all(name)[0]) == 3


def test_a_file_that_ends_early_or_is_damaged(tmp_path):
    cut, damaged = tmp_path / "cut.ts", tmp_path / "damaged.h264"
    for path in (cut, damaged):
        write_video(path, [picture_at(number) for number in range(40)], **H264)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert 10 < len(read_all(cut)[0]) < 30
    content = bytearray(damaged.read_bytes())
    middle, quarter = len(content) // 2, len(content) // 4
    content[middle : middle + quarter] = bytes(range(1, 255)) * (quarter // 254)
    damaged.write_bytes(content)
    with closing(of_file(damaged)) as reader:
        pictures, lines = [], []
        while (picture := reader.read()) is not None:
            pictures.append(picture)
            lines += reader.take_errors()
    assert sum(picture.size > 0 for picture in pictures) > 10
    assert any(line.startswith("h264: ") for line in lines)


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
    for name in ("none", "auto", "cuda"):
        pictures, _ = read_all(path, hwaccel=name)
        assert len(pictures) == COUNT
        assert combing(pictures[-1]) < 0.002
    with refused("unknown_hwaccel", UsageError, found="abacus"):
        StreamReader.require(Source(address=str(path), kind="file", hwaccel="abacus"))
    assert find_hwaccel("none")[0] is None
