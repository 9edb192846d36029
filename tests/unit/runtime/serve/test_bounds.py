"""Bodies and pictures that would take much memory or time are refused before they do."""

import asyncio
import io
import json
import os
import threading
import tracemalloc
import zipfile

import httpx
import pytest
from PIL import Image

from tests.helpers.command_line import run_code
from tests.helpers.console import BASE, problem
from tests.helpers.hostile_clients import KINDS, Sent, gif_of_blocks, jpeg_of_segments
from upperson_console.bounds import JsonBounds, check_json
from upperson_console.guard import MOST_SMALL_BYTES, Guard
from upperson_console.problems import ProblemError
from upperson_console.turns import CLIENT, Turns

JSON = {"content-type": "application/json"}


def sent(console, request: Sent):
    return console.client(request.method, request.path, content=request.body,
                          headers=request.headers)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("one text of 18 MB", 422),
        ("a text of 18 MB of escapes", 422),
        ("a million keys", 413),
        ("a million elements", 422),
        ("a nest of a million", 422),
        ("a form of 900 files", 400),
        ("a form of 900 fields", 400),
        ("a form with a million keys", 422),
        ("a million fields", 413),
    ],
)
def test_a_body_takes_no_more_memory_than_a_few_times_its_bytes(reader, kind, status):
    request = KINDS[kind]()
    tracemalloc.start()
    try:
        answer = sent(reader, request)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.status_code == status
    assert peak < 4 * len(request.body) + (8 << 20)


def fed(content, size, **more):
    bounds = JsonBounds(**more)
    for at in range(0, len(content), size):
        bounds.feed(content[at : at + size])


def document(**more):
    return json.dumps({"sentence": "red", **more}).encode()


@pytest.mark.parametrize(
    "content",
    [
        document(),
        document(sentence='"' * 2000, track="\\" * 900),
        document(filter={"attributes": {f"k{n}": "\u00fc" * 100 for n in range(50)}}),
        json.dumps({"ids": [str(10**18 + n) for n in range(500)]}, indent=4).encode(),
        b'{"sentence": "\xc3\xbc[[[[[[[[[[[[[[[[[[[[{{{,,,,:::"}',
        b"",
        b'{"unfinished": "',
        b'\\" no document at all',
    ],
)
def test_a_document_within_the_bounds_passes(content):
    check_json(content)
    for size in (1, 2, 3, 100):  # However it comes in parts.
        fed(content, size)


@pytest.mark.parametrize(
    "content",
    [
        document(sentence="x" * 30_000),
        document(sentence="\\" * 30_000),
        document(sentence='"' * 30_000),
        document(**{f"k{n}": 1 for n in range(5_000)}),
        b"[" + b"1," * 5_000 + b"1]",
        b"[" + b" " * 300_000 + b"]",
        b"[" * 17 + b"]" * 17,
        b"[" + b"9" * 300_000 + b"]",
        b'{"a": "' + b"x" * 30_000,
        document().decode().encode("utf-16"),
        json.dumps({"input": "data:" + "x" * 30_000}).encode(),
    ],
)
def test_a_document_beyond_the_bounds_is_refused(content):
    with pytest.raises(ProblemError) as refused:
        check_json(content)
    assert refused.value.status == 422
    for size in (7, 1000):
        with pytest.raises(ProblemError):
            fed(content, size)


def test_a_data_url_may_be_long_where_pictures_are_taken():
    for start in ("data:image/png;base64,", "data:image\\/png;base64,"):
        content = b'{"input": ["' + start.encode() + b"A" * 100_000 + b'"]}'
        fed(content, 1000, may_hold_pictures=True)
        with pytest.raises(ProblemError):
            check_json(content)


def test_a_long_sentence_is_embedded_up_to_the_bound_of_a_search(reader):
    for letters, status in ((2000, 200), (2001, 422)):
        answer = reader.client.post("/v1/embeddings", json={"input": ["r" * letters, "red"]})
        assert answer.status_code == status


def test_base64_in_pieces_is_what_it_is_at_once(reader, red_jpeg, monkeypatch):
    import base64

    import upperson_console.api as api

    text = "data:image/jpeg;base64," + base64.b64encode(red_jpeg).decode()
    asked = {"input": text, "encoding_format": "base64"}
    whole = reader.client.post("/v1/embeddings", json=asked).json()["data"]
    monkeypatch.setattr(api, "PIECE_BYTES", 64)
    assert reader.client.post("/v1/embeddings", json=asked).json()["data"] == whole
    broken = text[:100] + "=" + text[101:]
    problem(reader.client.post("/v1/embeddings", json={"input": broken}), 422)


def test_only_routes_that_take_pictures_take_large_bodies(guarded):
    content = b" " * (MOST_SMALL_BYTES + 1)
    for path, status in (("/api/v1/search", 413), ("/saved", 413), ("/v1/embeddings", 422)):
        answer = guarded.viewer.post(path, content=content, headers=JSON)
        assert answer.status_code == status


# --- Pictures


