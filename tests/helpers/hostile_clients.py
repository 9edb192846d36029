"""Clients that want to take a console down, and what another client notices of them.

    python -m tests.helpers.hostile_clients requests --trials 120 --at-once 50 --seed 1
    python -m tests.helpers.hostile_clients handshakes --rate 110 --seconds 40

``requests`` sends requests of every kind of `KINDS` with valid tokens, many at once. ``handshakes``
opens connections to a console with TLS, and sends nothing. Both run a console over a toy bundle
in a process of its own, and print memory, descriptors, bytes of its log, and how long the searches
of another client took before and meanwhile.
"""

import argparse
import base64
import binascii
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import socket
import ssl
import struct
import subprocess
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image

from tests.helpers.certificate import written
from tests.helpers.console import shown_id
from tests.helpers.served import Served, served
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_console.accounts import add_token
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery, Item

MIB = 1 << 20
HOSTILE = 3
"""Viewers that are."""
_JSON = {"content-type": "application/json"}
_FORM = {"content-type": "application/x-www-form-urlencoded"}
_FILE = 'name="picture"; filename="a"'
_BOTH = "/api/v1/search/picture"


class Sent(NamedTuple):
    """A request."""

    path: str
    headers: dict[str, str] = {}  # noqa: RUF012 - It is never changed.
    body: bytes = b""
    method: str = "POST"
    pause_s: float = 0.0
    """In the middle of the body."""


# --- Kinds of requests


def png_of_chunks(count: int) -> bytes:
    """Return a PNG of 8 x 8 pixels with so many empty chunks before its pixels."""

    def chunk(kind: bytes, content: bytes = b"") -> bytes:
        check = binascii.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    rows = zlib.compress((b"\0" + bytes(24)) * 8)
    return start + chunk(b"teSt") * count + chunk(b"IDAT", rows) + chunk(b"IEND")


def jpeg_of_segments(segment: bytes, count: int) -> bytes:
    """Return a JPEG with so many segments, or other bytes, behind its first two bytes."""
    plain = _encoded(np.zeros((8, 8, 3), np.uint8), "JPEG")
    return plain[:2] + segment * count + plain[2:]


def gif_of_blocks(count: int) -> bytes:
    """Return a GIF with a comment of so many blocks of one byte."""
    plain = _encoded(np.zeros((8, 8, 3), np.uint8), "GIF")
    at = plain.index(b"\x2c")
    return plain[:at] + b"\x21\xfe" + b"\x01x" * count + b"\0" + plain[at:]


def _encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _form(path: str, *parts: tuple[str, bytes]) -> Sent:
    """Return a form; each part is what follows ``form-data;``, and content."""
    body = b"".join(
        b"--x\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content + b"\r\n"
        for head, content in parts
    )
    return Sent(path, {"content-type": "multipart/form-data; boundary=x"}, body + b"--x--\r\n")


def _upload(content: bytes) -> Sent:
    return _form("/api/v1/pictures", (_FILE, content))


def _search(body: bytes) -> Sent:
    return Sent("/api/v1/search", _JSON, body)


def _embed(*inputs: str) -> Sent:
    return Sent("/v1/embeddings", _JSON, json.dumps({"input": inputs}).encode())


def _url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _keys(count: int) -> str:
    return "{" + ",".join(f'"k{n}":1' for n in range(count)) + "}"


