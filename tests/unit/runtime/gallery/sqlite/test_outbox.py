"""The outbox: written with the rows or not at all, and an account for each destination."""

import pytest

from tests.helpers.gallery_places import DIM, some_vectors, sql
from tests.helpers.refused import refused
from upperson_alerts.outbox import Failure, Message
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Item
from upperson_rt.gallery.protocol import Gallery as AnyGallery


def message(number, **more):
    return Message(key=f"key-{number}", topic="red", time=1000.0 + number, **more)


def test_messages_are_committed_with_the_rows_once(gallery):
    seen = []

    def write(outbox, ids, replaced):
        seen.append((dict(ids), list(replaced)))
        outbox.put(message(1, body={"picture": ids["a"]}))

    for _ in range(2):
        gallery.add([Item(key="a")], some_vectors(1), within=write)
    assert seen == [({"a": 1}, []), ({"a": 1}, ["a"])]
    with gallery.outbox() as outbox:
        (found,) = outbox.messages()
        assert (found.seq, found.body, found.state) == (1, {"picture": 1}, "ready")

    def fail(outbox, ids, replaced):
        outbox.put(message(2))
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        gallery.add([Item(key="b")], some_vectors(1), within=fail)
    with gallery.outbox() as outbox:
        assert outbox.count() == 1
    assert gallery.count() == 1
    assert gallery.verify() == []


def test_documents(gallery):
    with gallery.outbox() as outbox:  # Of a gallery that has none.
        assert outbox.messages() == outbox.dead() == []
        assert (outbox.count(), outbox.document("alert"), outbox.documents("")) == (0, None, {})
    assert sql(gallery.path, "SELECT 1 FROM sqlite_master WHERE name LIKE 'outbox%'") == []
    with gallery.outbox(write=True) as outbox:
        outbox.write("alert/1", {"a": [1]})
        outbox.write("alert/2", 5)
        outbox.write("alert/2", None)
    with gallery.outbox() as outbox:
        assert outbox.documents("alert/") == {"1": {"a": [1]}}
    sql(gallery.path, "UPDATE outbox_documents SET value = '{'")
    with gallery.outbox() as outbox, refused("outbox_damaged", IntegrityError):
        outbox.document("alert/1")


def due(gallery, destination="a", now=0.0, most=100):
    with gallery.outbox() as outbox:
        found = outbox.due(destination, now, 60.0, most)
    return [(one.seq, attempts) for one, attempts in found]


def settle(gallery, **outcomes):
    with gallery.outbox(write=True) as outbox:
        outbox.settle("a", {int(seq[1:]): outcome for seq, outcome in outcomes.items()})


def test_a_destination_gets_each_message_until_it_accepts(gallery):
    with gallery.outbox(write=True) as outbox:
        for number, state in enumerate(("ready", "ready", "ready", "ready", "review")):
            outbox.put(message(number, state=state))
        outbox.begin("a")
        outbox.begin("later")
    assert due(gallery) == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert due(gallery, most=2) == [(1, 0), (2, 0)]
    assert due(gallery, "later") == []
    settle(gallery, _2=None, _1=Failure(attempts=1, due=50.0, error="refused"))
    assert due(gallery) == [(3, 0), (4, 0)]
    assert due(gallery, now=50.0) == [(1, 1), (3, 0), (4, 0)]
    assert due(gallery, now=-1e9) == [(1, 1), (3, 0), (4, 0)]  # The clock has jumped back.
    settle(gallery, _3=None, _4=Failure(attempts=9, due=0.0, error="no", is_dead=True))
    assert due(gallery) == []
    with gallery.outbox() as outbox:
        assert outbox.waiting() == {"a": 1, "later": 0}
        ((destination, one, failure),) = outbox.dead()
    assert (destination, one.seq, failure.error) == ("a", 4, "no")
    with gallery.outbox(write=True) as outbox:
        assert outbox.replay("key-0") == 0
        assert outbox.replay("key-3") == 1
        outbox.put(message(5))
    assert due(gallery, "later") == [(6, 0)]
    assert due(gallery, now=60.0) == [(1, 1), (4, 0), (6, 0)]
    settle(gallery, _1=None, _4=None, _6=None)
    assert due(gallery, now=1e9) == []
    with gallery.outbox(write=True) as outbox:
        outbox.end("later")
        assert outbox.waiting() == {"a": 0}
        assert outbox.remove(topic="red") == 6
        assert outbox.messages() == []


@pytest.mark.parametrize("kind", ["review", "failed", "dead"])
def test_a_destination_asks_without_reading_what_is_not_due(gallery, kind):
    counts = {}
    for count in (100, 2000):
        with gallery.outbox(write=True) as outbox:
            outbox.begin("a")
            for number in range(outbox.last_seq, count):
                outbox.put(message(number, state="review" if kind == "review" else "ready"))
            if kind != "review":
                failure = Failure(attempts=1, due=50.0, error="no", is_dead=kind == "dead")
                outbox.settle("a", dict.fromkeys(range(1, count + 1), failure))
        with gallery.outbox() as outbox:
            steps = []
            outbox._connection.set_progress_handler(lambda steps=steps: steps.append(1), 10)
            assert outbox.due("a", 0.0, 60.0, 50) == []
            outbox._connection.set_progress_handler(None, 0)
        counts[count] = len(steps)
    assert counts[2000] <= counts[100] + 10


def test_messages_are_filtered(gallery):
    with gallery.outbox(write=True) as outbox:
        for number in range(4):
            outbox.put(message(number, state="review" if number % 2 else "ready"))
        assert outbox.label("key-1", "dismissed")
        assert not outbox.label("key-9", "dismissed")
    with gallery.outbox() as outbox:
        assert [one.key for one in outbox.messages(2)] == ["key-3", "key-2"]
        assert [one.key for one in outbox.messages(label="dismissed", topic="red")] == ["key-1"]
        assert outbox.count(state="review", since=1001.0, until=1003.0) == 1
        assert outbox.count(topic="blue") == 0


def test_other_stores_refuse(gallery):
    class Other(AnyGallery):
        location, embed_dim = "other://", DIM

        def __init__(self):
            pass

    Other.__abstractmethods__ = frozenset()
    for call in (
        Other().outbox,
        lambda: Other().add([Item(key="a")], some_vectors(1), None, print),
    ):
        with refused("outbox_unsupported", InputError):
            call()
