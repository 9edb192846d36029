"""What `Pipeline.submit` says became of a frame, how it waits, and what names and options mean."""

import threading
from typing import get_type_hints

import numpy as np

from tests.helpers.fake_camera import BOX, START, Gate, person_frame, wait_for
from tests.helpers.refused import refused
from upperson_camera import Pipeline, PipelineOptions, PipelineSettings
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter


def test_a_program_can_wait_for_room_in_the_queue(encoder, gallery):
    gate, seen = Gate(), []

    def detector(frame):
        seen.append(int(frame[0, 0, 0]))
        gate.hold()
        return []

    def submit_all():
        frames = (np.full((8, 8, 3), number, np.uint8) for number in range(20))
        results.extend(pipeline.submit("film", frame) for frame in frames)

    results = []
    with Pipeline(encoder, gallery, frame_queue=2) as pipeline, gate:
        pipeline.add_camera("film", detector=detector, drop="block")
        submitting = threading.Thread(target=submit_all)
        submitting.start()
        wait_for(lambda: len(results) == 3)
        assert pipeline.stats().frame_queues["film"] == 2
        gate.open()
        submitting.join()
        assert pipeline.drain(60)
    assert seen == [*range(20)]
    assert all(results)
    assert [one.index for one in results] == [*range(20)]
    assert pipeline.stats().total("frames_processed") == 20
    assert pipeline.stats().dropped("frames_dropped") == {}


def test_a_wait_for_room_has_an_end_and_then_the_policy_decides(encoder, gallery):
    gate = Gate()
    frame = np.zeros((8, 8, 3), np.uint8)

    def refuse_to_wait(frame):
        with refused("called_from_own_thread", UsageError, call="submit"):
            pipeline.submit("old", frame, wait_s=1)
        gate.hold()
        return []

    with Pipeline(encoder, gallery, frame_queue=1, end_within_s=1000) as pipeline, gate:
        results = {}
        for name, drop in (("old", "oldest"), ("new", "newest"), ("film", "block")):
            pipeline.add_camera(name, detector=lambda frame: refuse_to_wait(frame), drop=drop)
        for number, name in enumerate(("old", "new", "film")):
            assert pipeline.submit(name, frame, wait_s=0)
            wait_for(lambda name=name: pipeline.stats().frame_queues[name] == 0)
            assert pipeline.submit(name, frame, wait_s=0)
            results[name] = pipeline.submit(name, frame, wait_s=0.01 * number)
        assert (bool(results["old"]), results["old"].displaced) == (True, 1)
        for name in ("new", "film"):
            assert (bool(results[name]), results[name].reason) == (False, "queue_full")
        waiting = []
        held = threading.Thread(target=lambda: waiting.append(pipeline.submit("film", frame)))
        held.start()
        with refused("out_of_range", UsageError):
            pipeline.submit("film", frame, wait_s=-1)
        pipeline._cameras["film"].refuse_frames()
        held.join()
        assert waiting[0].reason == "stopped"
        assert pipeline.submit("old", frame[:0], []).reason == "empty"


def test_a_track_name_is_unique_in_the_gallery(encoder, gallery):
    with Pipeline(encoder, gallery, every_s=0, min_views=1) as pipeline:
        for camera in ("gate", "hall"):
            pipeline.add_camera(camera)
            pipeline.submit(camera, person_frame(), [BOX], START)
            pipeline.submit(camera, person_frame(), [BOX], START + 9, tracks=["1"])
    cameras = {}
    for item in gallery.items():
        cameras.setdefault(item.track, set()).add(item.camera)
    assert len(cameras) >= 4
    assert all(len(found) == 1 for found in cameras.values())
    for track, (camera,) in cameras.items():
        assert track.startswith(f"{camera}/{pipeline.run_name}-")
        assert gallery.count(Filter(track=track)) == gallery.count(
            Filter(track=track, camera=camera)
        )


def test_every_setting_is_a_typed_option_and_no_other_is_taken(encoder, gallery):
    hints = get_type_hints(PipelineOptions)
    settings = get_type_hints(PipelineSettings)
    assert hints == {name: kind | None for name, kind in settings.items()}
    for value in (5, None):
        with refused("option_unknown", UsageError, found="every"):
            Pipeline(encoder, gallery, every=value)
    with refused("no_bool", UsageError):
        Pipeline(encoder, gallery, save_crops="no")
    assert Pipeline(encoder, gallery, every_s=None).settings == PipelineSettings()
