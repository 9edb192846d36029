"""An ONVIF camera with strict authentication, and a malicious one; both on 127.0.0.1.

What it checks and says is written after ONVIF's and OASIS' specifications, not after our client.
"""

import base64
import datetime
import hashlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from tests.helpers.small_servers import HttpHandler, handled, is_allowed

_ENVELOPE = (
    '<?xml version="1.0" encoding="UTF-8"?><env:Envelope '
    'xmlns:env="http://www.w3.org/2003/05/soap-envelope" '
    'xmlns:tds="http://www.onvif.org/ver10/device/wsdl" '
    'xmlns:trt="http://www.onvif.org/ver10/media/wsdl" '
    'xmlns:tr2="http://www.onvif.org/ver20/media/wsdl" '
    'xmlns:ter="http://www.onvif.org/ver10/error" '
    'xmlns:tt="http://www.onvif.org/ver10/schema">'
    "<env:Body>{}</env:Body></env:Envelope>"
)
_FAULT = (
    "<env:Fault><env:Code><env:Value>env:Sender</env:Value><env:Subcode><env:Value>ter:{}"
    '</env:Value></env:Subcode></env:Code><env:Reason><env:Text xml:lang="en">{}</env:Text>'
    "</env:Reason></env:Fault>"
)


def _tags(now: datetime.datetime, parent: str, names: Sequence[str]) -> str:
    values = "".join(f"<tt:{n}>{getattr(now, n.lower())}</tt:{n}>" for n in names)
    return f"<tt:{parent}>{values}</tt:{parent}>"


@dataclass
class OnvifDevice:
    """What a device is, and what it was asked; fields may be changed while it runs."""

    login: tuple[str, str] | None = None
    streams: dict[str, str] = field(default_factory=dict)
    """Addresses of its streams by the names of their profiles."""
    clock_ahead: datetime.timedelta = datetime.timedelta()
    media2: bool = False
    http_digest: bool = False
    """Wants the digest of HTTP instead of that of WS-Security."""
    other_host: str | None = None
    """Where it says that its media service is."""
    answer: Callable[[str], bytes | None] = lambda name: None
    """Answers to requests, by their names, that are sent as they are."""
    asked: list[str] = field(default_factory=list)
    """Names of all requests."""
    received: bytes = b""
    """All that ever came in."""
    port: int = 0

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"http://{self.place}/onvif/device_service"

    def reply(self, name: str, body: str, headers: str) -> tuple[int, str]:
        """Return status and body of an answer."""
        open_to_all = name in ("GetSystemDateAndTime", "GetServices", "GetCapabilities")
        if not open_to_all and self.login is not None:
            if self.http_digest:
                if not is_allowed(headers, "digest", "POST", self.login, "cam", "0a1b"):
                    return 401, ""
            elif not self._token_is_right(body):
                return 400, _FAULT.format("NotAuthorized", "Sender not Authorized")
        version, prefix, before, behind = (
            ("ver20", "tr2", "<tr2:Configurations><tt:VideoEncoder>",
             "</tt:VideoEncoder></tr2:Configurations>")
            if self.media2
            else ("ver10", "trt", "<tt:VideoEncoderConfiguration>",
                  "</tt:VideoEncoderConfiguration>")
        )  # fmt: skip
        token = re.search(r"ProfileToken>p(\d+)<", body)
        uri = escape(list(self.streams.values())[int(token[1])] if token else "")
        now = datetime.datetime.now(datetime.timezone.utc) + self.clock_ahead
        answers = {
            "GetSystemDateAndTime": "<tds:SystemDateAndTime><tt:UTCDateTime>"
            f"{_tags(now, 'Time', ('Hour', 'Minute', 'Second'))}"
            f"{_tags(now, 'Date', ('Year', 'Month', 'Day'))}"
            "</tt:UTCDateTime></tds:SystemDateAndTime>",
            "GetServices": "".join(
                f"<tds:Service><tds:Namespace>http://www.onvif.org/{service}/wsdl</tds:Namespace>"
                f"<tds:XAddr>{address}</tds:XAddr></tds:Service>"
                for service, address in (
                    ("ver10/device", self.address),
                    (f"{version}/media", f"http://{self.other_host or self.place}/onvif/media"),
                )
            ),
            "GetDeviceInformation": "<tds:Manufacturer>Maker &amp; Sons</tds:Manufacturer>"
            "<tds:Model>Cam 5</tds:Model>",
            "GetProfiles": "".join(
                f'<{prefix}:Profiles token="p{number}"><tt:Name>{profile}</tt:Name>{before}'
                f"<tt:Encoding>H264</tt:Encoding><tt:Resolution><tt:Width>{640 * (number + 1)}"
                f"</tt:Width><tt:Height>{360 * (number + 1)}</tt:Height></tt:Resolution>"
                "<tt:RateControl><tt:FrameRateLimit>25</tt:FrameRateLimit></tt:RateControl>"
                f"{behind}</{prefix}:Profiles>"
                for number, profile in enumerate(self.streams)
            ),
            "GetStreamUri": f"<tr2:Uri>{uri}</tr2:Uri>"
            if self.media2
            else f"<trt:MediaUri><tt:Uri>{uri}</tt:Uri></trt:MediaUri>",
        }
        if name not in answers:
            return 500, _FAULT.format("ActionNotSupported", "Optional Action Not Implemented")
        return 200, f"<r:{name}Response xmlns:r='urn:r'>{answers[name]}</r:{name}Response>"

    def envelope(self, name: str) -> bytes:
        """Return the response to an authorized request."""
        return _ENVELOPE.format(self.reply(name, "ProfileToken>p0<", "")[1]).encode()

    def _token_is_right(self, body: str) -> bool:
        """Return whether a UsernameToken is right, and of now; OASIS, UsernameToken Profile 1.0."""
        assert self.login is not None
        names = ("Username", "Password", "Nonce", "Created")
        found = [match[1] for n in names if (match := re.search(rf"{n}[^>]*>([^<]*)</", body))]
        if len(found) < len(names):
            return False
        user, digest, nonce, created = found
        secret = base64.b64decode(nonce) + created.encode() + self.login[1].encode()
        expected = base64.b64encode(hashlib.sha1(secret).digest()).decode()
        sent = datetime.datetime.fromisoformat(created.replace("Z", "+00:00"))
        now = datetime.datetime.now(datetime.timezone.utc) + self.clock_ahead
        fresh = abs(now - sent) < datetime.timedelta(minutes=2)
        return fresh and user == self.login[0] and digest == expected


