"""With `serve --blur` frames and clips show one person, unless there is a reason."""

import json
import sys
from itertools import product

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.helpers.console import (
    START,
    add_items,
    exported,
    id_of,
    last_line,
    log_lines,
    picture_in,
    problem,
)
from tests.unit.runtime.serve.test_live import write
from upperson_console import pictures
from upperson_console.blur import pixelated
from upperson_rt import image_file
from upperson_rt.gallery import Item
from upperson_rt.gallery.clips import clip_name, clips_dir

BOX = (40, 30, 80, 130)
CROP = f"gate/2026-11-30/101112-000-abc.sha256-{'0' * 32}.jpg"


def noise(width=320, height=240):
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)


def detail(pixels, x0, y0, x1, y1):
    """The mean difference of neighbours in a part of a picture: noise has some 80."""
    part = np.asarray(pixels, np.int16)[y0:y1, x0:x1]
    return float(np.abs(np.diff(part, axis=1)).mean())


def opened(answer):
    assert answer.status_code == 200, answer.text
    return picture_in(answer.content)


def is_hidden(picture):
    """Whether nothing outside of the box can be recognised, and the box can."""
    assert detail(picture, *BOX) > 20
    return detail(picture, 100, 0, 320, 240) < 12 and detail(picture, 0, 150, 320, 240) < 12


@pytest.fixture
def blurred(guarded):
    """A console that blurs, with a picture that has a frame and a clip; ids by role."""
    guarded.service.blur = True
    gallery = guarded.service.gallery
    folder = clips_dir(gallery.crops_dir)
    (folder / CROP).parent.mkdir(parents=True)
    Image.fromarray(noise()).save(folder / clip_name(CROP, ".jpg", START), quality=95)
    (folder / clip_name(CROP, ".mp4", START - 5, START + 4)).write_bytes(b"clip")
    cut = gallery.crops_dir / CROP
    cut.parent.mkdir(parents=True)
    Image.fromarray(noise()).save(photo := guarded.folder / "photo.png")
    place = {"camera": "gate", "time": START, "box": BOX}
    whole = Item(key="photo", source=str(photo), **place)
    add_items(guarded, Item(key="filmed", crop=CROP, **place), whole)
    return guarded


def paths(console, key="filmed"):
    id_ = id_of(console, key)
    return f"/people/{id_}/picture?size=frame", f"/api/v1/items/{id_}/picture?size=frame"


@pytest.mark.parametrize("key", ["filmed", "photo"])
def test_a_frame_shows_the_target_alone_to_everybody_without_a_reason(blurred, key):
    for path in paths(blurred, key):
        for client in (blurred.viewer, blurred.operator, blurred.admin):
            for unseen in ("", "&reason=+", "&reason=%E2%80%8B"):
                assert is_hidden(opened(client.get(f"{path}{unseen}")))
    problem(blurred.viewer.get(f"{path}&reason=x"), 403, "blurred")
    assert not any(line["action"] == "unblur" for line in log_lines(blurred))


def test_an_operator_is_offered_and_sees_it_for_a_reason_that_is_logged_each_time(blurred):
    id_ = id_of(blurred, "filmed")
    for path in paths(blurred):
        for _ in range(2):
            answer = blurred.operator.get(f"{path}&reason=case+7")
            assert not is_hidden(opened(answer))
            assert answer.headers["cache-control"] == "no-store"
    lines = [line for line in log_lines(blurred) if line["action"] == "unblur"]
    assert [(line["user"], line["ids"], line["details"]) for line in lines] == 4 * [
        ("olga", [id_], {"frame": str(id_), "reason": "case 7"})
    ]
    assert is_hidden(opened(blurred.operator.get(path)))  # The cache keeps both apart.
    problem(blurred.operator.get(f"{paths(blurred)[1]}&reason={'x' * 501}"), 422)
    for role, offered in (("viewer", False), ("operator", True)):
        client = getattr(blurred, role)
        assert ('name="reason"' in client.get(f"/people/{id_}/frame").text) == offered
        assert ("Unblurred, because" in client.get("/?q=red").text) == offered
    page = blurred.operator.get(f"/people/{id_}/frame?reason=a%26b").text
    assert "size=frame&amp;reason=a%26b" in page
    assert blurred.viewer.get(f"/people/{id_}/frame?reason=x").status_code == 403


