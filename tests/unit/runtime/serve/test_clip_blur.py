"""With `serve --blur` a clip shows the target alone: others cannot be recognised."""

import io
import time

import numpy as np
import pytest

from tests.helpers.console import START, add_items, exported, last_line, log_lines, problem
from tests.helpers.refused import refused
from upperson_console import clip_blur
from upperson_console.clip_blur import blurred_clip, box_at, can_blur_clips
from upperson_console.problems import ProblemError
from upperson_rt.gallery import Item
from upperson_rt.gallery.clips import clip_name, clips_dir

av = pytest.importorskip("av")
made_video = pytest.importorskip("tests.helpers.made_video")
if not can_blur_clips():
    pytest.skip("PyAV has no encoder of H.264", allow_module_level=True)

BEGIN, SECONDS = START - 2, 4
CROPS = [f"gate/2026-11-30/10111{n}-000-abc.sha256-{str(n) * 32}.jpg" for n in range(3)]
HIGH, WIDE = 100, 40


def target_at(second):
    """The box of the target, which walks to the right, 60 pixels a second."""
    x = round(10 + 60 * second)
    return x, 30, x + WIDE, 30 + HIGH


def pictures():
    """Stripes everywhere, which must not be seen; the target has other ones."""
    stripes = np.zeros((240, 320, 3), np.uint8)
    stripes[:, np.arange(320) % 8 < 4] = 255
    for number in range(25 * SECONDS):
        picture = stripes.copy()
        x0, y0, x1, y1 = target_at(number / 25)
        picture[y0:y1, x0:x1] = stripes[y0:y1, : len(picture[0, x0:x1])]
        yield picture


def contrast(picture, box):
    """The mean difference of neighbours in a row: of the stripes some 60."""
    x0, y0, x1, y1 = box
    part = np.asarray(picture[y0:y1, max(0, x0) : x1, 0], np.int16)
    return float(np.abs(np.diff(part, axis=1)).mean()) if part.size else 0.0


def frames(content):
    with av.open(io.BytesIO(content)) as film:
        assert [stream.type for stream in film.streams] == ["video"]
        return [(one.time, one.to_ndarray(format="rgb24")) for one in film.decode(video=0)]


def shown(frame, box):
    """Whether the target can be recognised, and whether anything outside of its box can."""
    wide = box[0] - 20, 0, box[2] + 20, frame.shape[0]
    rest = contrast(frame, (0, 0, max(0, wide[0]), 240)), contrast(frame, (wide[2], 0, 320, 240))
    return contrast(frame, box) > 25, max(rest) > 15


@pytest.fixture(params=[0, 180], ids=["upright", "turned"])
def film(request, tmp_path):
    """A clip; one is stored upside down, and marked so."""
    file = tmp_path / "film.mp4"
    turn = request.param
    made = (np.rot90(one, 2) if turn else one for one in pictures())
    made_video.write_video(file, map(np.ascontiguousarray, made), turn=turn)
    return file


def test_the_target_alone_is_seen_where_its_box_is_known(film):
    known = [(BEGIN + at, target_at(at)) for at in (1.0, 3.0)]
    found = frames(blurred_clip(film, BEGIN, known, time.monotonic() + 60))
    assert len(found) == 25 * SECONDS
    for at, frame in found:
        target, others = shown(frame, target_at(at))
        assert not others, at
        if 1.05 < at < 2.95:  # Its line is straight between the two boxes.
            assert target, at
    (_, alone), *_ = frames(blurred_clip(film, BEGIN, [], time.monotonic() + 60))
    assert contrast(alone, (0, 0, 320, 240)) < 15, "nothing is known"


def test_a_box_is_interpolated_over_short_gaps_alone():
    first, second, late = (0, 0, 10, 20), (20, 40, 50, 80), (100, 0, 110, 20)
    known = [(10.0, first), (12.0, second), (30.0, late)]
    expected = {8.9: None, 9.1: first, 10.0: first, 11.0: (10, 20, 30, 50), 12.0: second,
                12.9: second, 13.1: None, 29.1: late, 30.9: late, 31.1: None}  # fmt: skip
    assert {at: box_at(known, at) for at in expected} == expected
    assert box_at([], 10.0) is None
    assert box_at([(10.0, first), (10.0, late)], 10.0) in (first, late)


@pytest.fixture
def blurred(guarded, tmp_path):
    """A console that blurs, with a track of three pictures that share a clip."""
    guarded.service.blur = True
    gallery = guarded.service.gallery
    folder = clips_dir(gallery.crops_dir)
    (folder / CROPS[0]).parent.mkdir(parents=True)
    clip = folder / clip_name(CROPS[1], ".mp4", BEGIN, BEGIN + SECONDS)
    made_video.write_video(clip, pictures())
    track = {"camera": "gate", "track": "walk"}
    items = [
        Item(key=f"walk-{n}", time=BEGIN + at, crop=CROPS[n], box=target_at(at), **track)
        for n, at in enumerate((0.5, 2.0, 3.5))
    ]
    return guarded, add_items(guarded, *items)[1], clip


def test_viewers_see_a_clip_of_the_target_alone(blurred):
    console, id_, clip = blurred
    path = f"/api/v1/items/{id_}/clip"
    answer = console.viewer.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert answer.headers["cache-control"] == "no-store"
    for at, frame in frames(answer.content):
        target, others = shown(frame, target_at(at))
        assert (target or not 0.6 < at < 3.4, others) == (True, False), at
    size = len(answer.content)
    some = console.viewer.get(path, headers={"range": "bytes=10-99"})
    assert (some.status_code, some.content) == (206, answer.content[10:100])
    assert some.headers["content-range"] == f"bytes 10-99/{size}"
    problem(console.viewer.get(path, headers={"range": f"bytes={size}-"}), 416)
    (line,) = [one for one in log_lines(console) if one["details"].get("clip")]
    assert (line["action"], line["user"]) == ("view", "vera")
    problem(console.viewer.get(f"{path}?reason=x"), 403, "blurred")
    assert console.operator.get(f"{path}?reason=case+7").content == clip.read_bytes()
    assert last_line(console)["action"] == "unblur"
    assert "<video" in console.viewer.get(f"/people/{id_}").text
    files = exported(console.operator.post("/api/v1/export", json={"ids": [str(id_)]}))
    content = files[f"clips/{id_}.mp4"]
    assert not any(shown(frame, target_at(at))[1] for at, frame in frames(content))
    # Nothing is kept of a deleted person.
    body = {"track": "walk", "camera": "gate", "reason": "asked"}
    assert console.admin("DELETE", "/api/v1/tracks", params=body).status_code == 200
    assert console.service.pictures.kept_bytes == 0
    problem(console.viewer.get(path), 404)


def test_a_clip_that_cannot_be_hidden_is_withheld(blurred, monkeypatch):
    console, id_, clip = blurred
    content = clip.read_bytes()
    for damaged in (b"", b"clip", content[: len(content) // 2], content[:200] + bytes(5000)):
        clip.write_bytes(damaged)
        problem(console.viewer.get(f"/api/v1/items/{id_}/clip"), 403, "blurred")
    clip.write_bytes(content)
    with refused("blurred", ProblemError):
        blurred_clip(clip, BEGIN, [], time.monotonic() - 1)
    monkeypatch.setattr(clip_blur, "_MOST_PIXELS", 320 * 240 - 1)
    problem(console.viewer.get(f"/api/v1/items/{id_}/clip"), 403, "blurred")
