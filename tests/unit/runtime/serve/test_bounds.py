"""Bodies and pictures that would take much memory or time are refused before they do."""

import asyncio
import io
import json
import os
import tracemalloc
import zipfile
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image

from tests.helpers.command_line import run_code
from tests.helpers.console import BASE, id_of, problem
from tests.helpers.hostile_clients import KINDS, gif_of_blocks, jpeg_of_segments, png_of_chunks
from upperson_console import evidence
from upperson_console.bounds import JsonBounds, check_json
from upperson_console.guard import MOST_SMALL_BYTES, Guard
from upperson_console.problems import ProblemError
from upperson_rt import image_file


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("one text of 18 MB", 422),
        ("a million keys", 413),
        ("a million elements", 422),
        ("a nest of a million", 422),
        ("a form of 900 files", 400),
        ("a form of 2,500 fields", 400),
        ("a form with a million keys", 422),
        ("a million fields", 413),
    ],
)
def test_a_body_takes_no_more_memory_than_a_few_times_its_bytes(reader, kind, status):
    sent = KINDS[kind]()
    with traced() as peak:
        answer = reader.client(sent.method, sent.path, content=sent.body, headers=sent.headers)
    assert answer.status_code == status
    assert peak() < 4 * len(sent.body) + (8 << 20)


@contextmanager
def traced():
    """Yield what returns the peak of the memory that Python took meanwhile."""
    tracemalloc.start()
    peaks = []
    try:
        yield lambda: peaks[0]
    finally:
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


def feed(content, size, **more):
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
        b'["a\\", [[[[[[[[[[[[[[[[[[[[ "]',
        b"",
        b'{"unfinished": "',
        b'\\" no document at all',
    ],
)
def test_a_document_within_the_bounds_passes(content):
    for size in (1, 2, 3, 100, len(content) + 1):  # However it is split.
        feed(content, size)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (document(sentence="x" * 30_000), "json_text_too_long"),
        (document(sentence="\\" * 30_000), None),  # Or too many escapes, depending on the parts.
        (document(sentence='"' * 30_000), None),
        (document(**{f"k{n}": 1 for n in range(5_000)}), "json_too_large"),
        (b"[" + b"1," * 5_000 + b"1]", "json_too_large"),
        (b"[" + b" " * 300_000 + b"]", "json_too_large"),
        (b"[" * 17 + b"]" * 17, "json_too_deep"),
        (b'{"a": "' + b"x" * 30_000, "json_text_too_long"),
        (document().decode().encode("utf-16"), "json_not_utf8"),
        (json.dumps({"input": "data:" + "x" * 30_000}).encode(), "json_text_too_long"),
    ],
)
def test_a_document_beyond_the_bounds_is_refused(content, code):
    for size in (len(content), 7, 1000):
        with pytest.raises(ProblemError) as found:
            feed(content, size)
        assert found.value.status == 422
        assert code in (None, found.value.code)


def test_a_data_url_may_be_long_where_pictures_are_taken():
    for start in ("data:image/png;base64,", "data:image\\/png;base64,"):
        content = b'{"input": ["' + start.encode() + b"A" * 100_000 + b'"]}'
        feed(content, 1000, may_hold_pictures=True)
        with pytest.raises(ProblemError):
            check_json(content)


def test_only_routes_that_take_pictures_take_large_bodies(guarded):
    content, headers = b" " * (MOST_SMALL_BYTES + 1), {"content-type": "application/json"}
    for path, status in (("/api/v1/search", 413), ("/saved", 413), ("/v1/embeddings", 422)):
        answer = guarded.viewer.post(path, content=content, headers=headers)
        assert answer.status_code == status


# --- Pictures


