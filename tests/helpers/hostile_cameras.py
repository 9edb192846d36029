"""Camera servers that send their readers elsewhere, and what came of it.

    python -m tests.helpers.hostile_cameras --trials 500 --seed 1

Each is opened with a login. Nothing may arrive at another host (``elsewhere``, 127.0.0.2), no
login at another port, and nothing of a file of this machine may be read.
"""

import base64
import io
import random
import re
import socket
import socketserver
import ssl
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.certificate import written
from tests.helpers.small_servers import handled
from tests.helpers.trials import parse, report
from upperson_camera.source import parse_source
from upperson_camera.stream import StreamReader, open_source
from upperson_rt.errors import InputError

LOGIN = "anna:s3cret"
_SENT_LOGIN = base64.b64encode(LOGIN.encode())
OPENING_S = 2.0


@dataclass
class Elsewhere:
    """Servers that wait for a reader that is sent on, and what they received."""

    port: int = 0
    """Of TCP and UDP at 127.0.0.2."""
    own_port: int = 0
    """At the camera's own host."""
    film: str = ""
    """A file of this machine."""
    arrived: list[bytes] = field(default_factory=list)
    at_own_host: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    reached: bool
    """Another host was connected to, or sent a packet."""
    login: bool
    """A login arrived at another host or port."""
    read_file: bool
    error: str | None

    @property
    def is_safe(self) -> bool:
        return not (self.reached or self.login or self.read_file)


Reply = Callable[[str, int], bytes]
"""From the first line of a request, or nothing at first, and its number to an answer."""


@contextmanager
def tcp_server(
    reply: Reply, host: str = "127.0.0.1", certificate: tuple[Path, Path] | None = None
) -> Iterator[tuple[int, list[bytes]]]:
    """Answer requests of HTTP and RTSP; give the port and all requests."""
    requests: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connection = self.request
            connection.settimeout(10)
            with suppress(OSError):
                if certificate is not None:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(*certificate)
                    connection = context.wrap_socket(connection, server_side=True)
                with closing(connection):
                    if reply("", 0):  # It speaks first.
                        requests.append(b"")
                        connection.sendall(reply("", 0))
                    else:
                        self._answer(connection)

        def _answer(self, connection: socket.socket) -> None:
            pending = b""
            while received := connection.recv(4096):
                pending += received
                if pending[:1] == b"\x03":  # RTMP.
                    requests.append(pending)
                    return
                while b"\r\n\r\n" in pending:
                    head, _, pending = pending.partition(b"\r\n\r\n")
                    requests.append(head)
                    first = head.decode("latin-1").split("\r\n")[0]
                    number = re.search(rb"(?i)cseq: *(\d+)", head)
                    answer = reply(first, len(requests))
                    connection.sendall(answer.replace(b"{cseq}", number[1] if number else b"0"))
                    if first.startswith("GET"):
                        connection.shutdown(socket.SHUT_WR)
                        return

    with handled(Handler, host) as port:
        yield port, requests


@contextmanager
def elsewhere(film: Path) -> Iterator[Elsewhere]:
    """Run servers that ask for a login, at another host and at another port of the camera's."""

    def reply(first: str, number: int) -> bytes:
        if first.startswith("GET"):
            return http(401, ASKS)
        return rtsp("401 Unauthorized", ASKS) if first else b""

    found = Elsewhere(film=str(film))
    with ExitStack() as stack:
        found.port, found.arrived = stack.enter_context(tcp_server(reply, "127.0.0.2"))
        found.own_port, found.at_own_host = stack.enter_context(tcp_server(reply))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.2", found.port))
        udp.settimeout(0.2)
        stop = threading.Event()

        def listen() -> None:
            while not stop.is_set():
                with suppress(OSError):
                    found.arrived.append(b"udp " + udp.recv(4096))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        yield found


