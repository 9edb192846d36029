"""What alerts are delivered to: a webhook that answers as set, and a real broker.

    python -m tests.helpers.alert_servers PORT FILE

runs a webhook as a process of its own, which appends the ids of messages to a file.
"""

import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.small_servers import HttpHandler

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(is_done: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < until, "it does not come about"
        time.sleep(0.01)


class Webhook(http.server.ThreadingHTTPServer):
    """Keeps what was posted, and answers with a status of `answers`, else 204."""

    daemon_threads = True

    def __init__(self, port: int = 0, on_post: Callable[[str], None] | None = None) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int | tuple[int, dict[str, str]]] = []
        self.paths: list[str] = []
        self.on_post = on_post
        self.is_silent = threading.Event()
        """While it is set, requests are not answered."""
        self.goes_on = threading.Event()
        self.unfinished: bytes | None = None
        """If set, the answer is 200, nine bytes are announced, and these are sent of them."""


class _Handler(HttpHandler):
    server: Webhook

    def do_POST(self) -> None:  # noqa: N802
        body = self.body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.posts.append((headers, body))
        self.server.paths.append(self.path)
        if self.server.on_post is not None:
            self.server.on_post(headers["webhook-id"])
        if self.server.is_silent.is_set():
            self.server.goes_on.wait(30)
        if self.server.unfinished is not None:
            self.send_response(200)
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(self.server.unfinished)
            self.server.goes_on.wait(30)
            return
        answer = self.server.answers.pop(0) if self.server.answers else 204
        status, more = answer if isinstance(answer, tuple) else (answer, {})
        self.answer(status, b"", *more.items())


class Broker:
    """A mosquitto that keeps its state when it ends."""

    def __init__(self, folder: Path, settings: str = "allow_anonymous true\n") -> None:
        if MOSQUITTO is None:
            pytest.skip("mosquitto is not installed")
        self.port = free_port()
        self._configuration = folder / "mosquitto.conf"
        self._configuration.write_text(
            f"listener {self.port} 127.0.0.1\n{settings}persistence true\n"
            f"persistence_location {folder}/\nmax_queued_messages 100000\nuser root\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Broker":
        """Start it, and wait until it answers."""
        command = [str(MOSQUITTO), "-c", str(self._configuration)]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        wait_for(lambda: is_open(self.port))
        return self

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None


class Subscriber:
    """Gets all messages of a broker in one session, which outlives both."""

    def __init__(self, port: int, topic: str = "#", login: tuple[str, str] | None = None) -> None:
        from paho.mqtt import client as paho
        from paho.mqtt.enums import CallbackAPIVersion
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        self.messages: list[tuple[str, bytes, bool]] = []
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="subscriber", protocol=paho.MQTTv5
        )
        self._client.reconnect_delay_set(0.05, 0.2)
        if login is not None:
            self._client.username_pw_set(*login)
        self._is_subscribed = threading.Event()
        self._client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
        self._client.on_subscribe = lambda *_: self._is_subscribed.set()
        self._client.on_disconnect = lambda *_: self._is_subscribed.clear()
        self._client.on_message = lambda client, data, message: self.messages.append(
            (message.topic, message.payload, bool(message.retain))
        )
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        self._client.connect("127.0.0.1", port, clean_start=False, properties=properties)
        self._client.loop_start()
        assert self._is_subscribed.wait(20)

    @property
    def is_subscribed(self) -> bool:
        return self._is_subscribed.is_set()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def main() -> None:
    port, file = int(sys.argv[1]), Path(sys.argv[2])

    def note(id_: str) -> None:
        with file.open("a") as out:  # Before it answers.
            out.write(f"{id_}\n")

    Webhook(port, note).serve_forever(0.01)


if __name__ == "__main__":
    main()
