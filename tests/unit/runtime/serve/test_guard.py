"""Bodies that are late or large, the request queue, and limits that are fair to clients."""

import asyncio
import json
import threading
import time
from contextlib import ExitStack

import pytest

from upperson_console import guard
from upperson_console.guard import Guard
from upperson_console.limits import (
    CLIENT,
    BusyError,
    ConcurrencyLimit,
    RequestQueue,
    Turns,
    network_of,
)

WITHIN_S = 0.2


async def answered(app, method, path, headers=None, first=b"", more=True, client="127.0.0.1"):
    """Send a request whose body begins and, with ``more``, never ends.

    Returns status, headers and body of the response.
    """
    headers = {"host": "127.0.0.1:8480", **(headers or {})}
    scope = {
        "type": "http",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": (client, 1),
    }
    messages = [{"type": "http.request", "body": first, "more_body": more}]
    answer = []

    async def receive():
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message):
        answer.append(message)

    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in answer[0]["headers"]}
    return answer[0]["status"], headers, b"".join(part.get("body", b"") for part in answer[1:])


FORM = {"content-type": "application/x-www-form-urlencoded", "content-length": "1000"}


def test_a_body_that_never_ends_has_a_deadline(guarded):
    guarded.app.body_within_s = (30.0, WITHIN_S)
    status, headers, body = asyncio.run(answered(guarded.app, "POST", "/login", FORM, first=b"t"))
    assert (status, headers["connection"]) == (408, "close")
    assert json.loads(body)["code"] == "body_timeout"
    assert len(guarded.app._anonymous) == len(guarded.app._authenticated) == 0


