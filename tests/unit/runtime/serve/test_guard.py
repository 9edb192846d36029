"""Bodies that are late or large, and who is let in meanwhile."""

import asyncio
import json

import pytest

from upperson_rt.serve.guard import Guard

WITHIN_S = 0.2


def request(method, path, headers=None, first=b"", more=True):
    """A request whose body begins and, if there is more, never ends; and what is answered."""
    headers = {"host": "127.0.0.1:8480", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8480),
    }
    messages = [{"type": "http.request", "body": first, "more_body": more}]
    answer = []

    async def receive():
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message):
        answer.append(message)

    return scope, receive, send, answer


async def answered(app, *args, **more):
    """Send a request; return its status, headers and body."""
    scope, receive, send, answer = request(*args, **more)
    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in answer[0]["headers"]}
    return answer[0]["status"], headers, b"".join(part.get("body", b"") for part in answer[1:])


FORM = {"content-type": "application/x-www-form-urlencoded", "content-length": "1000"}


def test_a_body_that_never_ends_is_not_waited_for(guarded):
    guarded.app._body_within_s = WITHIN_S
    status, headers, body = asyncio.run(
        answered(guarded.app, "POST", "/login", FORM, first=b"t", more=True)
    )
    assert status == 408
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/problem+json"
    assert "within 0.2 s" in json.loads(body)["detail"]
    assert guarded.app._requests == {True: 0, False: 0}


def test_strangers_whose_bodies_never_end_keep_nobody_out_for_long(guarded):
    guarded.app._body_within_s = 2.0
    token = {"authorization": f"Bearer {guarded.tokens['viewer']}"}

    async def crowd():
        idle = [
            asyncio.create_task(answered(guarded.app, "POST", "/login", FORM, first=b"t"))
            for _ in range(64)
        ]
        while guarded.app._requests[False] < 64:
            await asyncio.sleep(0.01)
        during = [
            (await answered(guarded.app, "GET", path, headers, more=False))[0]
            for path, headers in (
                ("/api/v1/health", {}),
                ("/api/v1/ready", {}),
                ("/api/v1/cameras", token),
                ("/login", {}),
            )
        ]
        told = [(await one)[0] for one in idle]
        after = (await answered(guarded.app, "GET", "/login", more=False))[0]
        return during, told, after

    during, told, after = asyncio.run(crowd())
    assert during == [200, 200, 200, 429]
    assert told == [408] * 64
    assert after == 200


@pytest.mark.parametrize("length", [{"content-length": "100000"}, {}])
def test_a_stranger_sends_no_large_body(guarded, length):
    headers = {"content-type": "application/json", **length}
    body = json.dumps({"sentence": "x" * 100_000}).encode()
    sent = ("POST", "/api/v1/search")
    status, answer, text = asyncio.run(
        answered(guarded.app, *sent, headers, first=body, more=False)
    )
    assert status == 401
    assert answer["www-authenticate"] == "Bearer"
    assert "more than 64 KiB" in json.loads(text)["detail"]
    headers["authorization"] = f"Bearer {guarded.tokens['viewer']}"
    status, _, text = asyncio.run(answered(guarded.app, *sent, headers, first=body, more=False))
    assert status == 422
    assert "sentence" in json.loads(text)["detail"]


def test_a_length_of_many_digits_is_too_large(reader):
    status, _, _ = asyncio.run(
        answered(reader.app, "POST", "/marks", {"content-length": "9" * 5000}, more=False)
    )
    assert status == 413


def test_what_is_too_large_is_thrown_away_for_a_while_only():
    guard = Guard(None, body_within_s=WITHIN_S)
    headers = {"content-length": str(100 << 20)}
    status, _, _ = asyncio.run(answered(guard, "POST", "/picture", headers, first=b"x"))
    assert status == 413
