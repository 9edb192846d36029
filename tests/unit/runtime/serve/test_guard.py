"""Bodies that are late or large, the request queue, and limits that are fair to clients."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from tests.helpers.console import BASE, problem
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
FORM = {"content-type": "application/x-www-form-urlencoded", "content-length": "1000"}


async def answered(app, method, path, headers=None, first=b"", more=True, client="127.0.0.1"):
    """The response to a request whose body begins and, with ``more``, never ends."""

    async def body():
        yield first
        while more:
            await asyncio.Event().wait()

    transport = httpx.ASGITransport(app, client=(client, 1))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as opened:
        content = body() if more or first else None
        return await opened.request(method, path, headers=headers, content=content)


def given_up(answer, code):
    problem(answer, 408, code)
    return answer.headers["connection"] == "close"


def test_a_body_that_never_ends_has_a_deadline(guarded):
    guarded.app.body_within_s = (30.0, WITHIN_S)
    answer = asyncio.run(answered(guarded.app, "POST", "/login", FORM, first=b"t"))
    assert given_up(answer, "body_timeout")
    assert len(guarded.app._anonymous) == len(guarded.app._authenticated) == 0


@pytest.mark.parametrize("own", [True, False], ids=["his address too", "other addresses"])
def test_anonymous_bodies_that_never_end_keep_no_client_out(guarded, own):
    token = {"authorization": f"Bearer {guarded.tokens['viewer']}"}
    form = f"token={guarded.tokens['operator']}".encode()
    login = {**FORM, "content-length": str(len(form))}
    app, me = guarded.app, "10.0.0.1"

    async def run():
        clients = [me if own else f"10.1.0.{n}" for n in range(64)]
        idle = [
            asyncio.create_task(answered(app, "POST", "/login", FORM, b"t", client=client))
            for client in clients
        ]
        while len(app._anonymous) < 64:
            await asyncio.sleep(0.01)
        during = [
            (await answered(app, *request, more=False, client=me)).status_code
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
        await asyncio.gather(*left, return_exceptions=True)
        return during, [one.result() for one in gone]

    during, gone = asyncio.run(run())
    assert during == [200, 200, 200, 200, 303]
    # The oldest, and one more for each place that was taken and released.
    assert 1 <= len(gone) <= 2
    assert all(given_up(answer, "body_evicted") for answer in gone)


@pytest.mark.parametrize("known", [True, False])
def test_a_failed_request_releases_its_place(known):
    async def broken(scope, receive, send):
        raise RuntimeError("broken")

    made = Guard(broken, sender=lambda scope: "anna" if known else None)
    for _ in range(100):
        with pytest.raises(RuntimeError, match="broken"):
            asyncio.run(answered(made, "GET", "/search", more=False))
    assert made.refused == len(made._authenticated) == len(made._anonymous) == 0


@pytest.mark.parametrize("length", [{"content-length": "100017"}, {}])
def test_a_large_body_needs_a_token(guarded, length):
    headers = {"content-type": "application/json", **length}
    body = json.dumps({"sentence": "x" * 100_000}).encode()

    def post(**more):
        sent = answered(guarded.app, "POST", "/api/v1/search", headers | more, body, more=False)
        return asyncio.run(sent)

    answer = post()
    problem(answer, 401, "login_required")
    assert answer.headers["www-authenticate"] == "Bearer"
    token = f"Bearer {guarded.tokens['viewer']}"
    problem(post(authorization=token), 422, "json_text_too_long")


def test_a_large_body_is_read_slowly(monkeypatch):
    """Other requests run between its parts."""
    monkeypatch.setattr(guard, "_LARGE_BYTES_PER_S", 20 << 20)

    async def app(scope, receive, send):
        await Request(scope, receive).body()
        await Response()(scope, receive, send)

    began = time.monotonic()
    made = Guard(app, sender=lambda scope: "anna")
    asyncio.run(answered(made, "POST", "/pictures", first=bytes(4 << 20), more=False))
    assert time.monotonic() - began >= 0.2


def test_what_is_too_large_is_refused_and_discarded_for_a_while_only(reader):
    made = Guard(None)
    made.body_within_s = (WITHIN_S, WITHIN_S)
    for app, length, more in ((reader.app, "9" * 5000, False), (made, str(100 << 20), True)):
        sent = answered(app, "POST", "/marks", {"content-length": length}, b"x", more)
        problem(asyncio.run(sent), 413, "body_too_large")


# --- Queue and limits


def request(queue, client, served, parts=1):
    CLIENT.set(client.partition(" ")[0])
    with queue.slot():
        for part in range(parts):
            queue.pause() if part else None
            served.append(client)


def queued(pool, queue, clients, *more):
    """Queue a request of each client behind one that runs."""
    requests = []
    for number, client in enumerate(clients, 2):
        requests.append(pool.submit(request, queue, client, *more))
        while queue.waiting < number:
            pass
    return requests


def served_in_order(clients, parts=1):
    """Queue requests of clients behind one that runs; return the clients of the served parts."""
    queue, order = RequestQueue(running=1, waiting=8), []
    with ThreadPoolExecutor(8) as pool, queue.slot():
        queued(pool, queue, clients, order, parts)
    assert (queue.waiting, queue._free, queue.served) == (0, 1, len(clients) + 1)
    return order


def test_requests_run_in_their_order_and_clients_take_turns():
    own = [f"a {number}" for number in range(8)]
    assert served_in_order(own) == own
    order = served_in_order(["a", "a", "a", "b"], parts=2)
    assert order.index("b") <= 2
    assert sorted(order) == ["a"] * 6 + ["b"] * 2
    queue, order, client = RequestQueue(), [], CLIENT.set("a")
    with ThreadPoolExecutor(2) as pool, queue.slot():
        queued(pool, queue, "ab", order)
        queue.pause()  # Of a long request of a.
        assert order == ["b", "a"]
    CLIENT.reset(client)


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
    queue, served = RequestQueue(running=1, waiting=4), []
    with ThreadPoolExecutor(8) as pool, queue.slot():
        early = queued(pool, queue, ["a", "a", "a", "b"], served)
        late = pool.submit(request, queue, "c", served)
        assert isinstance(early[2].exception(30), BusyError)  # The newest.
        while "c" not in queue._queue:
            pass
        for client in "abc":  # Nobody has two more than another one now.
            refused = pool.submit(request, queue, client, served)
            assert isinstance(refused.exception(30), BusyError)
        assert queue.waiting == 5
        assert not late.done()
    assert sorted(served) == ["a", "a", "b", "c"]
    assert (queue.waiting, queue._free, queue.served, queue.refused) == (0, 1, 5, 4)


def test_the_oldest_holder_of_the_busiest_network_is_evicted():
    gone = []
    limit = ConcurrencyLimit(4)
    places = [limit.acquire(name, lambda n=n: gone.append(n)) for n, name in enumerate("abba")]
    limit.pin(places[0])
    for evicted in ([1], [1, 2]):
        assert limit.acquire("c", lambda: gone.append("c")) is not None
        assert gone == evicted
    limit.release(places[1])  # It was evicted already.
    limit.release(places[0])
    limit.unpin(places[0], "a", gone.clear)  # It has ended meanwhile.
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
