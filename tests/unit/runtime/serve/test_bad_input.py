"""What is refused, each in one clear line, with nothing lost."""

import io
import os
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.console import ODD, add_items, exported, id_of, last_line, log_lines, problem
from tests.helpers.toy_bundle import draw_person, make_toy_bundle
from upperson_console import current
from upperson_console.accounts import Account
from upperson_console.problems import ProblemError
from upperson_log.chain import verify_log
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.crops import name_with_hash


def send(console, content):
    return console.client.post("/api/v1/pictures", files={"picture": ("x", content)})


def encoded(image, *arguments, **more):
    buffer = io.BytesIO()
    image.save(buffer, *arguments, **more)
    return buffer.getvalue()


def export(console, *ids):
    return console.client.post("/api/v1/export", json={"ids": [*map(str, ids)]})


def delete(console, id_):
    return console.client("DELETE", f"/api/v1/items/{id_}?reason=x")


def test_only_pictures_are_taken(reader):
    frames = [Image.new("RGB", (40, 90), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert send(reader, gif).status_code == 201
    bomb = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(bomb) < 1 << 20
    for content in (bomb, b"", b"<svg/>", b"\xff\xd8\xff\xe0 cut"):
        assert "/tmp" not in problem(send(reader, content), 422)


def test_html_and_sql_in_names_are_shown_as_text(console):
    (id_,) = add_items(
        console,
        Item(key="<script>alert(1)</script>", camera=ODD, track="<img src=x onerror=a>",
             source="x\"onload=\"y", attributes={"<i>": "</dd><script>"}),
    )  # fmt: skip
    for path in ("/", "/?q=red", f"/people/{id_}", f"/people/{id_}/delete", "/timeline?q=red"):
        text = console.client.get(path).text
        assert [one for one in ("<script>", "<b>hall", "<img src=x") if one in text] == []
    found = console.client.search(sentence="red", filter={"cameras": [ODD]}).json()
    assert {hit["camera"] for hit in found["hits"]} == {ODD}
    page = console.client.get("/", params={"q": "'; DROP TABLE items; -- <b>", "camera": ODD})
    assert "&lt;b&gt;" in page.text
    assert console.service.gallery.count() == 19


def test_a_cursor_is_of_one_search(reader):
    query = {"sentence": "red", "limit": 2}
    cursor = reader.client.search(**query).json()["next"]
    for change in ({"sentence": "green"}, {"order": "time"}, {"filter": {"cameras": ["gate"]}}):
        answer = reader.client.search(**{**query, **change}, cursor=cursor)
        problem(answer, 422, "cursor_of_other_search")
    for wrong in ("x", "", "W10", "WzEsMiwzLDRd", "\u00fc"):
        problem(reader.client.search(sentence="red", cursor=wrong), 422, "cursor_unknown")


def test_deletions_at_the_same_time_name_each_picture_once(console):
    id_, together = id_of(console, "red-0"), threading.Barrier(6)
    account = Account(name="local", role="admin")

    def status(_):
        together.wait(60)
        try:
            return console.service.delete(account, [id_], "requested", {})
        except ProblemError as error:
            return error.status

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(status, range(6))) == [1] + [404] * 5
    assert [line["ids"] for line in log_lines(console)] == [[id_]]
    # Of several pictures the line names those that were left.
    left = id_of(console, "red-1")
    form = {"ids": f"{id_} {left}", "reason": "requested"}
    assert console.client.post("/delete", data=form).status_code == 200
    assert last_line(console)["ids"] == [left]
    assert console.client.post("/delete", data=form).status_code == 404


@pytest.mark.parametrize("inode", ["another", "reused"])
def test_a_replaced_gallery_is_opened_again_if_it_is_of_the_same_model(console, monkeypatch, inode):
    if inode == "reused":
        there = (1, 1)
        monkeypatch.setattr(
            current, "_identity", lambda place: there if Path(place).exists() else None
        )
        console.service.current.last.identity = there
    assert console.client.search(sentence="red").json()["total"] == 18
    encoder = console.service.encoder
    shutil.rmtree(console.folder)
    with Gallery.open(console.folder, encoder.fingerprint, encoder.embed_dim, create=True) as new:
        new.add([Item(key="new")], encoder.encode_texts(["red"]))
    console.service.current._checked = 0.0
    found = console.client.search(sentence="red").json()
    assert ([hit["key"] for hit in found["hits"]], found["total"]) == (["new"], 1)
    shutil.rmtree(console.folder)
    console.service.current._checked = 0.0
    problem(console.client.get("/api/v1/ready"), 503)
    Gallery.open(console.folder, "sha256:another", 16, create=True).close()
    for answer in (console.client.search(sentence="red"), console.client.get("/api/v1/ready")):
        assert "another model" in problem(answer, 503)
    assert console.client.get("/?q=red").status_code == 503


def test_a_bundle_of_another_model_under_the_server_is_refused(make_console, tmp_path):
    bundle = make_toy_bundle(tmp_path / "bundle")
    console = make_console(encoder=open_encoder(bundle, threads=1))
    shutil.rmtree(bundle)
    make_toy_bundle(bundle, seed=5)
    assert "text." in problem(console.client.search(sentence="red"), 503)
    assert console.log.read_bytes() == b""


def test_a_full_disk_answers_nothing_and_loses_nothing(console, monkeypatch):
    assert console.client.search(sentence="red").status_code == 200
    write = os.write

    def full(file, content):
        if b'"action"' in content:
            raise OSError(28, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(os, "write", full)
    id_ = id_of(console, "red-0")
    for answer in (
        console.client.search(sentence="red"),
        delete(console, id_),
        export(console, id_),
        console.client("PUT", "/api/v1/marks", json={"sentence": "red", "yes": [str(id_)]}),
    ):
        problem(answer, 507, "log_not_writable")
    assert console.client.get("/?q=red").status_code == 507
    problem(console.client.get("/api/v1/ready"), 503, "log_unwritable")
    monkeypatch.setattr(os, "write", write)
    assert console.client.get("/api/v1/ready").status_code == 200
    assert last_line(console)["action"] == "resume"
    assert console.service.gallery.count() == 18
    assert console.client.search(sentence="red").status_code == 200
    assert verify_log(console.log).problems == []


def test_a_server_that_cannot_log_is_not_ready(console, monkeypatch):
    """Also before the first request that fails; a log that was moved away is made anew."""
    usage = shutil.disk_usage(console.folder)._replace(free=1000)
    for where, name, value in ((shutil, "disk_usage", usage), (os, "access", False)):
        assert console.client.get("/api/v1/ready").status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(where, name, lambda *arguments, value=value: value)
            problem(console.client.get("/api/v1/ready"), 503, "log_unwritable")
    assert console.client.get("/api/v1/ready").status_code == 200
    assert console.log.read_bytes() == b""


def test_wrong_addresses_and_forms_are_reported_on_a_page(reader):
    for path, status in {
        "/?q=red&where=floor": 422,
        "/?like=abc": 422,
        f"/?picture={'0' * 32}": 404,
        "/?like=123456": 404,
        "/people/9999999999999999999999": 404,
        "/people/abc": 422,
        "/nowhere": 404,
    }.items():
        answer = reader.client.get(path)
        assert (answer.status_code, "Traceback" in answer.text) == (status, False), path
        assert answer.headers["content-type"].startswith("text/html")
    for path, form in (
        ("/delete", {"ids": "9" * 5000}),
        ("/delete", {"ids": "1 two"}),
        ("/saved/forget", {"saved": "9" * 23}),
        ("/export", {"ids": "-1"}),
        ("/marks", {"address": "q=red", "no": "9" * 5000}),
    ):
        answer = reader.client.post(path, data=form)
        assert answer.status_code == 422, form
        assert answer.headers["content-type"].startswith("text/html")


def test_a_defect_is_one_line_of_the_log_and_has_no_traceback(console, monkeypatch, caplog):
    monkeypatch.setattr(console.service, "cameras", lambda account: 1 / 0)
    with caplog.at_level("ERROR"):  # Servers log the traceback of what is raised to them.
        answer = console.client.get("/api/v1/cameras", defects=True)
    problem(answer, 500, "internal_error")
    (record,) = caplog.records
    line = record.getMessage()
    assert ("/api/v1/cameras" in line, "\n" in line, record.exc_info) == (True, False, None)
    assert console.client.get("/").status_code == 500


def test_requests_beyond_the_encoders_queue_are_refused(console, monkeypatch):
    began, go_on = threading.Event(), threading.Event()
    encode, queue = console.service.encoder.encode_tokens, console.service.queue

    def slow(*tokens):
        began.set()
        assert go_on.wait(20)
        return encode(*tokens)

    monkeypatch.setattr(console.service.encoder, "encode_tokens", slow)
    queue._most = 2
    with ThreadPoolExecutor(2) as pool:
        early = [pool.submit(console.client.search, sentence=f"red {n}") for n in range(2)]
        assert began.wait(20)
        while queue.waiting < 2:
            pass
        late = console.client.search(sentence="red and late")
        go_on.set()
    problem(late, 429, "encoder_busy")
    assert (int(late.headers["retry-after"]) >= 1, queue.refused) == (True, 1)
    assert [one.result().status_code for one in early] == [200, 200]


def test_a_damaged_picture_is_left_out_and_an_altered_crop_is_refused(console, monkeypatch):
    id_, crops = id_of(console, "red-0"), console.service.gallery.crops_dir
    (crops / "red0.png").write_bytes(b"no picture any more")
    assert sorted(exported(export(console, id_))) == ["index.html", "items.json", "manifest.json"]
    problem(console.client.get(f"/api/v1/items/{id_}/picture"), 422)
    name = name_with_hash("hashed", b"another picture")
    draw_person(crops / "drawn.png", "red").rename(crops / name)
    (altered,) = add_items(console, Item(key="hashed", crop=name))
    for answer in (
        console.client.get(f"/api/v1/items/{altered}/picture?size=thumb"),
        console.client.get(f"/api/v1/items/{altered}/picture?size=view"),
        export(console, altered),
    ):
        assert "altered" in problem(answer, 503)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "open", full)
    problem(export(console, id_), 507)
