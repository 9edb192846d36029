"""What is refused, each in one clear line, with nothing lost."""

import asyncio
import io
import os
import shutil
import threading
import zipfile

import httpx
import pytest
from PIL import Image

from tests.helpers.console import BASE, ODD, problem
from tests.helpers.gallery_places import some_vectors
from tests.helpers.toy_bundle import draw_person, make_toy_bundle
from upperson_console.guard import MOST_BODY_BYTES
from upperson_rt.bundle import open_encoder
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.crops import name_with_hash
from upperson_rt.log_chain import verify_log


def send(console, content):
    return console.client.post("/api/v1/pictures", files={"picture": ("x", content)})


def test_a_picture_bomb_is_refused(reader):
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 1 << 20
    assert "the picture is too large" in problem(send(reader, buffer.getvalue()), 422)


def test_a_large_upload_is_refused_before_it_is_kept(reader):
    async def stream():
        yield b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield bytes(1 << 20)

    for headers in ({}, {"content-length": str(100 << 20)}):
        headers = {"content-type": "multipart/form-data; boundary=x", **headers}
        answer = reader.client.post("/api/v1/pictures", content=stream(), headers=headers)
        assert "larger than 20 MiB" in problem(answer, 413)
    assert MOST_BODY_BYTES == 20 << 20


def test_a_gif_is_a_picture(reader):
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (40, 90), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert send(reader, buffer.getvalue()).status_code == 201


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"<svg/>", b"\xff\xd8\xff\xe0 cut", b"%PDF-1.4"]
)
def test_what_is_no_picture_is_refused(reader, content):
    detail = problem(send(reader, content), 422)
    assert "the picture" in detail
    assert "/tmp" not in detail


def test_a_very_long_sentence_is_refused(reader):
    long = "woman in red " * 800
    assert "sentence" in problem(reader.client.search(sentence=long), 422)
    page = reader.client.get("/", params={"q": long})
    assert page.status_code == 422
    assert "10,400 letters, at most 2,000 are taken" in page.text


def test_html_and_sql_in_names_are_shown_as_text(console):
    console.desk.gallery.add(
        [Item(key="<script>alert(1)</script>", camera=ODD, track="<img src=x onerror=a>",
              source="x\"onload=\"y", attributes={"<i>": "</dd><script>"})],
        console.desk.encoder.encode_texts(["red"]),
    )  # fmt: skip
    (id_,) = console.desk.gallery.ids(["<script>alert(1)</script>"]).values()
    for path in ("/", "/?q=red", f"/people/{id_}", f"/people/{id_}/delete", "/timeline?q=red"):
        text = console.client.get(path).text
        assert "<script>" not in text
        assert "<b>hall" not in text
        assert "<img src=x" not in text
    found = console.client.search(sentence="red", filter={"cameras": [ODD]}).json()
    assert {hit["camera"] for hit in found["hits"]} == {ODD}
    page = console.client.get("/", params={"q": "'; DROP TABLE items; -- <b>", "camera": ODD})
    assert "&lt;b&gt;" in page.text
    assert console.desk.gallery.count() == 19


@pytest.mark.parametrize(
    "change", [{"sentence": "green"}, {"order": "time"}, {"filter": {"cameras": ["gate"]}}]
)
def test_a_cursor_of_another_search_is_refused(reader, change):
    asked = {"sentence": "red", "limit": 2}
    cursor = reader.client.search(**asked).json()["next"]
    detail = problem(reader.client.search(**{**asked, **change}, cursor=cursor), 422)
    assert "belongs to another search" in detail


@pytest.mark.parametrize("cursor", ["x", "", "W10", "WzEsMiwzLDRd", "\u00fc", "AAAA" * 100])
def test_what_is_no_cursor_is_refused(reader, cursor):
    assert "this cursor is none" in problem(
        reader.client.search(sentence="red", cursor=cursor), 422
    )


def test_two_browsers_delete_the_same_person(console):
    (id_,) = console.desk.gallery.ids(["red-0"]).values()
    form = {"ids": str(id_), "reason": "asked for it", "what": "picture"}
    first, second = (console.client.post("/delete", data=form) for _ in range(2))
    assert "Deleted 1 picture" in first.text
    assert second.status_code == 200
    assert "Nothing was left to delete" in second.text
    assert console.desk.gallery.count() == 17
    gone = console.client("DELETE", f"/api/v1/items/{id_}?reason=x")
    assert "may have been deleted" in problem(gone, 404)


