"""Whole frames and clips: cut from real packets, bounded, never half, gone with who is in them."""

import errno
import os
import shutil
import signal
import sys
import time
import tracemalloc
from contextlib import closing

import av
import cv2
import numpy as np
import pytest

from tests.helpers.command_line import run_code
from tests.helpers.fake_camera import (
    BOX,
    LIVE,
    START,
    FakeEncoder,
    FakeOpener,
    FakeTime,
    Gate,
    person_frame,
    started,
    submit,
    wait_for,
)
from tests.helpers.made_video import RATE, write_video
from tests.helpers.refused import refused
from tests.helpers.rtsp_camera import rtsp_camera
from tests.unit.runtime.camera.test_capture import mjpeg_camera
from upperson_camera import Pipeline, PipelineSettings, clips, recorder, worker
from upperson_camera.clips import ClipStage
from upperson_camera.frames import CameraCrop
from upperson_camera.recorder import Recorder
from upperson_camera.stats import Counters
from upperson_camera.stream import StreamReader
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Item
from upperson_rt.gallery.clips import AFTER_S, BEFORE_S, all_clips, clip_name, clips_dir, clips_of
from upperson_rt.ingest.boxes import QualityRules

GOP = 20
EXACT = {"g": str(GOP), "keyint_min": str(GOP), "sc_threshold": "0", "qp": "10", "bf": "0"}
RULES = {"motion_gate": False, "still_every_s": 0.0, "still_score": 0.0, "every_s": 2.0}