@pytest.mark.parametrize(
    "content",
    [
        png_of_chunks(200_000),
        jpeg_of_segments(b"\xff\xe0\0\2", 200_000),
        jpeg_of_segments(b"\xff", 200_000),
        gif_of_blocks(200_000),
    ],
    ids=["PNG chunks", "JPEG segments", "JPEG fill bytes", "GIF blocks"],
)
def test_a_picture_of_many_pieces_is_refused_after_a_bounded_number_of_reads(
    reader, content, monkeypatch
):
    reads, read = [0], image_file._Metered.read

    def counted(self, size=-1):
        reads[0] += 1
        return read(self, size)

    monkeypatch.setattr(image_file._Metered, "read", counted)
    answer = reader.client.post("/api/v1/pictures", files={"picture": ("a", content)})
    assert "pieces" in problem(answer, 422)
    assert reads[0] <= image_file._MOST_READS + 1


def test_an_export_has_bounds(console, monkeypatch):
    """Of three GiB of zeros behind a crop nothing is read."""
    ids = {key: id_of(console, key) for key in ("red-0", "red-1")}
    Image.new("RGB", (8, 24)).save(console.folder / "crops" / "red0.png", "JPEG")
    os.truncate(console.folder / "crops" / "red0.png", 3 << 30)
    os.truncate(console.folder / "crops" / "red1.png", 3 << 20)
    with traced() as peak:
        answer = console.client.post("/api/v1/export", json={"ids": [*map(str, ids.values())]})
    name = f"pictures/{ids['red-1']}.png"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        rows = json.loads(archive.read("items.json"))["items"]
        assert {row["key"]: row["file"] for row in rows} == {"red-0": None, "red-1": name}
        assert archive.getinfo(name).file_size == 3 << 20
    assert peak() < 64 << 20
    monkeypatch.setattr(evidence, "_MOST_EXPORT_BYTES", 100)
    answer = console.client.post("/api/v1/export", json={"ids": [str(ids["red-1"])]})
    problem(answer, 413, "export_too_large")


def test_pictures_share_less_memory_where_it_is_limited(tmp_path):
    """In a process of its own: the limit holds for all of it."""
    for name in ("a.png", "a.jpg"):
        Image.new("L", (6000, 5000)).save(tmp_path / name)
    code = (
        "import sys; from upperson_rt import image_file as f, preprocess as p; "
        "f.limit_memory(80 << 20); print(p.load_image(sys.argv[1]).shape); "
        "print(f._BUDGET._free >> 20); p.load_image(sys.argv[2])"
    )
    done = run_code(code, tmp_path / "a.jpg", tmp_path / "a.png")
    assert done.stdout == "(1250, 1500, 3)\n80\n"
    assert "the limit is 40" in done.stderr


# --- Limits of one account


