"""MQTT 5 with QoS 1, and discovery by Home Assistant."""

import json
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from upperson_alerts.alerts import Alert
from upperson_alerts.delivery import (
    Delivery,
    DeliveryOptions,
    Parcel,
    Refusal,
    UnreachableError,
)
from upperson_alerts.webhook import tls_context
from upperson_rt.errors import UsageError, missing_extra
from upperson_rt.printable import get_logger, one_line, safe_repr

_TOPIC = "upperson/alerts"
_EVENTS = ("alert.raised", "alert.capped")
_NO_SUBSCRIBERS = 16
_OF_A_MESSAGE = frozenset({129, 130, 144, 149, 153})
"""Why a broker ends a connection over what was published: it is malformed, breaks the protocol, its
topic is invalid, it is too large, or its format is invalid."""
_LONGEST_TOPIC = 65_000
"""Bytes of UTF-8: MQTT has 65,535, and the id of an alert comes after it."""
_LOG = get_logger(__name__)


class MqttDelivery(Delivery):
    """Publishes each message to ``TOPIC/<id of the alert>``; the broker's PUBACK accepts it."""

    def __init__(self, address: str, options: DeliveryOptions) -> None:
        """Read ``mqtt://host:port/topic``, or mqtts:// with TLS."""
        try:
            import paho.mqtt.client  # noqa: F401
        except ImportError as error:
            raise missing_extra("paho-mqtt", "alerts", "delivery by MQTT") from error
        parts = urlsplit(address)
        self._is_tls = parts.scheme == "mqtts"
        try:
            self._host, port = parts.hostname, parts.port
        except ValueError:
            self._host, port = None, None
        self._topic = unquote(parts.path).strip("/") or _TOPIC
        if not self._host or parts.query or not _is_topic(self._topic):
            raise UsageError(
                "expected the address of a broker, such as mqtt://host:1883/upperson/alerts, found "
                f"{safe_repr(address)}",
                code="address_malformed",
            )
        self._port = port or (8883 if self._is_tls else 1883)
        self._timeout_s = options.timeout_s
        self._context = tls_context(options) if self._is_tls else None
        self._login = None if options.secret is None else options.secret.partition(":")
        self._discovery = options.discovery
        self._announced: set[str] = set()
        self._client: Any = None
        self._changed = threading.Condition()
        self._acknowledged: dict[int, Any] = {}
        self._answer: Any = None
        self._is_gone = False
        self._gone: Any = None
        """Why the connection ended."""
        self._has_warned = False

    def deliver(self, parcels: Sequence[Parcel]) -> Iterator[tuple[str, Refusal | None]]:
        """Publish messages together, and wait for what the broker says to each."""
        if parcels:
            yield from self._publish(
                [(f"{self._topic}/{one.alert}", _with_event(one.body), one.id) for one in parcels]
            )

    def announce(self, alerts: Sequence[Alert]) -> None:
        """Announce alerts to Home Assistant, each as an event; take back those it announced."""
        if not self._discovery:
            return
        topics = {f"homeassistant/event/upperson_{one.id}/config": one for one in alerts}
        messages = [
            (topic, json.dumps(self._config(one)).encode(), topic) for topic, one in topics.items()
        ]
        messages += [(topic, b"", topic) for topic in self._announced - topics.keys()]
        while messages:  # A refusal may end the connection before the rest.
            handled = dict(self._publish(messages, retain=True))
            for topic, refusal in handled.items():
                if refusal is not None:
                    _LOG.warning("the broker does not take %s: %s", topic, refusal.text)
            messages = [one for one in messages if one[2] not in handled]
        self._announced = set(topics)

    def close(self) -> None:
        """Disconnect."""
        client, self._client = self._client, None
        if client is not None:
            client.disconnect()
            client.loop_stop()

    def _config(self, alert: Alert) -> dict[str, Any]:
        return {
            "name": alert.name,
            "unique_id": f"upperson_alert_{alert.id}",
            "state_topic": f"{self._topic}/{alert.id}",
            "event_types": [*_EVENTS],
            "qos": 1,
            "icon": "mdi:account-search",
            "device": {"identifiers": ["upperson_alerts"], "name": "UP-Person alerts"},
        }

    def _publish(
        self, messages: Sequence[tuple[str, bytes, str]], retain: bool = False
    ) -> Iterator[tuple[str, Refusal | None]]:
        client = self._connected()
        waiting: dict[int, str] = {}
        for topic, payload, id_ in messages:
            try:
                info = client.publish(topic, payload, qos=1, retain=retain)
            except ValueError as error:  # It is too long for MQTT.
                yield id_, Refusal(one_line(error))
                continue
            waiting[info.mid] = id_
        until = time.monotonic() + self._timeout_s
        while waiting:
            with self._changed:
                arrived = [mid for mid in waiting if mid in self._acknowledged]
                if not arrived:
                    left_s = until - time.monotonic()
                    if self._is_gone or left_s <= 0:
                        break
                    self._changed.wait(left_s)
                    continue
                codes = [self._acknowledged.pop(mid) for mid in arrived]
            until = time.monotonic() + self._timeout_s
            for mid, code in zip(arrived, codes, strict=True):
                self._warn_without_subscriber(code)
                yield waiting.pop(mid), Refusal(f"it answers {code}") if code.is_failure else None
        if waiting:
            was_gone, code = self._is_gone, self._gone
            self.close()
            if was_gone and code.value in _OF_A_MESSAGE:
                # Brokers go through messages in order: it is the first one without an answer.
                yield next(iter(waiting.values())), Refusal(f"it answers {code}")
                return
            lost, silent = "the connection was lost", "it acknowledges nothing within the time"
            raise UnreachableError(lost if was_gone else f"{silent}, {self._timeout_s:g} s")

    def _warn_without_subscriber(self, code: Any) -> None:
        if code.value == _NO_SUBSCRIBERS and not self._has_warned:
            self._has_warned = True
            text = "the broker takes the alerts, but no client is subscribed to %s"
            _LOG.warning(text, self._topic)

    def _connected(self) -> Any:
        if self._client is not None and not self._is_gone:
            return self._client
        self.close()
        from paho.mqtt import client as paho
        from paho.mqtt.enums import CallbackAPIVersion

        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"upperson-{uuid.uuid4().hex[:12]}",
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
        )
        client.connect_timeout = self._timeout_s
        client.max_inflight_messages_set(20)
        if self._login is not None:
            client.username_pw_set(self._login[0], self._login[2] or None)
        if self._context is not None:
            client.tls_set_context(self._context)
        self._acknowledged, self._answer, self._is_gone = {}, None, False
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        try:
            client.connect(str(self._host), self._port, keepalive=30)
        except (OSError, ValueError) as error:
            raise UnreachableError(one_line(error)) from error
        client.loop_start()
        self._client = client
        with self._changed:
            self._changed.wait_for(
                lambda: self._answer is not None or self._is_gone, self._timeout_s
            )
            answer = self._answer
        if answer is None or answer.is_failure:
            self.close()
            raise UnreachableError("no answer" if answer is None else f"it answers {answer}")
        return client

    # Called in paho's thread.

    def _on_connect(self, client: Any, data: Any, flags: Any, code: Any, properties: Any) -> None:
        with self._changed:
            self._answer = code
            self._changed.notify_all()

    def _on_disconnect(self, client: Any, data: Any, flags: Any, code: Any, more: Any) -> None:
        with self._changed:
            self._is_gone, self._gone = True, code
            self._changed.notify_all()

    def _on_publish(self, client: Any, data: Any, mid: int, code: Any, properties: Any) -> None:
        with self._changed:
            self._acknowledged[mid] = code
            self._changed.notify_all()


def _is_topic(topic: str) -> bool:
    """Whether a broker takes a topic: no wildcards, no control characters, not too long."""
    size_bytes = len(topic.encode("utf-8", "surrogatepass"))
    is_plain = not any(mark in "+#" or not (mark.isprintable() or mark == " ") for mark in topic)
    return is_plain and size_bytes <= _LONGEST_TOPIC


def _with_event(body: bytes) -> bytes:
    """Add the key by which Home Assistant distinguishes events."""
    content = json.loads(body)
    return json.dumps({"event_type": content["type"], **content}).encode()