def numbered(count, size=(240, 320)):
    """Frames of a person with their number as eight black or white fields in the last lines."""
    for number in range(count):
        frame = person_frame(size=size)
        for bit in range(8):
            frame[-16:, bit * size[1] // 8 : (bit + 1) * size[1] // 8] = 255 * (number >> bit & 1)
        yield frame


def number_of(frame):
    """Return the number in a frame of `numbered`."""
    fields = np.split(frame[-12:-4].mean(axis=(0, 2)), 8)
    return sum(1 << bit for bit, field in enumerate(fields) if field.mean() > 128)


def numbers_in(path):
    """Which frames of `numbered` a video shows."""
    with av.open(str(path)) as video:
        return [number_of(frame.to_ndarray(format="bgr24")) for frame in video.decode(video=0)]


def watch(encoder, gallery, path, own=None, **options):
    with Pipeline(encoder, gallery, **{**RULES, "clip_s": 0.8, **options}) as pipeline:
        pipeline.add_camera("gate", str(path), lambda f: [BOX], start_time=START, **own or {})
        pipeline.wait()
    return pipeline.stats().cameras["gate"]


def kept(gallery):
    """Frame number, whole frame and clip of each row, as far as they are kept."""
    rows = sorted(gallery.items(), key=lambda item: item.time)
    return [(row.attributes["frame"], *clips_of(gallery.crops_dir, row.crop)) for row in rows]


def bytes_of(gallery):
    """Bytes of all frames and clips; those that share a file count once."""
    found = [file.path.stat() for file in all_clips(gallery.crops_dir)]
    return sum({one.st_ino: one.st_size for one in found}.values())


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_video(path, numbered(120), **EXACT)
    return path


def test_each_picture_has_its_frame_and_a_clip_that_begins_at_a_key_frame(encoder, gallery, film):
    stats = watch(encoder, gallery, film)
    assert stats.clips == stats.whole_frames == stats.committed == 3
    assert stats.clips_dropped == {}
    for number, frame, clip in kept(gallery):
        assert (frame.is_clip, clip.is_clip, clip.plays) == (False, True, True)
        shown = cv2.imread(str(frame.path))
        assert shown.shape == (240, 320, 3)
        assert number_of(shown) == number
        numbers = numbers_in(clip.path)
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        wanted = max(0, number - 20)
        assert numbers[0] % GOP == 0
        assert wanted - GOP < numbers[0] <= wanted
        assert abs(numbers[-1] - min(119, number + 20)) <= 1
        # The name says when; the frame is at the time of the row.
        assert frame.begin == pytest.approx(START + number / RATE, abs=0.002)
        assert clip.begin == pytest.approx(START + numbers[0] / RATE, abs=0.05)
        assert clip.end == pytest.approx(START + numbers[-1] / RATE, abs=0.05)
    left = [path.name for path in clips_dir(gallery.crops_dir).iterdir()]
    assert left == ["gate"]
    watch(encoder, gallery, film)
    assert len(list(all_clips(gallery.crops_dir))) == 6, "a second run adds none"


def test_pictures_at_about_the_same_time_share_a_clip_which_goes_with_the_last(
    encoder, gallery, film
):
    assert watch(encoder, gallery, film, every_s=0.4).clips == 12
    shared = {}
    for number, _, clip in kept(gallery):
        shared.setdefault(clip.path.stat().st_ino, set()).add(clip.path)
        numbers = numbers_in(clip.path)
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert numbers[0] <= max(0, number - 20)
        assert numbers[-1] >= min(119, number + 20) - 1
    assert len(shared) < 12, "how many share one is a matter of speed"
    paths = max(shared.values(), key=len)
    assert {path.stat().st_nlink for path in paths} == {len(paths)}
    # A limit below the sum of all names, and above that of all files, removes nothing.
    stage_of(gallery, most_bytes=bytes_of(gallery)).end(10.0)
    assert sum(file.is_clip for file in all_clips(gallery.crops_dir)) == 12


def test_without_hard_links_each_picture_has_a_copy(encoder, gallery, film, monkeypatch):
    monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
    assert watch(encoder, gallery, film, every_s=0.4).clips == 12
    assert {clip.path.stat().st_nlink for _, _, clip in kept(gallery)} == {1}


def test_codecs_that_browsers_do_not_play_are_in_matroska(encoder, gallery, tmp_path):
    path = tmp_path / "film.mkv"
    write_video(path, numbered(60), "mpeg4", g=str(GOP))
    assert watch(encoder, gallery, path, clip_s=0.4).clips >= 1
    clip = kept(gallery)[0][2]
    assert clip.path.suffix == ".mkv"
    assert len(numbers_in(clip.path)) >= 10


def test_frames_of_crops_that_wait_are_bounded(encoder, gallery, film, monkeypatch):
    monkeypatch.setattr(worker, "_MOST_FRAMES", 2)
    assert watch(encoder, gallery, film, every_s=0.4, batch_size=1).clips == 12  # A file waits.
    with Gate() as gate:
        pipeline = started(FakeEncoder(encoder, gate), gallery, clip_s=1.0, batch_size=1)
        submit(pipeline, 6)
        wait_for(lambda: pipeline.stats().cameras["gate"].accepted == 6)
    pipeline.stop()
    stats = pipeline.stats().cameras["gate"]
    dropped = stats.clips_dropped["queue_full"]
    assert dropped in (3, 4)  # The encoder may have taken one.
    assert (stats.whole_frames, stats.committed) == (6 - dropped, 6)


def test_off_by_default_frames_alone_and_cameras_without_pictures(encoder, gallery, film):
    assert watch(encoder, gallery, film, clip_s=None).whole_frames == 0
    assert not clips_dir(gallery.crops_dir).exists()
    stats = watch(encoder, gallery, film, clip_s=0.0)
    assert (stats.whole_frames, stats.clips, stats.clips_dropped) == (3, 0, {})
    with refused("clips_without_pictures", UsageError):
        Pipeline(encoder, gallery, clip_s=1.0, save_crops=False)
    with refused("setting_out_of_range", UsageError):
        PipelineSettings(clip_s=61.0)
    stats = watch(encoder, gallery, film, own={"save_crops": False})
    assert (stats.committed, stats.whole_frames, stats.clips_dropped) == (3, 0, {})


def test_a_source_without_packets_has_frames_only(encoder, gallery):
    opener = FakeOpener([person_frame()] * 6)
    with Pipeline(encoder, gallery, **RULES, clip_s=1.0, min_views=1, opener=opener) as pipeline:
        pipeline.add_camera("gate", LIVE, lambda frame: [BOX])
        pipeline.add_camera("hall")
        pipeline.submit("hall", person_frame(), [BOX], wait_s=None)
        wait_for(lambda: pipeline.drain() and pipeline.stats().cameras["gate"].committed)
    for stats in pipeline.stats().cameras.values():
        assert (stats.whole_frames, stats.clips, stats.clips_dropped) == (1, 0, {"no_packets": 1})


def test_a_change_of_size_begins_a_new_clip(encoder, gallery, tmp_path):
    path = tmp_path / "film.h264"
    parts = []
    for size in ((240, 320), (480, 640)):
        write_video(path, numbered(70, size), **EXACT)
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    stats = watch(encoder, gallery, path, every_s=0.5)
    assert stats.clips == stats.committed > 6
    sizes = set()
    for _, frame, clip in kept(gallery):
        with av.open(str(clip.path)) as video:
            found = {(one.height, one.width) for one in video.decode(video=0)}
        assert found == {cv2.imread(str(frame.path)).shape[:2]}
        sizes |= found
    assert sizes == {(240, 320), (480, 640)}


# --- The recorder alone


def recorded(path, tmp_path, change=lambda number, packet: True, at=60, **options):
    """Feed a recorder; return it and the cut around one packet."""
    made = Recorder("gate", False, options.pop("clip_s", 1.0), 10.0, lambda: tmp_path)
    session, cut = made.begin(), "not_reached"
    with av.open(str(path)) as video:
        for number, packet in enumerate(video.demux(video=0)):
            list(packet.decode())
            if packet.size and change(number, packet):
                session.put(packet)
            if number == at:
                cut = made.cut(made.count)
    session.end()
    return made, cut


def test_time_stamps_that_are_missing_or_jump_are_made_good(film, tmp_path):
    def change(number, packet):
        if number in (50, 51):
            packet.dts = packet.pts = None
        if 55 <= number < 70:
            packet.dts, packet.pts = packet.dts - 10**9, packet.pts - 10**9
        if number >= 70:
            packet.dts, packet.pts = packet.dts + 10**9, packet.pts + 10**9
        return True

    _, cut = recorded(film, tmp_path, change)
    assert cut.is_complete
    begin, end = clips.write_clip([cut], tmp_path / "clip.mp4", START)
    assert numbers_in(tmp_path / "clip.mp4") == list(range(20, 86))
    assert (begin, end) == pytest.approx((START - 40 / RATE, START + 25 / RATE), abs=0.05)


def test_a_stream_without_key_frames_has_no_clips_and_one_that_is_away_is_cut_short(film, tmp_path):
    made, cut = recorded(film, tmp_path, lambda number, packet: not packet.is_keyframe)
    assert cut == "no_key_frame"
    assert made.cut(made.count) == "no_packets"  # It has ended.
    made, cut = recorded(film, tmp_path, lambda number, packet: number < 70)
    clips.write_clip([cut], tmp_path / "clip.mp4", START)
    assert numbers_in(tmp_path / "clip.mp4") == list(range(20, 70))
    assert made.cut(0) == "too_late"
    assert Recorder("gate", True, 1.0, 10.0, lambda: tmp_path).cut(0) == "no_packets"


def test_when_pictures_came_counts_where_a_stream_has_no_times(tmp_path, monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr("upperson_camera.recorder.time", clock)
    made = Recorder("gate", True, 2.0, 10.0, lambda: tmp_path)
    session = made.begin()

    def put(packet):
        clock.more_s += 0.2
        session.put(packet)

    with (
        mjpeg_camera([person_frame()] * 30) as source,
        closing(StreamReader(source, 10.0)) as reader,
    ):
        reader.on_packet = put
        for _ in range(30):
            assert reader.read().size
    clips.write_clip([made.cut(15)], tmp_path / "clip.mkv", START)
    with av.open(str(tmp_path / "clip.mkv")) as video:
        times = [frame.time for frame in video.decode(video=0)]
    assert len(times) > 5
    assert np.diff(times).min() > 0.195


def test_a_long_stream_keeps_its_bounds(film, tmp_path, monkeypatch):
    with av.open(str(film)) as video:
        packets = [bytes(packet) for packet in video.demux(video=0) if packet.size]
    most = 3 * sum(map(len, packets[:GOP]))
    monkeypatch.setattr(recorder, "_BYTES_PER_S", most / 8.5)
    made = Recorder("gate", False, 0.5, 0.5, lambda: tmp_path)
    cuts = []
    for _ in range(10):
        session = made.begin()
        with av.open(str(film)) as video:
            for packet in video.demux(video=0):
                list(packet.decode())
                session.put(packet)
                assert sum(segment.size for segment in made._all) <= most
                if segments := made._segments:
                    last = segments[-1].packets[-1].at
                    assert last - segments[0].packets[0].at <= 1.0 + 2 * GOP / RATE
        cuts.append(made.cut(made.count))  # They are held: there is no room in the end.
    assert "buffer_full" in {made._missing, *(cut for cut in cuts if isinstance(cut, str))}


# --- Disks


def test_a_full_disk_costs_clips_and_nothing_else(encoder, gallery, film, monkeypatch, caplog):
    def full(*values):
        raise OSError(errno.ENOSPC, "No space left on device")

    def check_with(whole_frames, lost, name, value, *places):
        with monkeypatch.context() as patched:
            for place in places:
                patched.setattr(place, name, value)
            stats = watch(encoder, gallery, film)
        assert (stats.committed, stats.whole_frames, stats.clips) == (3, whole_frames, 0)
        assert stats.clips_dropped == {"disk": lost}

    check_with(3, 3, "add", full, recorder.Segment)
    check_with(3, 3, "write_clip", full, clips)
    lost = [one for one in caplog.records if getattr(one, "event", "") == "clips_lost"]
    assert len(lost) == 2  # Once for the packets, once for the files.
    # What is left for the gallery.
    check_with(0, 6, "RESERVE_BYTES", shutil.disk_usage(gallery.location).total, recorder, clips)
    assert list(all_clips(gallery.crops_dir)) == []  # The oldest went first, in vain.
    assert watch(encoder, gallery, film).clips == 3


KILLED = """
import os, signal
import upperson_rt
from tests.unit.runtime.camera import test_clips
from upperson_camera import clips
bundle, gallery, film = sys.argv[1:]
place = clips.put_in_place
def killed(temporary, path):
    if path.suffix == ".mp4":
        assert temporary.stat().st_size
        os.kill(os.getpid(), signal.SIGKILL)
    place(temporary, path)
clips.put_in_place = killed
encoder = upperson_rt.open(bundle, "fp32", "onnxruntime", threads=1)
with upperson_rt.Gallery.open(gallery, encoder.fingerprint, encoder.embed_dim, create=True) as made:
    test_clips.watch(encoder, made, film)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_process_that_is_killed_leaves_no_half_clip(bundle, gallery, encoder, film):
    ended = run_code(KILLED, bundle, gallery.location, film)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    folder = clips_dir(gallery.crops_dir)
    assert len(list(folder.glob(".unfinished.*"))) == 1
    assert not any(file.is_clip for file in all_clips(gallery.crops_dir))
    assert watch(encoder, gallery, film).clips == 3
    assert not list(folder.glob(".unfinished.*"))


def stage_of(gallery, days=7.0, most_bytes=1 << 30):
    made = ClipStage(gallery.crops_dir, Counters(), days, most_bytes)
    made.start()
    return made


def test_old_files_go_and_all_together_stay_below_their_bytes(gallery):
    folder = clips_dir(gallery.crops_dir)
    day = folder / "gate" / "2026-11-30"
    day.mkdir(parents=True)

    def place_of(name):
        return folder / clip_name(f"gate/2026-11-30/{name}.jpg", ".mp4", START, START + 1)

    for age, name in enumerate("abcdef"):
        place_of(name).write_bytes(bytes(1000))
        os.utime(place_of(name), (0, time.time() - age * 86_400 - 60))
    for name, other in zip("bd", "BD", strict=True):  # Those that share a file count and go once.
        os.link(place_of(name), place_of(other))
    other = day / "notes.txt"
    other.write_text("not ours")
    stage_of(gallery, days=4.0).end(10.0)
    assert {file.crop for file in all_clips(gallery.crops_dir)} == set("abcdBD")
    stage_of(gallery, most_bytes=2500).end(10.0)
    assert {file.crop for file in all_clips(gallery.crops_dir)} == set("abB")
    assert other.exists()


def test_a_look_at_all_files_takes_a_few_bytes_for_each(gallery):
    folder, count = clips_dir(gallery.crops_dir), 3000
    (folder / "gate" / "2026-11-30").mkdir(parents=True)
    for number in range(count):
        crop = f"gate/2026-11-30/20261130T080000-track-{number}.jpg"
        (folder / clip_name(crop, ".jpg", START + number)).touch()
    tracemalloc.start()
    try:
        stage_of(gallery).end(10.0)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 100 * count


def test_what_is_deleted_while_its_clip_is_written_does_not_come_back(
    encoder, gallery, film, monkeypatch
):
    write = clips.write_clip

    def deleted(cuts, path, moment):
        gallery.delete([item.key for item in gallery.items()])
        return write(cuts, path, moment)

    monkeypatch.setattr(clips, "write_clip", deleted)
    with Gate() as gate:
        save = ClipStage._save_clip
        monkeypatch.setattr(  # After all rows are there.
            ClipStage, "_save_clip", lambda *values: (gate.hold(), save(*values))
        )
        with Pipeline(encoder, gallery, **RULES, clip_s=0.8) as pipeline:
            pipeline.add_camera("gate", str(film), lambda frame: [BOX], start_time=START)
            pipeline.wait()
            pipeline.drain()
            gate.open()
    stats = pipeline.stats().cameras["gate"]
    assert (stats.committed, stats.clips) == (3, 0)
    assert stats.clips_dropped == {"deleted": 3}
    assert list(all_clips(gallery.crops_dir)) == []


def test_frames_of_the_time_of_a_deleted_person_are_not_saved(gallery):
    assert PipelineSettings().still_every_s + BEFORE_S <= AFTER_S
    stage, crops = stage_of(gallery), []
    near = {"before": -BEFORE_S - 1, "early": -BEFORE_S + 1, "late": AFTER_S - 1}
    for name, later_s in {"anna": 0, **near, "after": AFTER_S + 1}.items():
        path = gallery.crops_dir / f"gate/2026-11-30/{name}.jpg"
        if name != "anna":  # Who was deleted.
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"crop")
        crop = str(path.relative_to(gallery.crops_dir))
        crops.append(CameraCrop(
            item=Item(key=name, time=START + later_s, crop=crop), pixels=person_frame(),
            camera="gate", arrived=0.0, chosen=0.0, frame_jpeg=bytes(1000),
        ))  # fmt: skip
    stage.put(crops)
    stage.end(10.0)
    assert {file.crop for file in all_clips(gallery.crops_dir)} == {"before", "after"}
    stage = stage_of(gallery, most_bytes=2500)  # Of 1,000 for each.
    stage.put(crops[1:])
    stage.end(10.0)
    assert 1000 <= bytes_of(gallery) <= 2500


def test_a_disk_that_does_not_answer_is_abandoned(encoder, gallery, film, monkeypatch, caplog):
    with Gate() as gate:
        monkeypatch.setattr(clips, "write_clip", lambda *values: gate.hold())
        stats = watch(encoder, gallery, film, end_within_s=0.2)
    assert (stats.committed, stats.clips) == (3, 0)
    assert any(getattr(one, "event", "") == "clips_lost" for one in caplog.records)


# --- A real RTSP server


@pytest.mark.usefixtures("there_is_a_server")
def test_a_real_camera_gives_clips_also_after_a_change_and_a_loss(encoder, gallery):
    def stats():
        return pipeline.stats().cameras["gate"]

    def more_clips(pictures=1):
        before = stats().clips
        wait_for(lambda: stats().clips >= before + pictures)

    with rtsp_camera() as camera:
        options = {**RULES, "every_s": 0.5, "clip_s": 0.5, "min_views": 1}
        options["quality"] = QualityRules(min_sharpness=0.0)
        with Pipeline(encoder, gallery, **options) as pipeline:
            pipeline.add_camera("gate", camera.address, lambda frame: [[100, 20, 160, 110]])
            more_clips()
            camera.tell("size 640x480")
            wait_for(lambda: stats().resolution_changes)
            more_clips(5)  # The first ones may be of pictures from before.
            camera.kill()
            wait_for(lambda: stats().outages)
            camera.start()
            reconnected = stats().frames_read
            wait_for(lambda: stats().frames_read > reconnected + 30)
            more_clips()
    sizes = set()
    for row in gallery.items():
        for file in clips_of(gallery.crops_dir, row.crop):
            if not file.is_clip:
                assert file.begin == pytest.approx(row.time, abs=0.002)
                continue
            assert file.path.suffix == ".mp4"
            assert file.begin - 0.002 <= row.time <= file.end + 0.5
            with av.open(str(file.path)) as video:
                frames = list(video.decode(video=0))
            found = {(one.width, one.height) for one in frames}
            assert len(found) == 1
            sizes |= found
            assert frames[0].key_frame
            assert np.ptp([one.time for one in frames]) <= 0.5 + 0.5 + 1.5
    assert {(320, 240), (640, 480)} <= sizes