async def finish(send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def guard_before(go_on):
    """A guard before an application whose ``/slow`` waits, and the paths that began."""
    begun = []

    async def app(scope, receive, send):
        begun.append(scope["path"])
        if scope["path"] == "/slow":
            await go_on.wait()
        await finish(send)

    sender = lambda scope: dict(scope["headers"])[b"account"].decode()  # noqa: E731
    return Guard(app, sender=sender, large=()), begun


def getter(client):
    """What begins a request of an account."""
    return lambda path, account: asyncio.create_task(client.get(path, headers={"account": account}))


def test_one_account_does_not_take_all_places():
    """It has a few running requests and some that wait; other accounts are answered meanwhile."""
    go_on = asyncio.Event()
    guard, begun = guard_before(go_on)

    async def run():
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            get = getter(client)
            slow = [get("/slow", "vera") for _ in range(64)]
            while sum(one.done() for one in slow) < 32:
                await asyncio.sleep(0.01)
            assert (await get("/quick", "anna")).status_code == 200
            under_way = begun.count("/slow")
            go_on.set()
            return under_way, [(await one).status_code for one in slow]

    under_way, statuses = asyncio.run(run())
    assert under_way == 4
    assert (statuses.count(200), statuses.count(429)) == (32, 32)
    assert guard._shares == {}


def test_two_accounts_with_all_places_keep_no_third_one_out():
    """The account with most waiting requests gives way, and none that run."""
    go_on = asyncio.Event()
    guard, _ = guard_before(go_on)

    async def run():
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            get = getter(client)
            slow = [get("/slow", name) for name in ("vera", "vito") for _ in range(32)]
            while len(guard._authenticated) < 64:
                await asyncio.sleep(0.01)
            quick = [(await get("/quick", "anna")).status_code for _ in range(23)]
            go_on.set()
            return quick, [(await one).status_code for one in slow]

    quick, slow = asyncio.run(run())
    assert quick == [200] * 23
    assert 1 <= slow.count(429) <= 23
    assert slow.count(200) == 64 - slow.count(429)
    assert (len(guard._authenticated), guard._turns._free) == (0, 10)


def test_accounts_take_turns_and_a_late_body_keeps_no_place():
    """Of ten places four accounts would take all; one more account is served after one request."""
    order, run_one = [], asyncio.Semaphore(0)

    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        order.append(dict(scope["headers"])[b"account"].decode())
        await run_one.acquire()
        await finish(send)

    guard = Guard(app, sender=lambda scope: dict(scope["headers"])[b"account"].decode(), large=())

    async def never():
        yield b"x"
        await asyncio.Event().wait()

    async def run():
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:

            def send(account, **more):
                method = "POST" if more else "GET"
                request = client.request(method, "/", headers={"account": account}, **more)
                return asyncio.create_task(request)

            late = [send(f"late {n}", content=never()) for n in range(12)]
            busy = [send(name) for name in "abcd" for _ in range(6)]
            while len(order) < 10:
                await asyncio.sleep(0.01)
            busy.append(send("anna"))
            while len(guard._authenticated) < 37:
                await asyncio.sleep(0.01)
            for _ in range(len(busy)):
                run_one.release()
            statuses = [(await one).status_code for one in busy]
            for one in late:
                one.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            return statuses

    assert asyncio.run(run()) == [200] * 25
    assert order.index("anna") <= 10 + 4
    assert (len(guard._authenticated), guard._turns._free) == (0, 10)


@pytest.mark.parametrize("uploader", ["viewer", "operator"])
def test_thirty_uploads_keep_no_search_out(guarded, red_jpeg, uploader):
    """Neither those of another account nor those of the same one."""

    async def run():
        transport = httpx.ASGITransport(guarded.app)
        async with httpx.AsyncClient(transport=transport, base_url=BASE, timeout=60) as client:

            def post(path, role, **more):
                headers = {"authorization": f"Bearer {guarded.tokens[role]}"}
                return asyncio.create_task(client.post(path, headers=headers, **more))

            files = {"picture": ("a.jpg", red_jpeg)}
            uploads = [
                post("/api/v1/search/picture", uploader, files=files, data={"search": "{}"})
                for _ in range(30)
            ]
            while len(guarded.app._uploads) < 30:
                await asyncio.sleep(0)
            query = {"sentence": "red"}
            searches = [post("/api/v1/search", "operator", json=query) for _ in range(23)]
            await asyncio.gather(*searches)
            ended = sum(one.done() for one in uploads)
            found = [one.result().status_code for one in searches]
            return found, ended, [(await one).status_code for one in uploads]

    searches, ended, uploads = asyncio.run(run())
    assert searches == [200] * 23
    assert ended < 30, "the searches did not wait for all uploads"
    assert uploads == [200] * 30


def test_large_bodies_of_one_account_are_read_one_after_the_other():
    """While one is read and answered, the other has got no further than a small body."""
    read, beside = [0, 0], []

    async def app(scope, receive, send):
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message["body"])
            more = message["more_body"]
        assert size == 8 << 20
        beside.append(read[1 - int(scope["path"][1:])])
        await finish(send)

    guard = Guard(app, sender=lambda scope: "vera")

    async def stream(number):
        for _ in range(8):
            read[number] += 1
            yield bytes(1 << 20)

    async def run():
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            both = (client.post(f"/{n}", content=stream(n)) for n in range(2))
            return [answer.status_code for answer in await asyncio.gather(*both)]

    assert asyncio.run(run()) == [200, 200]
    assert beside[0] <= 2
    assert guard._large_bodies._value == 3
