"""Messages reach a destination that fails, refuses, hangs and comes back, with one id each."""

import base64
import itertools
import json
import ssl
import sys
import threading
import time
import tracemalloc
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.alert_servers import Broker, Subscriber, Webhook, free_port, wait_for
from tests.helpers.certificate import written
from tests.helpers.refused import refused
from tests.helpers.small_servers import served
from tests.helpers.toy_bundle import draw_person
from upperson_alerts import delivery as module
from upperson_alerts.alerts import add_alert, remove_alert
from upperson_alerts.delivery import Deliverer, DeliveryOptions, read_secret
from upperson_alerts.outbox import Message, Outbox
from upperson_alerts.webhook import read_key, signed_headers
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.gallery import Item

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_DELAY_S", 0.001)
    monkeypatch.delenv("UPPERSON_ALERT_SECRET", raising=False)


@pytest.fixture
def webhook():
    server = Webhook()
    with served(server):
        yield server
        server.goes_on.set()


@pytest.fixture
def raised(gallery):
    """Writes messages into the outbox; returns their ids."""
    numbers = itertools.count()

    def write(count, picture=None):
        keys = [f"id-{number}" for number in itertools.islice(numbers, count)]
        with gallery.outbox(write=True) as outbox:
            for key in keys:
                body = {"type": "alert.raised", "data": {"id": key, "picture": picture}}
                outbox.put(Message(key=key, topic="red", time=time.time(), body=body))
        return keys

    return write


def address_of(server):
    return f"http://127.0.0.1:{server.server_address[1]}/hook?token=abc"


def open_(gallery, address, attempts=40, snapshot=False, **options):
    settings = DeliveryOptions(**options)
    return Deliverer(gallery, address, settings, attempts=attempts, snapshot=snapshot)


def deliver(gallery, address, steps=None, **options):
    """Deliver until nothing waits, or so many batches; return the report."""
    with open_(gallery, address, **options) as deliverer:
        if steps is None:
            wait_for(lambda: not (deliverer.step() or waiting(gallery)))
        for _ in range(steps or 0):
            deliverer.step()
    return deliverer.report


def assert_away(deliverer):
    assert not deliverer.step()
    assert not deliverer.report.is_reachable


def waiting(gallery):
    with gallery.outbox() as outbox:
        return sum(outbox.waiting().values())


def ids_of(server):
    return [headers["webhook-id"] for headers, _ in server.posts]


def test_a_webhook_gets_signed_messages_in_order_once(gallery, raised, webhook):
    keys = raised(60)
    report = deliver(gallery, address_of(webhook), secret=SECRET)
    assert ids_of(webhook) == keys
    assert (report.delivered, report.refused) == (60, 0)
    assert set(webhook.paths) == {"/hook?token=abc"}
    headers, body = webhook.posts[0]
    assert json.loads(body)["data"]["id"] == keys[0]
    sent = int(headers["webhook-timestamp"])
    assert abs(time.time() - sent) < 60
    expected = signed_headers(headers["webhook-id"], body, sent, read_key(SECRET))
    assert headers["webhook-signature"] == expected["webhook-signature"]
    assert deliver(gallery, address_of(webhook)).delivered == 0


def test_the_published_example_of_standard_webhooks():
    body = b'{"test": 2432232314}'
    headers = signed_headers("msg_p5jXN8AQM9LWM0D4loKWxJek", body, 1614265330, read_key(SECRET))
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert "webhook-signature" not in signed_headers("a", b"", 0, None)


