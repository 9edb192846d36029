"""The newest frame of a camera in the console: its polygons, and who may see it."""

import io
import re

import pytest
from PIL import Image

from tests.helpers.console import ODD, START, log_lines
from upperson_rt.gallery.snapshots import Snapshot, picture_path, snapshot_folder, write_snapshot
from upperson_rt.strict import parse_json

SQUARE = ((0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (0.0, 1.0))


def write(console, camera, **more):
    made = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(made, "JPEG")
    snapshot = Snapshot(camera=camera, width=128, height=96, **{"time": START, **more})
    folder = snapshot_folder(console.service.gallery)
    write_snapshot(folder, snapshot, made.getvalue())
    return picture_path(folder, camera)


def test_the_page_draws_zones_and_masks_by_their_numbers(console):
    camera = "<new>"  # It has no pictures of people yet.
    write(console, camera, zones=(SQUARE, SQUARE[:3]), masks=(SQUARE[1:],))
    live = console.client.get("/live").text
    (link,) = re.findall('href="(/live/camera[?][^"]*)"', live)
    page = console.client.get(link)
    assert page.status_code == 200
    drawn = re.findall('<polygon class="(zone|mask)" points="([^"]*)"/>', page.text)
    points = [tuple(tuple(map(float, p.split(","))) for p in each.split()) for _, each in drawn]
    assert [kind for kind, _ in drawn] == ["zone", "zone", "mask"]
    assert points == [SQUARE, SQUARE[:3], SQUARE[1:]]
    texts = re.findall('<text x="(.*?)%" y="(.*?)%">(.*?)</text>', page.text)
    assert [name for *_, name in texts] == ["zone 1", "zone 2", "mask 1"]
    assert [float(place) for place in texts[0][:2]] == [25, 75]
    (source,) = re.findall('<img src="(/live/camera/[^"]*)"', page.text)
    answer = console.client.get(source)
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["cache-control"] == "no-store"
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.size == (64, 48)
    logged = parse_json(console.log.read_text().splitlines()[-1], "the log")
    assert (logged["action"], logged["details"]) == ("view", {"snapshot": camera})


def test_each_frame_of_a_camera_is_logged_once(console):
    write(console, "gate")
    for _ in range(2):
        answer = console.client.get("/live/camera/picture?name=gate")
        assert answer.status_code == 200
    (line,) = log_lines(console)
    assert (line["action"], line["details"]) == ("view", {"snapshot": "gate"})
    assert line["filter"] == {"camera": "gate"}
    write(console, "gate", time=START + 60)
    console.client.get("/live/camera/picture?name=gate")
    assert len(log_lines(console)) == 2


@pytest.mark.parametrize("path", ["/live/camera", "/live/camera/picture"])
def test_accounts_see_their_own_cameras_alone(guarded, path):
    for camera in ("gate", ODD):
        write(guarded, camera, zones=(SQUARE,))

    def status(camera, role):
        client = guarded.client if role is None else getattr(guarded, role)
        return client.get(path, params={"name": camera}).status_code

    assert status("gate", "viewer") == status("gate", "admin") == status(ODD, "admin") == 200
    assert status(ODD, "viewer") == status("none", "viewer") == 404
    assert status("gate", None) in (303, 401)
    live = guarded.viewer.get("/live").text
    assert re.findall('href="/live/camera[?]name=([^"]*)"', live) == ["gate"]


def test_a_file_that_does_not_decode_is_not_sent(console):
    file = write(console, "gate")
    file.write_bytes(b"<script>")
    answer = console.client.get("/live/camera/picture", params={"name": "gate"})
    assert answer.status_code >= 400
    assert b"<script>" not in answer.content
    file.unlink()
    assert console.client.get("/live/camera/picture?name=gate").status_code >= 400