@pytest.mark.parametrize(
    "content",
    [
        KINDS["a PNG of a million chunks"]().body.partition(b"\r\n\r\n")[2],
        jpeg_of_segments(b"\xff\xe0\0\2", 200_000),
        jpeg_of_segments(b"\xff", 200_000),
        gif_of_blocks(200_000),
    ],
    ids=["PNG chunks", "JPEG segments", "JPEG fill bytes", "GIF blocks"],
)
def test_a_picture_of_many_pieces_is_refused_after_a_bounded_number_of_reads(
    reader, content, monkeypatch
):
    from upperson_rt import image_file

    reads, read = [0], image_file._Metered.read

    def counted(self, size=-1):
        reads[0] += 1
        return read(self, size)

    monkeypatch.setattr(image_file._Metered, "read", counted)
    answer = reader.client.post("/api/v1/pictures", files={"picture": ("a", content)})
    assert "pieces" in problem(answer, 422)
    assert reads[0] <= image_file._MOST_READS + 1


def test_an_export_leaves_out_a_file_that_is_larger_than_a_picture(console):
    """Three GiB of zeros behind a crop: they are not read."""
    ids = console.desk.gallery.ids(["red-0", "red-1"])
    Image.new("RGB", (8, 24)).save(console.folder / "crops" / "red0.png", "JPEG")
    os.truncate(console.folder / "crops" / "red0.png", 3 << 30)
    os.truncate(console.folder / "crops" / "red1.png", 3 << 20)
    tracemalloc.start()
    try:
        answer = console.client.post("/api/v1/export", json={"ids": [str(i) for i in ids.values()]})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        rows = json.loads(archive.read("items.json"))["items"]
        assert {row["key"]: row["file"] for row in rows} == {
            "red-0": None,
            "red-1": f"pictures/{ids['red-1']}.png",
        }
        assert archive.getinfo(f"pictures/{ids['red-1']}.png").file_size == 3 << 20
    assert peak < 64 << 20


def test_an_export_beyond_its_bound_is_refused(console, monkeypatch):
    import upperson_console.answers as answers

    monkeypatch.setattr(answers, "_MOST_EXPORT_BYTES", 100)
    (id_,) = console.desk.gallery.ids(["red-0"]).values()
    problem(console.client.post("/api/v1/export", json={"ids": [str(id_)]}), 413)


def test_pictures_share_less_memory_where_it_is_limited(tmp_path):
    """In a process of its own: the limit holds for all of it."""
    Image.new("L", (6000, 5000)).save(tmp_path / "a.png")
    Image.new("L", (6000, 5000)).save(tmp_path / "a.jpg")
    code = (
        "import sys; from upperson_rt import image_file as f, preprocess as p; "
        "f.limit_memory(80 << 20); print(p.load_image(sys.argv[1]).shape); "
        "print(f._BUDGET._free >> 20); p.load_image(sys.argv[2])"
    )
    done = run_code(code, tmp_path / "a.jpg", tmp_path / "a.png")
    assert done.stdout == "(1250, 1500, 3)\n80\n"
    assert "the limit is 40" in done.stderr


# --- Shares of the server


def test_clients_take_turns():
    turns, order, threads = Turns(running=1, waiting=8), [], []

    def ask(client):
        CLIENT.set(client)
        with turns.turn():
            order.append(client)
            turns.pause()
            order.append(client)

    with turns.turn():
        for number, client in enumerate(["a", "a", "a", "b"]):
            threads.append(threading.Thread(target=ask, args=(client,)))
            threads[-1].start()
            while turns.waiting < number + 2:
                pass
    for thread in threads:
        thread.join()
    assert order.index("b") <= 2
    assert sorted(order) == ["a"] * 6 + ["b"] * 2
    assert (turns.waiting, turns._free) == (0, 1)


def test_one_account_does_not_take_all_places():
    """It has a few requests under way and some that wait; others are answered meanwhile."""
    begun, go_on = [], asyncio.Event()

    async def app(scope, receive, send):
        begun.append(scope["path"])
        if scope["path"] == "/slow":
            await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(app, sender=lambda scope: dict(scope["headers"])[b"account"].decode())

    async def ask():
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:

            def get(path, account):
                return asyncio.create_task(client.get(path, headers={"account": account}))

            slow = [get("/slow", "vera") for _ in range(64)]
            while sum(one.done() for one in slow) < 32:
                await asyncio.sleep(0.01)
            assert (await get("/quick", "anna")).status_code == 200
            under_way = begun.count("/slow")
            go_on.set()
            return under_way, [(await one).status_code for one in slow]

    under_way, statuses = asyncio.run(ask())
    assert under_way == 4
    assert (statuses.count(200), statuses.count(429)) == (32, 32)
    assert guard._shares == {}


def test_large_bodies_of_one_account_come_one_after_the_other():
    whole = []

    async def app(scope, receive, send):
        size = 0
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        whole.append(size)
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(app, sender=lambda scope: "vera")
    read = [0, 0]

    async def stream(number):
        for _ in range(8):
            read[number] += 1
            yield bytes(1 << 20)

    async def ask():
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            answers = await asyncio.gather(
                *(client.post("/v1/embeddings", content=stream(n)) for n in range(2))
            )
            return [answer.status_code for answer in answers]

    assert asyncio.run(ask()) == [200, 200]
    assert whole == [8 << 20] * 2
    assert guard._large_bodies._value == 3
