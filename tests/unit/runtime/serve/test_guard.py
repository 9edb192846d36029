"""Bodies that are late or large, and who is let in meanwhile."""

import asyncio
import json

import pytest

from upperson_console.guard import Guard
from upperson_console.turns import Crowd, network_of

WITHIN_S = 0.2


def request(method, path, headers=None, first=b"", more=True, client="127.0.0.1"):
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
        "client": (client, 1),
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
    guarded.app._body_within_s = (30.0, WITHIN_S)
    status, headers, body = asyncio.run(
        answered(guarded.app, "POST", "/login", FORM, first=b"t", more=True)
    )
    assert status == 408
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/problem+json"
    assert "within 0.2 s" in json.loads(body)["detail"]
    assert len(guarded.app._strangers) == len(guarded.app._known) == 0


@pytest.mark.parametrize("own", [True, False], ids=["his address too", "other addresses"])
def test_strangers_whose_bodies_never_end_keep_nobody_out(guarded, own):
    token = {"authorization": f"Bearer {guarded.tokens['viewer']}"}
    me = "10.0.0.1"
    form = f"token={guarded.tokens['operator']}".encode()
    login = {**FORM, "content-length": str(len(form))}

    async def crowd():
        idle = [
            asyncio.create_task(
                answered(
                    guarded.app, "POST", "/login", FORM, b"t", client=me if own else f"10.1.0.{n}"
                )
            )
            for n in range(64)
        ]
        while len(guarded.app._strangers) < 64:
            await asyncio.sleep(0.01)
        during = [
            (await answered(guarded.app, *request, more=False, client=me))[0]
            for request in (
                ("GET", "/api/v1/health"),
                ("GET", "/api/v1/ready"),
                ("GET", "/api/v1/cameras", token),
                ("GET", "/login"),
                ("POST", "/login", login, form),
            )
        ]
        gone, left = await asyncio.wait(idle, return_when=asyncio.FIRST_COMPLETED)
        for one in left:
            one.cancel()
        return during, [one.result() for one in gone]

    during, gone = asyncio.run(crowd())
    assert during == [200, 200, 200, 200, 303]
    # Whoever came first, and one more for each place that somebody took and left.
    assert 1 <= len(gone) <= 2
    for status, headers, body in gone:
        assert (status, headers["connection"]) == (408, "close")
        assert "others came before" in json.loads(body)["detail"]


@pytest.mark.parametrize("known", [True, False])
def test_what_fails_gives_its_place_back(known):
    async def broken(scope, receive, send):
        raise RuntimeError("broken")

    guard = Guard(broken, sender=lambda scope: "anna" if known else None)

    async def ask_often():
        for _ in range(100):
            with pytest.raises(RuntimeError, match="broken"):
                await answered(guard, "GET", "/search", more=False)

    asyncio.run(ask_often())
    assert guard.refused == len(guard._known) == len(guard._strangers) == 0


def test_whoever_waits_longest_in_the_busiest_network_gives_way():
    gone = []
    crowd = Crowd(4)
    places = [crowd.enter(network, lambda n=n: gone.append(n)) for n, network in enumerate("abba")]
    crowd.settle(places[0])
    assert crowd.enter("c", lambda: gone.append("c")) is not None
    assert gone == [1]
    crowd.enter("c", lambda: gone.append("d"))
    assert gone == [1, 2]
    crowd.leave(places[1])  # It went already.
    crowd.leave(places[0])
    assert len(crowd) == 3
    full = Crowd(1)
    full.settle(full.enter("a", gone.clear))
    assert full.enter("b", gone.clear) is None


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_address_stands_for_its_network(address, network):
    assert network_of(address) == network


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
    guard = Guard(None, body_within_s=(WITHIN_S, WITHIN_S))
    headers = {"content-length": str(100 << 20)}
    status, _, _ = asyncio.run(answered(guard, "POST", "/picture", headers, first=b"x"))
    assert status == 413