def _noise(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


_ESCAPES = b'{"input": "' + b"\\u0041" * (3 * MIB) + b'"}'
KINDS: dict[str, Callable[[], Sent]] = {
    "one text of 18 MB": lambda: _embed("red " * (18 * MIB // 4)),
    "a text of 18 MB of escapes": lambda: Sent("/v1/embeddings", _JSON, _ESCAPES),
    "a million keys": lambda: _search(_keys(1_000_000).encode()),
    "a million keys in UTF-16": lambda: _search(_keys(700_000).encode("utf-16")),
    "a million elements": lambda: _embed(*(["a"] * 1_000_000)),
    "a nest of a million": lambda: _search(b"[" * 1_000_000),
    "20 MB of digits": lambda: _search(b"[" + b"1" * 19 * MIB + b"]"),
    "64 long sentences": lambda: _embed(*(f"{n} " + "red coat " * 200 for n in range(64))),
    "64 pictures": lambda: _embed(*([_url(_encoded(_noise(160)))] * 64)),
    "a data URL of 15 MB": lambda: _embed(_url(bytes(14 * MIB))),
    "a PNG of a million chunks": lambda: _upload(png_of_chunks(1_000_000)),
    "the same in a data URL": lambda: _embed(_url(png_of_chunks(1_000_000))),
    "a JPEG of 4 million segments": lambda: _upload(jpeg_of_segments(b"\xff\xe0\0\2", 4_000_000)),
    "a JPEG of 15 MB of fill bytes": lambda: _upload(jpeg_of_segments(b"\xff", 15 * MIB)),
    "a GIF of many blocks": lambda: _upload(gif_of_blocks(500_000)),
    "a PNG of 33 megapixels": lambda: _upload(_encoded(np.zeros((5_700, 5_800, 3), np.uint8))),
    "a picture of 17 MB": lambda: _upload(_encoded(_noise(2_400))),
    "a form of 900 files": lambda: _form("/picture", *[(_FILE, bytes(20_000))] * 900),
    "a form of 2,500 fields": lambda: _form(_BOTH, *[('name="search"', b"x" * 7000)] * 2500),
    "a form with a million keys": lambda: _form(
        _BOTH, (_FILE, _encoded(_noise(16))), ('name="search"', _keys(80_000).encode())
    ),
    "a million fields": lambda: Sent("/saved", _FORM, b"a&" * 1_000_000),
    "half a body": lambda: Sent("/v1/embeddings", _JSON, bytes(19 * MIB), pause_s=8.0),
    "an export of 3 GiB": lambda: Sent("/api/v1/export", _JSON, b'{"ids": ["ID"]}'),
    "a long address": lambda: Sent("/?q=" + "red+" * 15_000, method="GET"),
}


def _status(host: tuple[str, int], request: Sent, token: str) -> str:
    """Send a request, read the answer to its end, and return its status."""
    head = [f"{request.method} {request.path} HTTP/1.1", f"Host: {host[0]}:{host[1]}"]
    headers = {**request.headers, "content-length": str(len(request.body)), "connection": "close"}
    head += [f"{name}: {value}" for name, value in headers.items()]
    head += [f"Authorization: Bearer {token}", "", ""]
    answer = b""
    try:
        with socket.create_connection(host, timeout=120) as connection:
            with suppress(ConnectionError):  # The answer may be there before all is sent.
                connection.sendall("\r\n".join(head).encode())
                half = len(request.body) // 2 if request.pause_s else 0
                connection.sendall(request.body[:half])
                time.sleep(request.pause_s)
                connection.sendall(request.body[half:])
            while block := connection.recv(1 << 16):
                answer = (answer + block)[:20]
    except OSError as error:
        return answer[9:12].decode() or type(error).__name__
    return answer[9:12].decode() or "closed"


# --- The console and another client


@contextmanager
def console(folder: Path, *arguments: object) -> Iterator[tuple[Served, dict[str, str], str]]:
    """Serve a toy gallery; yield the process, a token for each user, and the id of a huge crop."""
    encoder = open_encoder(make_toy_bundle(folder / "bundle"), threads=1)
    pictures = [(colour, n) for colour in COLOURS for n in range(200)]
    files = [draw_person(folder / f"{colour}{n}.png", colour, seed=n) for colour, n in pictures]
    with Gallery.open(
        folder / "gallery", encoder.fingerprint, encoder.embed_dim, create=True
    ) as gallery:
        gallery.crops_dir.mkdir(exist_ok=True)
        crop = gallery.crops_dir / "huge.jpg"
        Image.new("RGB", (8, 24)).save(crop)
        os.truncate(crop, 3 << 30)
        items = [Item(key=file.name, camera="gate", source=str(file)) for file in files]
        items.append(Item(key="huge", camera="gate", crop="huge.jpg"))
        gallery.add(items, encoder.encode_images([*files, files[0]]))
        huge = shown_id(gallery, folder / "console", "huge")
    roles = {f"vera{n}": "viewer" for n in range(HOSTILE)} | {"olga": "operator", "anna": "viewer"}
    file = folder / "tokens.json"
    tokens = {name: add_token(file, name, role, None) for name, role in roles.items()}
    with served(
        folder, "--bundle", "bundle", "--gallery", "gallery", "--threads", 1,
        "--token-file", "tokens.json", *arguments,
    ) as running:  # fmt: skip
        yield running, tokens, str(huge)


def _search_on(url: str, token: str, verify: str | None, anew: bool, file: Path, end: Any) -> None:
    """Search until the end, over one connection or new ones; write when, how long and status."""
    context = ssl.create_default_context(cafile=verify) if verify else False
    client, headers = httpx.Client(verify=context, timeout=60), {"authorization": f"Bearer {token}"}
    with file.open("w", buffering=1) as written_to:
        for n in itertools.count():
            if end.is_set():
                return
            if anew:
                client.close()
                client = httpx.Client(verify=context, timeout=60)
            began = time.monotonic()
            try:
                query = {"sentence": f"man in a {list(COLOURS)[n % 6]} coat and {n}", "limit": 5}
                answer = client.post(f"{url}/api/v1/search", json=query, headers=headers)
                status = str(answer.status_code)
            except httpx.HTTPError as error:
                status = type(error).__name__
            written_to.write(f"{began} {time.monotonic() - began} {status}\n")
            time.sleep(0.02)


class Watcher:
    """Another client in a process of its own, and the console's process."""

    def __init__(self, running: Served, token: str, verify: Path | None = None, anew: bool = False):
        spawn = multiprocessing.get_context("spawn")
        self._end, self.pid = spawn.Event(), running.process.pid
        self._file = running.output.with_name(f"searches-{anew}")
        self._file.touch()
        verified = None if verify is None else str(verify)
        arguments = (running.url, token, verified, anew, self._file, self._end)
        self._process = spawn.Process(target=_search_on, args=arguments, daemon=True)
        self._process.start()
        while not self._file.stat().st_size:  # Until its first search.
            time.sleep(0.1)

    def since(self, moment: float) -> str:
        """Return in words how long the searches since a moment took."""
        found = [line.split() for line in self._file.read_text().splitlines()]
        late = [(float(took), status) for began, took, status in found if float(began) >= moment]
        if not late:
            return "no search"
        times = [1000 * took for took, _ in sorted(late)]
        middle, p95 = times[len(times) // 2], times[int(len(times) * 0.95)]
        return (
            f"{len(times)} searches {dict(Counter(status for _, status in late))}: median "
            f"{middle:.0f} ms, p95 {p95:.0f} ms, most {times[-1]:.0f} ms"
        )

    def mib(self, key: str = "VmRSS") -> float:
        """Return the memory of the console's process in MiB."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]

    def descriptors(self) -> int:
        """Return how many descriptors the console's process has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def end(self) -> None:
        """Search no more."""
        self._end.set()
        self._process.join(90)


def requests(trials: int, at_once: int, seed: int, only: str, quiet_s: float = 10.0) -> None:
    """Send hostile requests, and print what they did."""
    rng = random.Random(seed)
    made = {name: make() for name, make in KINDS.items() if only in name}
    order = [name for name, _ in zip(itertools.cycle(made), range(trials), strict=False)]
    rng.shuffle(order)
    with tempfile.TemporaryDirectory() as folder, console(Path(folder)) as (running, tokens, huge):
        watcher = Watcher(running, tokens["anna"])
        began = time.monotonic()
        time.sleep(quiet_s)
        idle = watcher.mib()
        print(f"idle {idle:.0f} MiB; {watcher.since(began)}", flush=True)
        Path(f"/proc/{watcher.pid}/clear_refs").write_text("5")  # The peak begins anew.

        def send(name: str) -> tuple[str, str, float]:
            request, began = made[name], time.monotonic()
            if b"ID" in request.body[:20]:
                request = request._replace(body=request.body.replace(b"ID", huge.encode()))
            user = "olga" if "export" in name else f"vera{rng.randrange(HOSTILE)}"
            status = _status(place_of(running), request, tokens[user])
            return name, status, time.monotonic() - began

        began = time.monotonic()
        with ThreadPoolExecutor(at_once) as pool:
            done = [*pool.map(send, order)]
        print(f"{trials} requests, {at_once} at once: {time.monotonic() - began:.0f} s", flush=True)
        for name in made:
            statuses = Counter(status for one, status, _ in done if one == name)
            longest = max((took for one, _, took in done if one == name), default=0.0)
            print(f"  {name}: {dict(statuses)}, longest {longest:.1f} s")
        print(f"meanwhile: {watcher.since(began)}")
        peak = watcher.mib("VmHWM")
        print(f"most {peak:.0f} MiB, {peak - idle:.0f} above idle")
        time.sleep(quiet_s)
        left = watcher.mib() - idle
        print(f"after {quiet_s:g} s: {left:+.0f} MiB, ended {running.process.poll()}")
        watcher.end()
        print(f"log: {running.errors.stat().st_size} bytes")


def handshakes(rate: float, seconds: float, descriptors: int) -> None:
    """Open connections with TLS that never shake hands, and print what they did."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        certificate, key = written(folder, bits=None)
        tls = ("--tls-cert", certificate, "--tls-key", key)
        running, tokens, _ = stack.enter_context(console(folder, *tls))
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (descriptors,) * 2)
        kept, anew = (Watcher(running, tokens["anna"], certificate, anew) for anew in (False, True))

        def report(began: float) -> None:
            print(f"one connection: {kept.since(began)}\nnew ones: {anew.since(began)}", flush=True)

        began = time.monotonic()
        time.sleep(5)
        idle = kept.mib()
        print(f"idle {idle:.0f} MiB, {kept.descriptors()} descriptors of {descriptors}")
        report(began)
        began, opened, most, memory = time.monotonic(), [], 0, 0.0
        while (passed := time.monotonic() - began) < seconds:
            while len(opened) < passed * rate:
                opened.append(socket.socket())
                opened[-1].setblocking(False)
                opened[-1].connect_ex(place_of(running))
            most, memory = max(most, kept.descriptors()), max(memory, kept.mib())
            time.sleep(0.01)
        print(f"{len(opened)} connections in {seconds:g} s: {most} descriptors at most")
        report(began)
        for one in opened:
            one.close()
        content = running.errors.read_bytes()
        print(f"log {len(content)} bytes, {content.count(b'Traceback')} tracebacks")
        after = time.monotonic()
        time.sleep(10)
        print(f"most {memory - idle:+.0f} MiB, 10 s after the end {kept.mib() - idle:+.0f} MiB")
        print(f"new ones after the end: {anew.since(after)}; ended {running.process.poll()}")
        kept.end()
        anew.end()


def place_of(running: Served) -> tuple[str, int]:
    """Return host and port of a console."""
    host, _, port = running.url.partition("://")[2].partition(":")
    return host, int(port)


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_requests = commands.add_parser("requests")
    for name, default in (("--trials", 120), ("--at-once", 50), ("--seed", 1)):
        of_requests.add_argument(name, type=int, default=default)
    of_requests.add_argument("--only", default="", help="kinds whose name has this")
    of_handshakes = commands.add_parser("handshakes")
    of_handshakes.add_argument("--rate", type=float, default=110)
    of_handshakes.add_argument("--seconds", type=float, default=40)
    of_handshakes.add_argument("--descriptors", type=int, default=1024)
    given = vars(parser.parse_args())
    run = {"requests": requests, "handshakes": handshakes}[given.pop("command")]
    with suppress(subprocess.TimeoutExpired):
        run(**given)


if __name__ == "__main__":
    main()
