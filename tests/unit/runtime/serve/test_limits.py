"""Request queue and concurrency limit: bounded, in the order of arrival, fair to clients."""

import threading
from contextlib import ExitStack

import pytest

from upperson_console.limits import CLIENT, BusyError, ConcurrencyLimit, RequestQueue, network_of


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
    full = ConcurrencyLimit(1)
    full.pin(full.acquire("a", gone.clear))
    assert full.acquire("b", gone.clear) is None


def test_an_address_stands_for_its_network():
    for address, network in {
        "10.1.2.3": "10.1.2.3",
        "::ffff:10.1.2.3": "10.1.2.3",
        "2001:db8:1:2:3::9": "2001:db8:1:2::/64",
        "fe80::1%eth0": "fe80::/64",
        "": "",
    }.items():
        assert network_of(address) == network
