"""Frame and clip of a picture: page, API with ranges, export, accounts, deletion."""

import hashlib
import json
from datetime import datetime

import pytest

from tests.helpers.console import (
    START,
    add_items,
    exported,
    id_of,
    log_lines,
    picture_in,
    problem,
)
from tests.helpers.toy_bundle import draw_person
from upperson_rt.gallery import Item
from upperson_rt.gallery.clips import all_clips, clip_name, clips_dir

CONTENT = bytes(range(256)) * 40
CROP = f"gate/2026-11-30/101112-000-abc.sha256-{'0' * 32}.jpg"


of_both_kinds = pytest.mark.parametrize("filmed", [".mp4", ".mkv"], indirect=True)


@pytest.fixture
def filmed(console, request):
    """A picture with a frame of 300 x 200 pixels, and a clip."""
    suffix = getattr(request, "param", ".mp4")
    gallery = console.service.gallery
    folder = clips_dir(gallery.crops_dir)
    (folder / CROP).parent.mkdir(parents=True)
    draw_person(folder / clip_name(CROP, ".jpg", START), "red", size=(300, 200))
    clip = folder / clip_name(CROP, suffix, START - 5, START + 4.5)
    clip.write_bytes(CONTENT)
    item = Item(key="filmed", camera="gate", time=START, box=(10, 20, 110, 180), crop=CROP)
    return add_items(console, item)[0], clip


@of_both_kinds
def test_the_page_shows_the_clip_and_the_frame_with_its_box(console, filmed):
    id_, clip = filmed
    answer = console.client.get(f"/people/{id_}")
    address = f"/api/v1/items/{id_}/clip"
    assert (f'src="{address}#t=0.0"' in answer.text) == (clip.suffix == ".mp4")
    assert f'href="{address}" download' in answer.text
    assert "media-src 'self'" in answer.headers["content-security-policy"]
    frame = console.client.get(f"/people/{id_}/frame").text
    assert 'viewBox="0 0 300 200"' in frame
    assert '<rect x="10" y="20" width="100" height="160"/>' in frame
    picture = console.client.get(f"/api/v1/items/{id_}/picture?size=frame")
    assert picture_in(picture.content).size == (300, 200)


def views_of(console, id_):
    return [line for line in log_lines(console) if line["details"].get("clip") == str(id_)]


@of_both_kinds
def test_the_clip_can_be_read_in_parts_and_is_logged_once_an_hour(console, filmed):
    id_, file = filmed

    def clip(range_="", **more):
        address = f"/api/v1/items/{id_}/clip"
        return console.client.get(address, headers={"range": range_, **more})

    def is_beyond(range_, code="range_unsatisfiable"):
        problem(clip(range_), 416, code)
        return clip(range_).headers["content-range"] == f"bytes */{file.stat().st_size}"

    assert all(map(is_beyond, ("bytes=99999-", "bytes=10240-10250", "bytes=-0")))
    assert is_beyond("bytes=0-1,5-6", "several_ranges")
    assert views_of(console, id_) == []
    for given, part, of in (
        ("bytes=0-", CONTENT, "0-10239"),
        ("bytes=100-199", CONTENT[100:200], "100-199"),
        ("bytes=-10", CONTENT[-10:], "10230-10239"),
    ):
        answer = clip(given)
        assert (answer.status_code, answer.content) == (206, part)
        assert answer.headers["content-range"] == f"bytes {of}/10240"
    kind = {".mp4": "video/mp4", ".mkv": "video/x-matroska"}[file.suffix]
    expected = {"content-type": kind, "accept-ranges": "bytes", "cache-control": "no-store"}
    for given in (
        "", "bytes=5-2", "bytes=-", "bytes", "bytes=,", "bytes=+1-2", "bytes=0-1,x", "items=0-3",
        "bytes=0-" + 200 * "9",
    ):  # fmt: skip
        answer = clip(given)
        assert (answer.status_code, answer.content) == (200, CONTENT), given
        assert answer.headers.items() >= expected.items()
        assert "content-range" not in answer.headers
    assert clip("bytes=99999-", **{"if-range": '"of-another-clip"'}).content == CONTENT
    (seen,) = views_of(console, id_)
    assert seen["action"] == "view"
    file.write_bytes(b"")
    assert all(map(is_beyond, ("bytes=0-", "bytes=-5")))
    assert clip().content == b""


def test_there_is_no_clip_of_others_and_no_path_to_another_file(console, filmed):
    id_, clip = filmed
    for path in ("..%2F..%2Fetc%2Fpasswd", f"{id_}%2F..", f"{clip.name}", "-1"):
        assert console.client.get(f"/api/v1/items/{path}/clip").status_code in (404, 422)
    target = clip.rename(clip.with_name("elsewhere"))
    clip.symlink_to(target)
    problem(console.client.get(f"/api/v1/items/{id_}/clip"), 404, "clip_not_kept")


@of_both_kinds
def test_the_export_holds_frame_and_clip_with_their_hashes(console, filmed):
    """Pictures that share a clip share it there."""
    id_, clip = filmed
    crop = CROP.replace("abc", "def")
    other = clip.parents[2] / clip_name(crop, clip.suffix, START - 5, START + 4.5)
    other.hardlink_to(clip)
    (also,) = add_items(console, Item(key="also", camera="gate", time=START + 1, crop=crop))
    ids = [*map(str, (id_, also, id_of(console, "red-0")))]
    files = exported(console.client.post("/api/v1/export", json={"ids": ids}))
    items = {one["key"]: one for one in json.loads(files["items.json"])["items"]}
    found, name = items["filmed"], f"clips/{id_}{clip.suffix}"
    assert [one for one in files if one.startswith("clips/")] == [name]
    assert files[name] == CONTENT
    assert name == found["clip"]["file"] == items["also"]["clip"]["file"]
    assert found["clip"]["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    frame = {"file": f"frames/{id_}.jpg", "width": 300, "height": 200}
    assert found["frame"].items() >= frame.items()
    assert datetime.fromisoformat(found["frame"]["time"]).timestamp() == START
    assert found["box"] == [10, 20, 110, 180]
    assert f'href="{name}"' in files["index.html"].decode()
    assert items["red-0"]["frame"] is items["red-0"]["clip"] is None


def test_a_deletion_takes_frame_and_clip_along(console, filmed):
    id_, _ = filmed
    console.client.get(f"/people/{id_}/picture?size=frame")  # Into the cache.
    form = {"ids": str(id_), "reason": "asked for"}
    assert console.client.post("/delete", data=form).status_code == 200
    assert list(all_clips(console.service.gallery.crops_dir)) == []
    for path in (f"/api/v1/items/{id_}/clip", f"/people/{id_}/picture?size=frame"):
        assert console.client.get(path).status_code == 404