def test_a_gallery_that_was_made_anew_is_searched(console):
    assert console.client.search(sentence="red").json()["total"] == 18
    encoder = console.desk.encoder
    shutil.rmtree(console.folder)
    with Gallery.open(console.folder, encoder.fingerprint, encoder.embed_dim, create=True) as new:
        new.add([Item(key="new")], encoder.encode_texts(["red"]))
    console.desk.current._looked = 0.0
    found = console.client.search(sentence="red").json()
    assert ([hit["key"] for hit in found["hits"]], found["total"]) == (["new"], 1)


def test_a_gallery_of_another_model_is_refused(console):
    shutil.rmtree(console.folder)
    Gallery.open(console.folder, "sha256:another", 16, create=True).close()
    console.desk.current._looked = 0.0
    for answer in (console.client.search(sentence="red"), console.client.get("/api/v1/ready")):
        assert "embeddings of another model" in problem(answer, 503)
    assert console.client.get("/?q=red").status_code == 503


def test_a_gallery_that_is_gone_is_told(console):
    shutil.rmtree(console.folder)
    console.desk.current._looked = 0.0
    assert "no gallery at" in problem(console.client.get("/api/v1/ready"), 503)


def test_a_bundle_of_another_model_under_the_server_is_refused(make_console, tmp_path):
    bundle = make_toy_bundle(tmp_path / "bundle")
    console = make_console(encoder=open_encoder(bundle, threads=1))
    shutil.rmtree(bundle)
    make_toy_bundle(bundle, seed=5)
    detail = problem(console.client.search(sentence="red"), 503)
    assert "text." in detail
    assert console.log.read_bytes() == b""


def test_a_full_disk_answers_nothing_and_loses_nothing(console, monkeypatch):
    assert console.client.search(sentence="red").status_code == 200
    write = os.write

    def full(file, content):
        if b'"action"' in content:
            raise OSError(28, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(os, "write", full)
    (id_,) = console.desk.gallery.ids(["red-0"]).values()
    for answer in (
        console.client.search(sentence="red"),
        console.client("DELETE", f"/api/v1/items/{id_}?reason=x"),
        console.client.post("/api/v1/export", json={"ids": [str(id_)]}),
        console.client("PUT", "/api/v1/marks", json={"sentence": "red", "yes": [str(id_)]}),
    ):
        assert "No space left on device; no query is answered" in problem(answer, 507)
    assert console.client.get("/?q=red").status_code == 507
    monkeypatch.setattr(os, "write", write)
    assert console.desk.gallery.count() == 18
    assert console.client.search(sentence="red").status_code == 200
    assert verify_log(console.log).problems == []


def test_a_gallery_that_cannot_be_written_to_is_searched_and_keeps_all(console, monkeypatch):
    def read_only(keys):
        raise InputError(
            f"cannot use gallery {console.folder}: attempt to write a readonly database"
        )

    monkeypatch.setattr(console.desk.gallery, "delete", read_only)
    (id_,) = console.desk.gallery.ids(["red-0"]).values()
    detail = problem(console.client("DELETE", f"/api/v1/items/{id_}?reason=x"), 422)
    assert "readonly" in detail
    assert console.client.search(sentence="red").json()["total"] == 18


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/?q=red&since=yesterday", "must be a time such as"),
        ("/?q=red&since=2026-11-25T10:00&until=2026-11-25T09:00", "since must be earlier"),
        ("/?q=red&where=floor", "is not KEY=VALUE"),
        ("/?like=abc", "a whole number"),
        ("/?q=red&share=7", "from 0 to 1"),
        ("/?q=red&marks=x1", "a mark is such as"),
        ("/?picture=00000000000000000000000000000000", "not kept any more"),
        ("/?like=123456", "may have been deleted"),
        ("/?like=9999999999999999999", "ids have up to 63 bits"),
        ("/?q=red&marks=y9999999999999999999", "ids have up to 63 bits"),
        ("/people/9999999999999999999999", "may have been deleted"),
        ("/people/99", "may have been deleted"),
        ("/people/abc", "id: "),
        ("/nowhere", "nothing at this address"),
    ],
)
def test_a_wrong_address_is_told_on_a_page(reader, path, words):
    answer = reader.client.get(path)
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"].startswith("text/html")
    assert words in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("path", "form", "words"),
    [
        ("/delete", {"ids": "9" * 5000}, "a whole number"),
        ("/delete", {"ids": "1 two"}, "a whole number"),
        ("/saved/forget", {"saved": "99999999999999999999999"}, "saved: "),
        ("/saved/forget", {"saved": "0"}, "saved: "),
        ("/export", {"ids": "99999999999999999999999"}, "ids.0: "),
        ("/export", {"ids": "-1"}, "ids.0: "),
        ("/marks", {"address": "q=red", "yes": "99999999999999999999999"}, "63 bits"),
        ("/marks", {"address": "q=red", "no": "9" * 5000}, "no: "),
    ],
)
def test_numbers_that_are_too_large_are_told_on_a_page(reader, path, form, words):
    answer = reader.client.post(path, data=form)
    assert answer.status_code == 422
    assert words in answer.text