def test_clips_are_withheld_without_pyav(blurred, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    id_ = id_of(blurred, "filmed")
    path = f"/api/v1/items/{id_}/clip"
    for client in (blurred.viewer, blurred.operator, blurred.admin):
        problem(client.get(path), 403, "blurred")
    problem(blurred.viewer.get(f"{path}?reason=x"), 403, "blurred")
    for _ in range(2):
        assert blurred.operator.get(f"{path}?reason=case+7").content == b"clip"
    lines = [line["details"] for line in log_lines(blurred) if line["action"] == "unblur"]
    assert lines == [{"clip": str(id_), "reason": "case 7"}]
    page = blurred.viewer.get(f"/people/{id_}").text
    assert ("<video" in page, 'name="reason"' in page) == (False, False)
    assert f'action="{path}"' in blurred.operator.get(f"/people/{id_}").text


def test_an_export_is_blurred_too(blurred):
    ids = [str(id_of(blurred, key)) for key in ("filmed", "photo")]
    Image.fromarray(noise(40, 100)).save(blurred.service.gallery.crops_dir / "own.png")

    def export(**more):
        return exported(blurred.operator.post("/api/v1/export", json={"ids": ids, **more}))

    files = export()
    facts = json.loads(files["items.json"])
    assert (facts["blurred"], facts["clips"]) == (True, 0)
    withheld = ["clip_withheld" in row for row in facts["items"]]
    assert withheld == [True, False], "it cannot be decoded"
    assert all(is_hidden(picture_in(files[f"frames/{id_}.jpg"])) for id_ in ids)
    shapes = {picture_in(files[name]).size for name in files if name.startswith("pictures/")}
    assert shapes == {(40, 100)}  # The box alone, cut from the photograph.
    facts = json.loads(export(reason="court order 5")["items.json"])
    shown = facts["blurred"], facts["clips"], facts["reason"]
    assert shown == (False, 1, "court order 5")
    unblur, line = log_lines(blurred)[-2:]
    assert (unblur["action"], line["action"]) == ("unblur", "export")
    assert (unblur["details"]["reason"], unblur["ids"]) == ("court order 5", line["ids"])


def test_the_picture_of_a_camera_is_blurred_as_a_whole(blurred):
    file = write(blurred, "gate")
    Image.fromarray(noise()).save(file, quality=95)
    path = "/live/camera/picture?name=gate"
    for client in (blurred.viewer, blurred.admin):
        assert detail(opened(client.get(path)), 0, 0, 320, 240) < 12
    assert detail(opened(blurred.operator.get(f"{path}&reason=lamp")), 0, 0, 320, 240) > 20
    assert last_line(blurred)["details"] == {"snapshot": "gate", "reason": "lamp"}
    assert blurred.viewer.get(f"{path}&reason=x").status_code == 403


@pytest.fixture
def large(blurred):
    """A function that adds a photo that is decoded at half its size, and returns its item's id.

    Another person, of noise, stands where the box would be if it was not divided.
    """
    before = 2 * image_file._BUDGET.each
    image_file.limit_memory(20 << 20)

    def add(suffix, box):
        pixels = np.full((1200, 1600, 3), (200, 0, 0), np.uint8)
        pixels[200:600, 200:400] = (0, 0, 200)
        pixels[400:1200, 400:800] = np.kron(noise(20, 40), np.ones((20, 20, 1), np.uint8))
        file = blurred.folder / f"large{suffix}"
        Image.fromarray(pixels).save(file, quality=90)
        item = Item(key="large", camera="gate", time=START, box=box, source=str(file))
        return add_items(blurred, item)[0]

    yield add
    image_file.limit_memory(before)


def needs_avif():
    missing = image_file.obstacle_to("avif")
    return pytest.param(".avif", marks=pytest.mark.skipif(bool(missing), reason=missing))


@pytest.mark.parametrize("suffix", [".jpg", needs_avif()])
def test_of_a_photo_that_is_decoded_smaller_the_box_is_shown_and_nothing_else(
    blurred, large, suffix
):
    id_ = large(suffix, (200, 200, 400, 600))
    cut = opened(blurred.viewer.get(f"/people/{id_}/picture?size=view"))
    assert cut.size == (100, 200)
    assert np.asarray(cut)[..., 2].min() > 150
    frame = opened(blurred.viewer.get(f"/people/{id_}/picture?size=frame"))
    assert frame.getpixel((150, 200))[2] > 150
    assert detail(frame, 200, 200, 400, 600) < 12
    files = exported(blurred.operator.post("/api/v1/export", json={"ids": [str(id_)]}))
    assert picture_in(files[f"pictures/{id_}.jpg"]).size == (100, 200)


@pytest.mark.parametrize("suffix", [".jpg", needs_avif()])
def test_of_a_photo_that_was_indexed_smaller_nothing_is_shown(blurred, large, suffix, monkeypatch):
    """Its box may be in pixels of the file or of the smaller picture."""
    monkeypatch.setattr(image_file, "MOST_BYTES", 10 << 20)
    id_ = large(suffix, (400, 400, 800, 1200))
    for size in ("view", "thumb"):
        problem(blurred.viewer.get(f"/api/v1/items/{id_}/picture?size={size}"), 404)
    frame = opened(blurred.viewer.get(f"/people/{id_}/picture?size=frame"))
    assert detail(frame, 0, 0, 800, 600) < 12


def test_a_text_in_a_png_does_not_move_the_box(blurred, tmp_path):
    facts, file = PngInfo(), tmp_path / "text.png"
    facts.add_text("shrink", "8")
    Image.fromarray(noise()).save(file, pnginfo=facts)
    assert is_hidden(picture_in(pictures.blurred_jpeg(file, BOX)[0]))


def test_of_a_box_outside_of_its_photo_there_is_no_picture(blurred):
    file = blurred.folder / "photo.png"
    boxes = [(500, 500, 600, 600), (-90, -90, -10, -10), (80, 30, 40, 130)]
    items = [
        Item(key=f"outside{n}", camera="gate", time=START, box=box, source=str(file))
        for n, box in enumerate(boxes)
    ]
    ids = [*map(str, add_items(blurred, *items))]
    for id_, size in product(ids, ("view", "thumb")):
        problem(blurred.viewer.get(f"/api/v1/items/{id_}/picture?size={size}"), 404)
    files = exported(blurred.operator.post("/api/v1/export", json={"ids": ids}))
    assert not any(name.startswith("pictures/") for name in files)
    assert sorted(json.loads(files["manifest.json"])["missing"]) == sorted(ids)
    for box in (None, (0, 0, 0, 0), *boxes):
        made = pixelated(Image.fromarray(noise()), (320, 240), box)
        assert (made.size, detail(made, 0, 0, 320, 240) < 12) == ((320, 240), True), box


def test_people_cut_from_one_photograph_do_not_share_a_picture(console, tmp_path):
    """Also of one whose crop is not kept any more."""
    photo = tmp_path / "photo.png"
    Image.fromarray(noise()).save(photo)
    boxes = [(0, 0, 50, 100), (100, 50, 180, 150)]
    items = [
        Item(key=f"cut{n}", box=box, source=str(photo), crop=None if n else "gone.jpg")
        for n, box in enumerate(boxes)
    ]
    for id_, size in zip(add_items(console, *items), [(50, 100), (80, 100)], strict=True):
        assert opened(console.client.get(f"/people/{id_}/picture?size=view")).size == size