def tried(scheme: str, reply: Reply, there: Elsewhere, opening_s: float = OPENING_S) -> Outcome:
    """Open a camera with a login as `watch` does, read one picture, and return what came of it."""
    error, picture = None, None
    with tcp_server(reply) as (port, _):
        source = parse_source(f"{scheme}://{LOGIN}@127.0.0.1:{port}/live/stream.m3u8")
        there.arrived.clear()
        there.at_own_host.clear()
        try:
            with closing(open_source(source, opening_s)) as reader:
                picture = reader.read()
        except InputError as raised:
            error = str(raised)
        time.sleep(0.02)  # What was sent last arrives.
    return Outcome(
        reached=bool(there.arrived),
        login=any(_SENT_LOGIN in one for one in there.arrived + there.at_own_host),
        read_file=picture is not None and picture.size > 0,
        error=error,
    )


# --- What hostile servers answer

ASKS = 'WWW-Authenticate: Basic realm="x"'
_SDP = "Content-Type: application/sdp"


def http(status: int, *fields: str, body: bytes = b"", kind: str = "video/mp4") -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *fields, "", ""]).encode() + body


def rtsp(status: str, *fields: str, body: bytes = b"", end: str = "\r\n") -> bytes:
    lines = [f"RTSP/1.0 {status}", "CSeq: {cseq}", f"Content-Length: {len(body)}"]
    return end.join([*lines, *fields, "", ""]).encode() + body


def sdp(control: str = "*", host: str = "0.0.0.0", port: int = 0) -> bytes:
    return (
        f"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 {host}\r\nt=0 0\r\n"
        f"m=video {port} RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=control:{control}\r\n"
    ).encode()


def playlist(*lines: str) -> bytes:
    head = ["#EXTM3U", "#EXT-X-VERSION:7", "#EXT-X-TARGETDURATION:1", "#EXT-X-MEDIA-SEQUENCE:0"]
    return "\n".join([*head, *lines, "#EXT-X-ENDLIST", ""]).encode()