@contextmanager
def onvif_device(**options: object) -> Iterator[OnvifDevice]:
    device = OnvifDevice(**options)  # type: ignore[arg-type]

    class Handler(HttpHandler):
        def do_POST(self) -> None:  # noqa: N802
            content = self.body()
            device.received += bytes(self.headers) + content
            body = content.decode()
            asked = re.search(r"<s:Body><m:(\w+)", body)
            assert asked is not None
            device.asked.append(asked[1])
            if (raw := device.answer(asked[1])) is not None:
                self.wfile.write(raw)
                return
            status, text = device.reply(asked[1], body, self.headers.get("Authorization", ""))
            asks = ('Digest realm="cam", nonce="0a1b"', 'Basic realm="cam"')
            fields = [("WWW-Authenticate", one) for one in asks if status == 401]
            self.answer(status, _ENVELOPE.format(text).encode() if text else b"", *fields)

    with handled(Handler) as device.port:
        yield device


MATCH = (
    '<?xml version="1.0" encoding="UTF-8"?>'
    '<e:Envelope xmlns:e="http://www.w3.org/2003/05/soap-envelope" '
    'xmlns:w="http://schemas.xmlsoap.org/ws/2004/08/addressing" '
    'xmlns:d="http://schemas.xmlsoap.org/ws/2005/04/discovery"><e:Header>'
    "<w:RelatesTo>{relates_to}</w:RelatesTo></e:Header><e:Body><d:ProbeMatches><d:ProbeMatch>"
    "<d:Scopes>onvif://www.onvif.org/type/video_encoder "
    "onvif://www.onvif.org/name/{name} onvif://www.onvif.org/hardware/C5</d:Scopes>"
    "<d:XAddrs>{addresses}</d:XAddrs></d:ProbeMatch></d:ProbeMatches></e:Body></e:Envelope>"
)


@contextmanager
def responder(answers: Callable[[str], list[bytes]]) -> Iterator[tuple[int, list[str]]]:
    """Answer probes of WS-Discovery by their ids; give the port, and the ids so far."""
    asked: list[str] = []
    group, here = "239.255.255.250", socket.inet_aton("127.0.0.1")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reply,
    ):
        opened.bind((group, 0))
        membership = struct.pack("4s4s", socket.inet_aton(group), here)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        reply.bind(("127.0.0.1", 0))

        def serve() -> None:
            while (received := opened.recvfrom(65536))[0] != b"end":
                found = re.search(r"MessageID>([^<]+)<", received[0].decode())
                assert found is not None
                asked.append(found[1])
                for answer in answers(found[1]):
                    reply.sendto(answer, received[1])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield opened.getsockname()[1], asked
        finally:
            reply.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
            reply.sendto(b"end", (group, opened.getsockname()[1]))
            thread.join()
