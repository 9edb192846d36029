"""Bodies and pictures that would take much memory or time are refused before they do."""

import asyncio
import json
import os
import tracemalloc
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from tests.helpers.console import BASE, exported, id_of, problem, rows_of
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
        answer = reader.client.post(sent.path, content=sent.body, headers=sent.headers)
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
def test_a_document_within_the_bounds_passes_however_it_is_split(content):
    for size in (1, 2, 3, 100, len(content) + 1):
        feed(content, size)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (document(sentence="\\" * 30_000), None),  # Or too many escapes, depending on the parts.
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
        assert (found.value.status, code or found.value.code) == (422, found.value.code)


def test_only_routes_that_take_pictures_take_long_texts_and_large_bodies(guarded):
    for start in (b"data:image/png;base64,", b"data:image\\/png;base64,"):
        content = b'{"input": ["' + start + b"A" * 100_000 + b'"]}'
        feed(content, 1000, may_hold_pictures=True)
        with pytest.raises(ProblemError):
            check_json(content)
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
    ids, crops = [str(id_of(console, key)) for key in ("red-0", "red-1")], console.folder / "crops"
    Image.new("RGB", (8, 24)).save(crops / "red0.png", "JPEG")
    os.truncate(crops / "red0.png", 3 << 30)
    os.truncate(crops / "red1.png", 3 << 20)
    with traced() as peak:
        answer = console.client.post("/api/v1/export", json={"ids": ids})
    name = f"pictures/{ids[1]}.png"
    assert [row["file"] for row in rows_of(answer)] == [None, name]
    assert len(exported(answer)[name]) == 3 << 20
    assert peak() < 64 << 20
    monkeypatch.setattr(evidence, "_MOST_EXPORT_BYTES", 100)
    answer = console.client.post("/api/v1/export", json={"ids": ids[1:]})
    problem(answer, 413, "export_too_large")


# --- Limits of one account


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def account_of(scope):
    return dict(scope["headers"])[b"account"].decode()


def with_guard(run, wait):
    """What ``run`` returns of a guard before an application, which awaits ``wait`` of each scope.

    It gets the guard, the scopes of requests that began, and what begins a request of an account.
    """
    begun = []

    async def app(scope, receive, send):
        while scope["method"] == "POST" and (await receive())["more_body"]:
            pass
        begun.append(scope)
        await wait(scope)
        await Response()(scope, receive, send)

    guard = Guard(app, sender=account_of, large=())

    async def opened():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url=BASE) as client:

            def begin(account, path="/", method="GET", **more):
                request = client.request(method, path, headers={"account": account}, **more)
                return asyncio.create_task(request)

            return await run(guard, begun, begin)

    found = asyncio.run(opened())
    assert (len(guard._authenticated), guard._turns._free, guard._shares) == (0, 10, {})
    return found


async def statuses_of(requests):
    return [(await one).status_code for one in requests]


async def slowly(scope, go_on):
    if scope["path"] != "/quick":
        await go_on.wait()


def test_one_account_does_not_take_all_places():
    """It has a few running requests and some that wait; other accounts are answered meanwhile."""
    go_on = asyncio.Event()

    async def run(guard, begun, begin):
        slow = [begin("vera") for _ in range(64)]
        await until(lambda: sum(one.done() for one in slow) == 32)
        assert (await begin("anna", "/quick")).status_code == 200
        under_way = len(begun) - 1
        go_on.set()
        return under_way, await statuses_of(slow)

    under_way, statuses = with_guard(run, lambda scope: slowly(scope, go_on))
    assert under_way == 4
    assert (statuses.count(200), statuses.count(429)) == (32, 32)


def test_two_accounts_with_all_places_keep_no_third_one_out():
    """The account with most waiting requests gives way, and none that run."""
    go_on = asyncio.Event()

    async def run(guard, begun, begin):
        slow = [begin(name) for name in ("vera", "vito") for _ in range(32)]
        await until(lambda: len(guard._authenticated) == 64)
        quick = [(await begin("anna", "/quick")).status_code for _ in range(23)]
        go_on.set()
        return quick, await statuses_of(slow)

    quick, slow = with_guard(run, lambda scope: slowly(scope, go_on))
    assert quick == [200] * 23
    assert 1 <= slow.count(429) <= 23
    assert slow.count(200) == 64 - slow.count(429)


def test_accounts_take_turns_and_a_late_body_keeps_no_place():
    """Of ten places four accounts would take all; one more account is served after one request."""
    run_one = asyncio.Semaphore(0)

    async def never():
        yield b"x"
        await asyncio.Event().wait()

    async def run(guard, begun, begin):
        late = [begin(f"late {n}", method="POST", content=never()) for n in range(12)]
        busy = [begin(name) for name in "abcd" for _ in range(6)]
        await until(lambda: len(begun) == 10)
        busy.append(begin("anna"))
        await until(lambda: len(guard._authenticated) == 37)
        for _ in busy:
            run_one.release()
        statuses = await statuses_of(busy)
        for one in late:
            one.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return statuses, [account_of(scope) for scope in begun]

    statuses, order = with_guard(run, lambda scope: run_one.acquire())
    assert statuses == [200] * 25
    assert order.index("anna") <= 10 + 4


def test_large_bodies_of_one_account_are_read_one_after_the_other():
    """While one is read and answered, the other has got no further than a small body."""
    read, beside = [0, 0], []

    async def app(scope, receive, send):
        body = await Request(scope, receive).body()
        assert len(body) == 8 << 20
        beside.append(read[1 - int(scope["path"][1:])])
        await Response()(scope, receive, send)

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