def rtsp_steps(changed: Mapping[str, bytes], login: bool = True) -> Reply:
    """Answer as a camera does up to PLAY, but for some methods; it asks for a login first."""
    answers = {
        "OPTIONS": rtsp("200 OK", "Public: OPTIONS, DESCRIBE, SETUP, PLAY"),
        "DESCRIBE": rtsp("200 OK", _SDP, body=sdp()),
        "SETUP": rtsp("200 OK", "Session: 1", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1"),
        "PLAY": rtsp("200 OK", "Session: 1"),
        **changed,
    }
    first_ones = {"DESCRIBE": rtsp("401 Unauthorized", ASKS)} if login else {}

    def reply(first: str, number: int) -> bytes:
        method = first.partition(" ")[0]
        usual = answers.get(method, rtsp("200 OK"))
        return first_ones.pop(method, usual) if first else b""

    return reply


def always(answer: bytes) -> Reply:
    return lambda first, number: answer if first else b""


def paths(answers: Mapping[str, bytes], otherwise: bytes) -> Reply:
    def reply(first: str, number: int) -> bytes:
        if not first:
            return b""
        target = first.split(" ")[1]
        return next((a for end, a in answers.items() if target.endswith(end)), otherwise)

    return reply


def at_first(answer: bytes) -> Reply:
    return lambda first, number: answer if not first else b""


def targets(scheme: str, there: Elsewhere) -> dict[str, str]:
    """Return addresses of which a camera's login must not reach any, nor we another host."""
    other = f"127.0.0.2:{there.port}"
    return {
        "other host": f"{scheme}://{other}/x.ts",
        "other host in capitals": f"{scheme.upper()}://{other}/x.ts",
        "other host with a login of its own": f"{scheme}://bob:pw@{other}/x.ts",
        "other host behind a user like ours": f"{scheme}://127.0.0.1:80@{other}/x.ts",
        "other host by a backslash": f"{scheme}://127.0.0.2:{there.port}\\@127.0.0.1/x.ts",
        "other host without a scheme": f"//{other}/x.ts",
        "own host by another name": f"{scheme}://localhost:{there.own_port}/x.ts",
        "own host at another port": f"{scheme}://127.0.0.1:{there.own_port}/x.ts",
        "RTSP": f"rtsp://{other}/x.ts" if scheme != "rtsp" else f"http://{other}/x.ts",
        "TCP": f"tcp://{other}",
        "UDP": f"udp://{other}",
        "a file": f"file://{there.film}",
        "a file without slashes": f"file:{there.film}",
        "a part of a file": f"subfile,,start,0,end,0,,:{there.film}",
        "several files": f"concat:{there.film}|{there.film}",
        "FTP": f"ftp://{other}/x.ts",
        "gopher": f"gopher://{other}/x.ts",
        "an encrypted stream": f"crypto+http://{other}/x.ts",
        "nothing": "",
        "half an address": f"{scheme}://[::1/",
    }


def cases(there: Elsewhere) -> dict[str, tuple[str, Reply]]:
    """Return servers that redirect, and those whose content names other places, by name."""
    return (
        {f"http {name}": ("http", reply) for name, reply in _http_cases(there).items()}
        | {f"rtsp {name}": ("rtsp", reply) for name, reply in _rtsp_cases(there).items()}
        | {f"tcp {name}": ("tcp", at_first(body)) for name, body in _bodies(there).items()}
    )


def _http_cases(there: Elsewhere) -> dict[str, Reply]:
    m3u8 = "application/vnd.apple.mpegurl"

    def hls(body: bytes) -> bytes:
        return http(200, body=body, kind=m3u8)

    def master(variant: str) -> bytes:
        return hls(f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{variant}\n".encode())

    found: dict[str, Reply] = {}
    for name, to in targets("http", there).items():
        found[f"302 to {name}"] = always(http(302, f"Location: {to}"))
        found[f"segment at {name}"] = always(hls(playlist("#EXTINF:1,", to)))
        found[f"variant at {name}"] = always(master(to))
    for name, body in _bodies(there).items():
        found[name] = always(http(200, body=body))
    to = f"http://127.0.0.2:{there.port}/x"
    moved = http(302, f"Location: {to}.ts")
    for status in (301, 303, 307, 308):
        found[str(status)] = always(http(status, f"Location: {to}.ts"))
    own = "#EXTINF:1,", "/own.ts"
    for name, line in {
        "key": f'#EXT-X-KEY:METHOD=AES-128,URI="{to}"',
        "file as key": f'#EXT-X-KEY:METHOD=AES-128,URI="file://{there.film}"',
        "start": f'#EXT-X-MAP:URI="{to}.mp4"',
    }.items():
        found[f"{name} of a segment"] = always(hls(playlist(line, *own)))
    rendition = (
        f'#EXTM3U\n#EXT-X-MEDIA:TYPE=VIDEO,GROUP-ID="v",NAME="x",URI="{to}.m3u8"\n'
        '#EXT-X-STREAM-INF:BANDWIDTH=1,VIDEO="v"\n/own.m3u8\n'
    )
    live = hls(playlist(*own).replace(b"#EXT-X-ENDLIST\n", b""))
    nested = hls(playlist("#EXTINF:1,", f"{to}.ts"))
    asked = http(401, ASKS)
    return found | {
        "302 within, then out": paths(
            {"a": http(302, "Location: /b"), "b": moved}, http(302, "Location: /a")
        ),
        "302 for ever": always(http(302, "Location: /again")),
        "302 after a login": lambda first, number: (
            (asked if number == 1 else moved) if first else b""
        ),
        "rendition": always(hls(rendition.encode())),
        "segment that redirects": paths({"own.ts": moved}, hls(playlist(*own))),
        "playlist in a playlist": paths({"own.m3u8": nested}, master("/own.m3u8")),
        "playlist that changes": lambda first, number: (
            b""
            if not first
            else http(404)
            if "own.ts" in first
            else live
            if number == 1
            else nested
        ),
    }


def _bodies(there: Elsewhere) -> dict[str, bytes]:
    """Return contents of other kinds than video that name other places."""
    to = f"127.0.0.2:{there.port}/x"
    return {
        "list of files": f"ffconcat version 1.0\nfile 'http://{to}.ts'\n"
        f"file 'file:{there.film}'\n".encode(),
        "list of a file": f"ffconcat version 1.0\nfile {Path(there.film).name}\n".encode(),
        "description of RTP": sdp("*", "127.0.0.2", there.port),
        "description of RTP behind rubbish": b"\xff\n" + sdp("*", "127.0.0.2", there.port),
        "playlist": playlist("#EXTINF:1,", f"http://{to}.ts"),
        "playlist of a file": playlist("#EXTINF:1,", f"file://{there.film}"),
        "playlist of a path": playlist("#EXTINF:1,", there.film),
        "redirection of RTSP": f"rtsptext\nrtsp://{to}\n".encode(),
        "reference of QuickTime": f"RTSPtextrtsp://{to}\r\n".encode(),
    }


def _rtsp_cases(there: Elsewhere) -> dict[str, Reply]:
    other = f"rtsp://127.0.0.2:{there.port}"
    away = f"Location: {other}/x"
    found = {
        f"302 to {method}": rtsp_steps({method: rtsp("302 Found", away)})
        for method in ("OPTIONS", "SETUP", "PLAY")
    }
    described = {
        f"302 to {name}": rtsp("302 Found", f"Location: {to}")
        for name, to in targets("rtsp", there).items()
    } | {
        "301": rtsp("301 Moved", away),
        "305": rtsp("305 Use Proxy", away),
        "399": rtsp("399 X", away),
        "lines without CR": rtsp("302 Found", away, end="\n"),
        "a blank before": b" " + rtsp("302 Found", away),
        "CR within": b"RT\rSP/1.0 302 Found\r\nCSeq: {cseq}\r\n" + away.encode() + b"\r\n\r\n",
        "CR in the status": rtsp("20\r0 OK", away).replace(b"20\r0", b"\r302"),
        "a packet in the head": rtsp("200 OK", "$\x00\x00\x00RTSP/1.0 302 Found", away),
        "no blank before the status": rtsp("302Found", away),
        "two answers": rtsp("200 OK") + rtsp("302 Found", away),
        "two lengths": rtsp("200 OK", "Content-Length: 9", away, body=b"RTSP/1.0 302 Found\r\n"),
        "a request to redirect": f"REDIRECT * RTSP/1.0\r\nCSeq: 1\r\n{away}\r\n\r\n".encode(),
        "base at another host": rtsp("200 OK", _SDP, f"Content-Base: {other}/track/", body=sdp()),
        "track at another host": rtsp(
            "200 OK", _SDP, body=sdp(f"{other}/track", "127.0.0.2", there.port)
        ),
    }
    found |= {name: rtsp_steps({"DESCRIBE": answer}) for name, answer in described.items()}
    host = f"127.0.0.2;server_port={there.port}-{there.port}"
    udp = f"Transport: RTP/AVP;unicast;client_port=5000-5001;source={host}"
    setups = [rtsp("461 Unsupported Transport")]

    def by_udp(first: str, number: int) -> bytes:
        answer = rtsp("200 OK", "Session: 1", udp)
        if first.startswith("SETUP") and setups:
            answer = setups.pop()
        return rtsp_steps({"SETUP": answer}, login=False)(first, number)

    return found | {"UDP from another host": by_udp}


def film(container: str = "mpegts", codec: str = "mpeg1video", **options: str) -> bytes:
    """Return a short film of noise, 50 pictures of 64 x 64."""
    import av

    content, noise = io.BytesIO(), np.random.default_rng(0)
    with av.open(content, "w", format=container, options=options) as opened_film:
        stream: Any = opened_film.add_stream(codec, rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for _ in range(50):
            picture = noise.integers(0, 256, (64, 64, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="bgr24")
            opened_film.mux(stream.encode(frame))
        opened_film.mux(stream.encode(None))
    return content.getvalue()


def tls_outcomes(folder: Path) -> dict[str, bool]:
    """Return by scheme and certificate whether a camera was sent anything over TLS."""
    found = {}
    certificates: dict[str, dict[str, Any]] = {
        "that signs itself": {},
        "of another host": {"host": "127.0.0.9"},
        "that has ended": {"days": -1},
    }
    for name, options in certificates.items():
        certificate = written(folder, bits=None, name=name, **options)
        for scheme in ("https", "rtsps", "rtmps"):
            with tcp_server(always(b""), certificate=certificate) as (port, requests):
                source = parse_source(f"{scheme}://{LOGIN}@127.0.0.1:{port}/x")
                with suppress(InputError):
                    StreamReader(source, 0.7 if scheme == "rtmps" else OPENING_S)
                found[f"{scheme}, {name}"] = bool(requests)
    return found


def random_case(chance: random.Random, there: Elsewhere) -> tuple[str, str, Reply]:
    """Return a server that sends its reader elsewhere in a way drawn at random."""
    pick = chance.choice
    if chance.random() < 0.2:
        everything = cases(there)
        name = pick(sorted(everything))
        return name, *everything[name]
    if chance.random() < 0.5:
        name, to = pick(sorted(targets("rtsp", there).items()))
        words = [pick(["", " ", "\t", "\r", "$", "x"]) for _ in range(3)]
        version = pick(["RTSP/1.0", "RTSP/2.0", "RTSP/1.0 ", "rtsp/1.0", " RTSP/1.0"])
        status = pick(["302 Found", "301", "300 X", "3022 X", "0302 X", "+302 X", "307\tX"])
        rest = ["CSeq: {cseq}", f"{pick(['Location', 'location', 'LOCATION'])}:{words[2]}{to}"]
        chance.shuffle(rest)
        first = f"{words[0]}{version} {words[1]}{status}"
        answer = pick(["\r\n", "\n", "\r\r\n"]).join([first, *rest, "", ""]).encode()
        if chance.random() < 0.3:
            answer = b"$\x00\x00\x04abcd" + answer
        if chance.random() < 0.3:
            answer = rtsp("200 OK", body=b"x" * chance.randrange(9)) + answer
        method = pick(["OPTIONS", "DESCRIBE", "SETUP", "PLAY"])
        steps = rtsp_steps({method: answer}, login=chance.random() < 0.5)
        return f"rtsp {method} {name} {answer!r}", "rtsp", steps
    name, to = pick(sorted(targets("http", there).items()))
    pad = pick(["", " ", "\t"])
    lines = [f"Location:{pad}{to}{pad}", f"Refresh: 0; url={to}", f"Content-Location: {to}"]
    chance.shuffle(lines)
    status = pick([300, 301, 302, 303, 304, 305, 307, 308, 399, 200, 201])
    body = playlist(pick(["#EXTINF:1,", "#EXTINF:9,x"]), pad + to)
    kind = pick(["video/mp4", "application/x-mpegurl", "audio/mpegurl", "text/plain"])
    answer = http(status, *lines[: chance.randrange(1, 4)], body=body, kind=kind)
    own = http(200, body=playlist("#EXTINF:1,", "/own.ts"), kind=kind)
    reply = paths({pick(["m3u8", "ts", "x"]): answer}, pick([answer, own]))
    return f"http {name} {answer!r}", "http", reply


def main() -> None:
    arguments = parse(__doc__, trials=200, seed=1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        secret = Path(folder) / "secret.ts"
        secret.write_bytes(film())
        there = stack.enter_context(elsewhere(secret))
        for name, sent in tls_outcomes(Path(folder)).items():
            counts["TLS"] += 1
            counts["TLS: sent something"] += sent
            print(f"{'SENT' if sent else 'ok  '} {name}")
        fixed = cases(there)
        chance = random.Random(arguments.seed)
        drawn = (random_case(chance, there) for _ in range(arguments.trials))
        for kind, some, opening_s in (
            ("fixed", ((name, *case) for name, case in fixed.items()), OPENING_S),
            ("drawn", drawn, OPENING_S / 2),
        ):
            for name, scheme, reply in some:
                outcome = tried(scheme, reply, there, opening_s)
                counts[kind] += 1
                for what in ("reached", "login", "read_file"):
                    counts[f"{kind}: {what}"] += getattr(outcome, what)
                counts[f"{kind}: unsafe"] += not outcome.is_safe
                if not outcome.is_safe or kind == "fixed":
                    print(f"{'ok  ' if outcome.is_safe else 'BAD '} {name}: {outcome}")
    report(counts, ())


if __name__ == "__main__":
    main()