def test_a_defect_is_one_line_of_the_log(console, monkeypatch, caplog):
    monkeypatch.setattr(console.desk, "cameras", lambda account: 1 / 0)

    async def ask():
        # As a server sees it: what is raised to it, it writes into the log with its trace.
        transport = httpx.ASGITransport(console.app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            return await client.get("/api/v1/cameras")

    with caplog.at_level("ERROR"):
        problem(asyncio.run(ask()), 500)
    (record,) = caplog.records
    assert "internal error at /api/v1/cameras: " in record.getMessage()
    assert "\n" not in record.getMessage()
    assert record.exc_info is None


def test_a_defect_is_told_without_its_trace(console, monkeypatch):
    monkeypatch.setattr(console.desk, "cameras", lambda account: 1 / 0)
    detail = problem(console.client.get("/api/v1/cameras"), 500)
    assert detail == "internal error: ZeroDivisionError; the server's log says more"
    page = console.client.get("/")
    assert page.status_code == 500
    assert "ZeroDivisionError" in page.text


def test_a_crowd_at_the_encoder_is_told_to_come_back(console, monkeypatch):
    began, go_on = threading.Event(), threading.Event()
    encode = console.desk.encoder.encode_tokens

    def slow(*tokens):
        began.set()
        assert go_on.wait(20)
        return encode(*tokens)

    monkeypatch.setattr(console.desk.encoder, "encode_tokens", slow)
    console.desk.turns._most = 2
    answers = []
    threads = [
        threading.Thread(
            target=lambda n=n: answers.append(console.client.search(sentence=f"red {n}"))
        )
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    assert began.wait(20)
    while console.desk.turns.waiting < 2:
        pass
    refused = console.client.search(sentence="red and late")
    assert "the encoder is busy" in problem(refused, 429)
    assert int(refused.headers["retry-after"]) >= 1
    go_on.set()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert console.desk.turns.refused == 1


def test_an_export_of_a_damaged_picture_goes_without_it(console):
    (id_,) = console.desk.gallery.ids(["red-0"]).values()
    (console.folder / "crops" / "red0.png").write_bytes(b"no picture any more")
    answer = console.client.post("/api/v1/export", json={"ids": [str(id_)]})
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sorted(archive.namelist()) == ["index.html", "items.json", "manifest.json"]
    assert "cannot read image" in problem(console.client.get(f"/api/v1/items/{id_}/picture"), 422)


def test_an_altered_crop_is_neither_shown_nor_exported(console):
    gallery, name = console.desk.gallery, name_with_hash("hashed", b"another picture")
    draw_person(gallery.crops_dir / "drawn.png", "red").rename(gallery.crops_dir / name)
    gallery.add([Item(key="hashed", crop=name)], some_vectors(1, dim=gallery.embed_dim))
    (id_,) = gallery.ids(["hashed"]).values()
    for size in ("thumb", "view"):
        answer = console.client.get(f"/api/v1/items/{id_}/picture?size={size}")
        assert "was altered" in problem(answer, 503)
    answer = console.client.post("/api/v1/export", json={"ids": [str(id_)]})
    assert "was altered" in problem(answer, 503)


def test_an_export_without_room_is_told(console, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    (id_,) = console.desk.gallery.ids(["red-0"]).values()
    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    answer = console.client.post("/api/v1/export", json={"ids": [str(id_)]})
    assert problem(answer, 507) == "cannot write the export: No space left on device"