def test_what_is_refused_comes_again_and_dies_at_last(gallery, raised, webhook, caplog):
    keys = raised(3)
    webhook.answers = [500, 204, 429, 302, 204]
    report = deliver(gallery, address_of(webhook), secret=SECRET)
    assert (report.delivered, report.refused, report.dead) == (3, 3, 0)
    assert (len(ids_of(webhook)), set(ids_of(webhook))) == (6, set(keys))
    (bad,) = raised(1)
    webhook.answers = [410] * 4
    report = deliver(gallery, address_of(webhook), attempts=4)
    assert (report.delivered, report.refused, report.dead) == (0, 4, 1)
    with gallery.outbox(write=True) as outbox:
        ((name, message, failure),) = outbox.dead()
        assert (message.key, failure.error, failure.attempts) == (bad, "it answers 410", 4)
        assert outbox.replay() == 1
    assert deliver(gallery, address_of(webhook)).delivered == 1
    assert ids_of(webhook).count(bad) == 5
    everything = caplog.text + name + gallery.path.joinpath("gallery.sqlite").read_bytes().hex()
    for secret in (SECRET, SECRET.removeprefix("whsec_"), "token=abc"):
        assert secret not in everything
        assert secret.encode().hex() not in everything


def test_no_redirect_is_followed_and_a_wait_that_is_asked_for_is_kept(gallery, raised, webhook):
    raised(1)
    other = Webhook()
    with served(other):
        webhook.answers = [(307, {"Location": address_of(other), "Retry-After": "3000"})]
        assert deliver(gallery, address_of(webhook), steps=1).refused == 1
    assert other.posts == []
    with gallery.outbox() as outbox:
        name = module.destination_name(address_of(webhook))
        assert outbox.due(name, time.time() + 2000, 3600, 9) == []
        assert len(outbox.due(name, time.time() + 3100, 3600, 9)) == 1


def test_an_answer_that_does_not_come_blocks_nothing_for_long(gallery, raised, webhook, caplog):
    (key,) = raised(1)
    webhook.is_silent.set()
    report = deliver(gallery, address_of(webhook), steps=1, timeout_s=1.0)
    assert (report.delivered, report.refused) == (0, 1)
    assert "no answer within 1 s" in caplog.text
    webhook.is_silent.clear()
    webhook.goes_on.set()
    assert deliver(gallery, address_of(webhook)).delivered == 1
    assert set(ids_of(webhook)) == {key}


@pytest.mark.parametrize("content", [b"x", b""])
def test_a_status_accepts_whatever_becomes_of_the_text_after_it(gallery, raised, webhook, content):
    raised(1)
    webhook.unfinished = content  # Of an answer of nine bytes, which is left open.
    report = deliver(gallery, address_of(webhook), steps=1, timeout_s=0.5)
    assert (report.delivered, report.refused, len(webhook.posts)) == (1, 0, 1)


def test_nothing_is_sent_again_while_the_gallery_cannot_be_written(
    gallery, raised, webhook, monkeypatch
):
    keys = raised(3)
    webhook.answers = [204, 500, 204]
    with open_(gallery, address_of(webhook)) as deliverer:
        with monkeypatch.context() as full:

            def settle(*_):
                raise InputError("full", code="disk_full")

            full.setattr(Outbox, "settle", settle)
            for _ in range(4):
                with refused("disk_full", InputError):
                    deliverer.step()
        assert ids_of(webhook) == keys
        wait_for(lambda: not (deliverer.step() or waiting(gallery)))
    assert ids_of(webhook) == [*keys, keys[1]]
    assert (deliverer.report.delivered, deliverer.report.refused) == (3, 1)