@pytest.mark.parametrize("own", [True, False], ids=["his address too", "other addresses"])
def test_anonymous_bodies_that_never_end_keep_no_client_out(guarded, own):
    token = {"authorization": f"Bearer {guarded.tokens['viewer']}"}
    me = "10.0.0.1"
    form = f"token={guarded.tokens['operator']}".encode()
    login = {**FORM, "content-length": str(len(form))}
    app = guarded.app

    async def run():
        clients = [me if own else f"10.1.0.{n}" for n in range(64)]
        idle = [
            asyncio.create_task(answered(app, "POST", "/login", FORM, b"t", client=client))
            for client in clients
        ]
        while len(app._anonymous) < 64:
            await asyncio.sleep(0.01)
        during = [
            (await answered(app, *request, more=False, client=me))[0]
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

    during, gone = asyncio.run(run())
    assert during == [200, 200, 200, 200, 303]
    # The oldest, and one more for each place that was taken and released.
    assert 1 <= len(gone) <= 2
    for status, headers, body in gone:
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(body)["code"] == "body_evicted"


@pytest.mark.parametrize("known", [True, False])
def test_a_failed_request_releases_its_place(known):
    async def broken(scope, receive, send):
        raise RuntimeError("broken")

    made = Guard(broken, sender=lambda scope: "anna" if known else None)

    async def run():
        for _ in range(100):
            with pytest.raises(RuntimeError, match="broken"):
                await answered(made, "GET", "/search", more=False)

    asyncio.run(run())
    assert made.refused == len(made._authenticated) == len(made._anonymous) == 0


@pytest.mark.parametrize("length", [{"content-length": "100000"}, {}])
def test_a_large_body_needs_a_token(guarded, length):
    headers = {"content-type": "application/json", **length}
    body = json.dumps({"sentence": "x" * 100_000}).encode()

    def post():
        status, headers_of, text = asyncio.run(
            answered(guarded.app, "POST", "/api/v1/search", headers, first=body, more=False)
        )
        return status, headers_of, json.loads(text)["code"]

    status, answer, code = post()
    assert (status, answer["www-authenticate"], code) == (401, "Bearer", "login_required")
    headers["authorization"] = f"Bearer {guarded.tokens['viewer']}"
    status, _, code = post()
    assert (status, code) == (422, "json_text_too_long")


def test_a_large_body_is_read_slowly(monkeypatch):
    """Other requests run between its parts."""
    monkeypatch.setattr(guard, "_LARGE_BYTES_PER_S", 20 << 20)

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    began = time.monotonic()
    made = Guard(app, sender=lambda scope: "anna")
    asyncio.run(answered(made, "POST", "/pictures", first=bytes(4 << 20), more=False))
    assert time.monotonic() - began >= 0.2


def test_what_is_too_large_is_refused_and_discarded_for_a_while_only(reader):
    length = {"content-length": "9" * 5000}
    assert asyncio.run(answered(reader.app, "POST", "/marks", length, more=False))[0] == 413
    made = Guard(None)
    made.body_within_s = (WITHIN_S, WITHIN_S)
    length = {"content-length": str(100 << 20)}
    assert asyncio.run(answered(made, "POST", "/picture", length, first=b"x"))[0] == 413


# --- Queue and limits


def served_in_order(clients, parts=1):
    """Queue requests of clients behind one that runs; return the clients of the served parts."""
    queue, order, threads = RequestQueue(running=1, waiting=8), [], []

    def request(client):
        CLIENT.set(client.partition(" ")[0])
        with queue.slot():
            for part in range(parts):
                queue.pause() if part else None
                order.append(client)

    with queue.slot():
        for number, client in enumerate(clients):
            threads.append(threading.Thread(target=request, args=(client,)))
            threads[-1].start()
            while queue.waiting < number + 2:
                pass
    for thread in threads:
        thread.join()
    assert (queue.waiting, queue._free, queue.served) == (0, 1, len(clients) + 1)
    return order


def test_requests_run_in_their_order_and_clients_take_turns():
    own = [f"a {number}" for number in range(8)]
    assert served_in_order(own) == own
    order = served_in_order(["a", "a", "a", "b"], parts=2)
    assert order.index("b") <= 2
    assert sorted(order) == ["a"] * 6 + ["b"] * 2


def test_a_request_that_ends_as_its_turn_comes_gives_its_place_to_the_next():
    async def run():
        turns = Turns(1)
        await turns.begin("a")
        second, third = (asyncio.ensure_future(turns.begin(one)) for one in "bc")
        await asyncio.sleep(0)
        turns.end()  # Gives the place to b, which has not run yet.
        second.cancel()
        await asyncio.wait_for(third, 10)
        turns.end()
        await asyncio.wait_for(turns.begin("d"), 10)

    asyncio.run(run())


@pytest.mark.parametrize(("clients", "other"), [("aaaab", "b"), ("abbbb", "a")])
def test_clients_take_turns_however_many_requests_one_has(clients, other):
    async def run():
        turns, order = Turns(1), []
        await turns.begin("a")

        async def one(client):
            await turns.begin(client)
            order.append(client)
            turns.end()

        waiting = [asyncio.ensure_future(one(client)) for client in clients]
        await asyncio.sleep(0)
        turns.end()
        await asyncio.wait_for(asyncio.gather(*waiting), 10)
        return order

    assert asyncio.run(run()).index(other) <= 1


def test_a_queue_has_bounds_and_a_failed_request_frees_its_slot():
    queue = RequestQueue(running=2, waiting=0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), queue.slot():
            1 / 0  # noqa: B018
    with ExitStack() as stack:
        stack.enter_context(queue.slot())
        stack.enter_context(queue.slot())
        with pytest.raises(BusyError) as found, queue.slot():
            pass
    assert found.value.retry_after_s >= 1
    assert (queue.waiting, queue.served, queue.refused) == (0, 5, 1)
    assert queue._usual_s < 0.1  # Shorter requests than expected lower the estimate.


def test_in_a_full_queue_the_busiest_client_gives_way():
    queue, refused, threads = RequestQueue(running=1, waiting=4), [], []

    def request(client):
        CLIENT.set(client)
        try:
            with queue.slot():
                pass
        except BusyError:
            refused.append(client)

    def start(client):
        threads.append(threading.Thread(target=request, args=(client,)))
        threads[-1].start()

    with queue.slot():
        for number, client in enumerate(["a", "a", "a", "b"]):
            start(client)
            while queue.waiting < number + 2:
                pass
        start("c")
        while "c" not in queue._queue:
            pass
        while not refused:
            pass
        for client in ("a", "b", "c"):  # Nobody has two more than another one now.
            start(client)
        for thread in threads[-3:]:
            thread.join()
        assert queue.waiting == 5
    for thread in threads:
        thread.join()
    assert sorted(refused) == ["a", "a", "b", "c"]
    assert (queue.waiting, queue._free, queue.served, queue.refused) == (0, 1, 5, 4)


def test_the_oldest_holder_of_the_busiest_network_is_evicted():
    gone = []
    limit = ConcurrencyLimit(4)
    places = [limit.acquire(name, lambda n=n: gone.append(n)) for n, name in enumerate("abba")]
    limit.pin(places[0])
    assert limit.acquire("c", lambda: gone.append("c")) is not None
    assert gone == [1]
    limit.acquire("c", lambda: gone.append("d"))
    assert gone == [1, 2]
    limit.release(places[1])  # It was evicted already.
    limit.release(places[0])
    assert len(limit) == 3
    full, gone = ConcurrencyLimit(1), []
    place = full.acquire("a", gone.clear)
    full.pin(place)
    assert full.acquire("b", gone.clear) is None
    full.unpin(place, "a", lambda: gone.append("a"))  # A reader that stalls.
    assert full.acquire("b", gone.clear) is not None
    assert gone == ["a"]


def test_an_address_stands_for_its_network():
    for address, network in {
        "10.1.2.3": "10.1.2.3",
        "::ffff:10.1.2.3": "10.1.2.3",
        "2001:db8:1:2:3::9": "2001:db8:1:2::/64",
        "fe80::1%eth0": "fe80::/64",
        "": "",
    }.items():
        assert network_of(address) == network