@pytest.mark.parametrize("kind", ["http", "command"])
def test_what_is_removed_is_not_sent_from_what_was_read_before(
    gallery, raised, webhook, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(module, "_SENDING_S", 0.0)
    (key, *_) = raised(5)
    script, seen = tmp_path / "notify.sh", tmp_path / "seen"
    script.write_text(f'#!/bin/sh\necho "$UPPERSON_MESSAGE_ID" >> {seen}\n')
    script.chmod(0o755)
    address = address_of(webhook) if kind == "http" else f"command:{script}"
    with open_(gallery, address) as deliverer:
        deliverer.step()
        with gallery.outbox(write=True) as outbox:
            outbox.remove(topic="red")
        assert not deliverer.step()
    assert (ids_of(webhook) if kind == "http" else seen.read_text().split()) == [key]


def test_a_server_that_is_away_costs_no_attempts(gallery, raised):
    keys, port = raised(60), free_port()
    with open_(gallery, f"http://127.0.0.1:{port}/", attempts=2) as deliverer:
        for _ in range(5):
            assert not deliverer.step()
        with refused("destination_unreachable", BackendError):
            deliverer.run_once()
        server = Webhook(port)
        with served(server):
            deliverer.run_once()
        assert ids_of(server) == keys
        assert (deliverer.report.refused, deliverer.report.delivered) == (0, 60)


def test_it_runs_until_it_is_stopped_and_hands_over_at_once(gallery, raised, webhook):
    stop = threading.Event()
    with open_(gallery, address_of(webhook)) as deliverer:
        thread = threading.Thread(target=deliverer.run, args=(stop.is_set, 0.01))
        thread.start()
        for count in (1, 2, 3):
            raised(1)
            wait_for(lambda count=count: len(webhook.posts) == count)
        with refused("delivery_running", InputError):
            open_(gallery, address_of(webhook))
        stop.set()
        thread.join()


def test_certificates_are_verified(gallery, raised, tmp_path):
    raised(1)
    certificate, key = written(tmp_path)
    server = Webhook()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None
    address = address_of(server).replace("http", "https")
    with served(server):
        with open_(gallery, address) as deliverer:
            assert_away(deliverer)
        assert deliver(gallery, address, ca_file=certificate).delivered == 1


def test_a_command_and_stdout(gallery, raised, tmp_path, capsys):
    (key,) = raised(1)
    script = tmp_path / "notify.sh"
    script.write_text('#!/bin/sh\ncat > "$1.$UPPERSON_MESSAGE_ID"\n')
    script.chmod(0o755)
    assert deliver(gallery, f"command:{script} '{tmp_path}/a b'").delivered == 1
    assert json.loads((tmp_path / f"a b.{key}").read_text())["data"]["id"] == key
    script.write_text("#!/bin/sh\necho no >&2\nexit 3\n")
    raised(1)
    assert deliver(gallery, f"command:{script} '{tmp_path}/a b'", attempts=1).dead == 1
    with gallery.outbox() as outbox:
        assert outbox.dead()[0][2].error == "exit code 3 no"
    with open_(gallery, "stdout") as deliverer:
        (key,) = raised(1)
        deliverer.run_once()
    assert json.loads(capsys.readouterr().out)["data"]["id"] == key


@pytest.mark.parametrize(
    ("script", "accepted"),
    [
        ("sleep 20 & echo $! >&2", True), ("exec <&-", True),
        ("head -c 300000 /dev/zero >&2", True),
        ("exec cat /dev/zero >&2", False), ("sleep 300 & echo $! > pid; wait", False),
    ],
)  # fmt: skip
def test_commands_that_leave_children_or_write_much(
    gallery, raised, tmp_path, monkeypatch, script, accepted
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "notify.sh"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    raised(1)
    timeout_s = 10.0 if accepted else 0.5
    began = time.monotonic()
    tracemalloc.start()
    try:
        report = deliver(gallery, f"command:{file}", steps=1, timeout_s=timeout_s)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (report.delivered, report.refused) == (int(accepted), int(not accepted))
    assert not accepted or time.monotonic() - began < timeout_s
    assert peak_bytes < 20_000_000
    if (tmp_path / "pid").exists():
        child = Path("/proc", (tmp_path / "pid").read_text().strip(), "cmdline")
        wait_for(lambda: not child.exists() or not child.read_bytes(), 10)


def test_a_snapshot_only_where_asked_for(gallery, raised, tmp_path, encoder):
    picture = draw_person(tmp_path / "a.png", "red")
    items = [Item(key="a", source=str(picture), box=(8, 8, 40, 100)), Item(key="b", source="gone")]
    gallery.add(items, encoder.encode_images([str(picture)] * 2))
    server = Webhook()
    with served(server):
        raised(1, picture=1), raised(1, picture=2), raised(1, picture=99)
        deliver(gallery, address_of(server), snapshot=True)
        raised(1, picture=1)
        deliver(gallery, address_of(server))
    bodies = [json.loads(body)["data"] for _, body in server.posts]
    assert base64.b64decode(bodies[0]["snapshot"]).startswith(b"\xff\xd8\xff")
    assert [one["snapshot"] for one in bodies[1:3]] == [None, None]
    assert "snapshot" not in bodies[3]


def test_other_addresses_are_refused_and_a_missing_extra_is_named(gallery, monkeypatch):
    pytest.importorskip("paho.mqtt.client")
    for address, code in (
        ("ftp://host/", "delivery_unknown"), ("mqtt://u:p@host/", "login_in_address"),
        ("http://host:x/", "address_malformed"), ("http://ho st/", "address_malformed"),
        ("mqtt:///topic", "address_malformed"), ("mqtt://host/a/%23", "address_malformed"),
        ("mqtt://host/a%0Ab", "address_malformed"), ("mqtt://host/a%00b", "address_malformed"),
        (f"mqtt://host/{'x' * 66_000}", "address_malformed"), ("mqtt://[::1", "address_malformed"),
        ("http://[x]/", "address_malformed"), ("mqtt://\udcff/", "address_malformed"),
        ("stdout:x", "address_malformed"), ("command:", "command_not_found"),
        ("command:'", "command_malformed"), ("command:/no/such/program", "command_not_found"),
    ):  # fmt: skip
        with refused(code, (UsageError, InputError)) as caught:
            open_(gallery, address)
        assert "u:p" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "paho.mqtt.client", None)
    with refused("extra_missing", BackendError, extra="alerts"):
        open_(gallery, "mqtt://host")


def test_the_name_of_a_destination_has_no_secrets():
    for address, start in (
        ("command:curl -H 'Authorization: hidden' https://host/hidden", "command#"),
        ("https://host:8443/hidden?token=hidden", "https://host:8443#"),
    ):
        name = module.destination_name(address)
        assert name.startswith(start)
        assert "hidden" not in name


def test_secrets_come_from_a_private_file_or_the_environment(tmp_path, monkeypatch):
    assert read_secret(None) is None
    monkeypatch.setenv("UPPERSON_ALERT_SECRET", "abc")
    assert read_secret(None) == "abc"
    file = tmp_path / "secret"
    file.write_text("user:password\n")
    file.chmod(0o644)
    with pytest.raises(InputError, match="others may read it"):
        read_secret(file)
    file.chmod(0o600)
    assert read_secret(file) == "user:password"
    file.write_text("\n")
    with refused("secret_empty", InputError):
        read_secret(file)
    with refused("secret_malformed", InputError):
        read_key("whsec_?")


# --- A real broker


@pytest.fixture
def brokers(tmp_path):
    """Starts brokers and subscribers, and ends them."""
    pytest.importorskip("paho.mqtt.client")
    with ExitStack() as stack:

        def start(settings="allow_anonymous true\n", **options):
            broker = Broker(tmp_path, settings).start()
            stack.callback(broker.stop)
            subscriber = Subscriber(broker.port, **options)
            stack.callback(subscriber.close)
            return broker, subscriber

        yield start


def received_by(subscriber):
    """Ids, each once: the broker, too, gives its subscribers a message at least once."""
    ids = [json.loads(payload)["data"]["id"] for _, payload, _ in [*subscriber.messages]]
    return [*dict.fromkeys(ids)]


def test_a_broker_that_goes_and_comes_back(gallery, raised, brokers):
    broker, subscriber = brokers()
    address = f"mqtt://127.0.0.1:{broker.port}/house/alerts"
    keys = raised(120)
    with open_(gallery, address) as deliverer:
        deliverer.run_once()
        assert deliverer.report.delivered == 120
        wait_for(lambda: len(subscriber.messages) == 120)
        topics = {topic for topic, _, _ in subscriber.messages}
        assert topics == {"house/alerts/red"}
        first = json.loads(subscriber.messages[0][1])
        assert (first["event_type"], first["data"]["id"]) == ("alert.raised", keys[0])
        broker.stop()
        wait_for(lambda: not subscriber.is_subscribed)
        more = raised(3)
        assert_away(deliverer)
        broker.start()
        wait_for(lambda: subscriber.is_subscribed)
        deliverer.run_once()
        assert deliverer.report.delivered == 123
        wait_for(lambda: len(received_by(subscriber)) == 123)
    assert received_by(subscriber) == [*keys, *more]


def test_home_assistant_learns_of_alerts_and_of_their_end(world, brokers):
    gallery = world.gallery
    world.add([0.1] * 10)
    broker, subscriber = brokers()
    report, _ = add_alert(gallery, world.encoder, "man in red coat", rate=1.0, name="Red")
    topic = f"homeassistant/event/upperson_{report.alert.id}/config"
    with open_(gallery, f"mqtt://127.0.0.1:{broker.port}", discovery=True) as deliverer:
        deliverer.run_once()
        wait_for(lambda: len(subscriber.messages) == 1)
        found = json.loads(subscriber.messages[0][1])
        assert subscriber.messages[0][0] == topic
        assert found["name"] == "Red"
        assert found["state_topic"] == f"upperson/alerts/{report.alert.id}"
        assert "alert.raised" in found["event_types"]
        remove_alert(gallery, "Red")
        deliverer.run_once()
        wait_for(lambda: len(subscriber.messages) == 2)
        assert subscriber.messages[1][:2] == (topic, b"")


def test_a_broker_that_forbids_the_topic_is_not_believed(gallery, raised, brokers, tmp_path):
    rules = tmp_path / "rules"
    rules.write_text("topic read #\ntopic write allowed/#\n")
    broker, _ = brokers(f"allow_anonymous true\nacl_file {rules}\n")
    raised(2)
    report = deliver(gallery, f"mqtt://127.0.0.1:{broker.port}/forbidden", attempts=1)
    assert (report.delivered, report.dead) == (0, 2)


@pytest.mark.parametrize("limit", ["max_packet_size", "message_size_limit", "a topic"])
def test_a_message_that_ends_the_connection_does_not_stop_the_others(
    gallery, raised, brokers, limit
):
    is_topic = limit == "a topic"
    broker, subscriber = brokers("allow_anonymous true\n" + ("" if is_topic else f"{limit} 2000\n"))
    first = raised(2)
    with gallery.outbox(write=True) as outbox:
        data = {"id": "bad", "picture": None, "text": "" if is_topic else "x" * 5000}
        body = {"type": "alert.raised", "data": data}
        topic = "a\nb" if is_topic else "red"
        outbox.put(Message(key="bad", topic=topic, time=time.time(), body=body))
    keys = [*first, *raised(2)]
    with open_(gallery, f"mqtt://127.0.0.1:{broker.port}", attempts=2) as deliverer:
        wait_for(lambda: not (deliverer.step() or waiting(gallery)))
    assert (deliverer.report.delivered, deliverer.report.dead) == (4, 1)
    wait_for(lambda: len(received_by(subscriber)) == 4)
    assert received_by(subscriber) == keys


# paho leaves the socket of a failed handshake to Python.
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_broker_with_tls_and_a_password(gallery, raised, brokers, tmp_path):
    certificate, key = written(tmp_path)
    port = free_port()
    _, subscriber = brokers(
        f"allow_anonymous true\nlistener {port} 127.0.0.1\ncertfile {certificate}\n"
        f"keyfile {key}\nallow_anonymous true\n"
    )
    raised(2)
    address = f"mqtts://127.0.0.1:{port}"
    with open_(gallery, address) as deliverer:
        assert_away(deliverer)
    found = deliver(gallery, address, ca_file=certificate, secret="anna:secret")
    assert found.delivered == 2
    wait_for(lambda: len(subscriber.messages) == 2)
