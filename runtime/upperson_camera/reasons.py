"""Why a source does not open, asked of the server itself, for OpenCV and FFmpeg hardly say.

A reason is an `InputError` with a code, such as ``host_unknown``, ``connection_refused``,
``credentials_missing`` or ``certificate_untrusted``; `not_opened` adds the source to it.
"""

import base64
import errno
import http.client
import os
import re
import socket
import ssl
import urllib.request
from email import message_from_string
from email.message import Message
from types import SimpleNamespace
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from upperson_camera.access import PORTS, USUAL_ACCESS, Access, place_of, without_login
from upperson_network.remote import http_target, http_within, may_hide_login, within
from upperson_rt.errors import InputError
from upperson_rt.printable import one_line, shortened

__all__ = ["answer_challenge", "not_opened", "reason_of_address", "reason_of_device"]

_LONGEST_S = 3.0
_LONGEST_ANSWER_BYTES = 65536
_HEADER = re.compile(r"[!-9;-~]+:|[ \t]")
"""A line of a header, or one that goes on with the line before."""
_NO_VIDEO = ("text/", "application/json", "image/svg")

_STATUS = {
    401: ("credentials_{state}", "user name and password are {state}"),
    403: ("forbidden", "it forbids that"),
    404: ("stream_not_found", "it has no such stream: check the path"),
    454: ("session_unknown", "it knows no such session"),
    461: ("transport_not_offered", "it does not offer this transport"),
    503: ("server_busy", "it is busy or has too many clients"),
}


def not_opened(source: str, reason: InputError) -> InputError:
    """Return the error of a source that does not open, with the reason's code and fields."""
    return InputError(
        f"cannot open {source}: {reason}", code=reason.code, source=source, **reason.fields
    )


def reason_of_device(number: int) -> InputError:
    """Return why the device ``/dev/videoN`` does not open."""
    path = f"/dev/video{number}"
    if not os.path.exists(path):
        return _reason(
            "device_not_found", "there is no such device: plug the camera in, or name another"
        )
    if not os.access(path, os.R_OK | os.W_OK):
        return _reason(
            "device_forbidden",
            "it may not be read: add the user to the group that owns it, mostly  video",
        )
    return _reason("device_busy", "it is in use or gives no pictures")


def reason_of_address(
    address: str, timeout_s: float, access: Access = USUAL_ACCESS
) -> InputError | None:
    """Return why an address does not open, without its secrets; None if the server does not say.

    It asks the server once more, and again with credentials if the server wants them. Look-up,
    connection and answer take 3 seconds at most. It follows no redirect.
    """
    timeout_s = min(timeout_s, _LONGEST_S)
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
        if may_hide_login(address):
            raise ValueError
    except ValueError:  # Its message holds a part of the address.
        return _malformed(": its host or port cannot be read")
    scheme = parts.scheme.lower()
    if host is None or scheme not in PORTS:
        return None
    place = f"{host} port {port or PORTS[scheme]}"
    context = access.context() if scheme.endswith("s") else None
    try:
        if scheme in ("rtsp", "rtsps"):
            return _ask_rtsp(parts, place, timeout_s, context)
        if scheme in ("http", "https"):
            return _ask_http(parts, timeout_s, context)
        with within(timeout_s) as limit:
            limit.connect(host, port or PORTS[scheme], context)
    except http.client.InvalidURL:
        return _malformed(": write %20 for a blank in it")
    except UnicodeError as error:
        return _malformed(f" ({error})")
    except (OSError, http.client.HTTPException) as error:
        return _reason_of_failure(error, host, place)
    return None


def _reason(code: str, text: str, **fields: object) -> InputError:
    return InputError(text, code=code, **fields)


def _malformed(how: str) -> InputError:
    return _reason("address_malformed", f"the address is malformed{how}")


def _reason_of_failure(error: Exception, host: str, place: str) -> InputError:
    if isinstance(error, socket.gaierror):
        return _reason(
            "host_unknown", f"the host '{host}' is unknown ({error.strerror})", host=host
        )
    if isinstance(error, TimeoutError):
        return _reason("no_answer", f"{place} does not answer", place=place)
    if isinstance(error, ConnectionRefusedError):
        text = f"{place} refuses connections: nothing listens there"
        return _reason("connection_refused", text, place=place)
    if isinstance(error, ssl.SSLCertVerificationError):
        return _reason(
            "certificate_untrusted",
            f"the certificate of {place} is not trusted ({one_line(error.verify_message)}): name "
            "the file of its authority with --ca, or accept any of this camera with --insecure",
            place=place,
        )
    if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return _reason("no_route", f"there is no way to {host} ({error.strerror})", host=host)
    text = f"{place} breaks off ({type(error).__name__})"
    return _reason("broke_off", text, place=place, error=type(error).__name__)


def _refusal(status: int, phrase: str, headers: Message, parts: SplitResult) -> InputError | None:
    """Return what a status of RTSP or HTTP means; None if it is no refusal."""
    if status < 300:
        return None
    if status < 400:
        code, meaning = "redirected", _redirect(headers.get("Location"), parts)
    else:
        state = "missing" if parts.username is None else "wrong"
        code, meaning = (
            text.format(state=state)
            for text in _STATUS.get(status, ("server_error", "it does not say why"))
        )
    text = f"the server answers {status} {phrase}: {meaning}".replace(" :", ":")
    return _reason(code, text, status=status)


def _redirect(location: str | None, parts: SplitResult) -> str:
    """Return where a server redirects to, without what may be secret."""
    if location is None:
        return "it does not say where to"
    try:
        address = urljoin(without_login(parts), location)
        place = urlsplit(address)._replace(query="", fragment="")
        if may_hide_login(address):
            raise ValueError
    except ValueError:
        return "where it sends to cannot be read"
    return (
        f"it sends to {shortened(without_login(place))}, which does not open either: name that "
        "address to learn why"
    )


def _unknown_challenge() -> InputError:
    return _reason(
        "challenge_unknown", "the server wants other credentials than Basic and Digest with MD5"
    )


def _credentials(parts: SplitResult) -> tuple[str, str] | None:
    if parts.username is None:
        return None
    return unquote(parts.username), unquote(parts.password or "")


def _ask_http(
    parts: SplitResult, timeout_s: float, context: ssl.SSLContext | None
) -> InputError | None:
    known, address = _credentials(parts), without_login(parts)
    status, headers = _get(address, timeout_s, None, context)
    if status == 401 and known is not None:
        challenges = headers.get_all("WWW-Authenticate", [])
        answer = answer_challenge(challenges, known, address, "GET", http_target(address))
        if answer is None:
            return _unknown_challenge()
        status, headers = _get(address, timeout_s, answer, context)
    kind = headers.get("Content-Type", "")
    if 200 <= status < 300 and kind.startswith(_NO_VIDEO):
        kind = kind.partition(";")[0]
        text = f"the server answers with {kind}, which is no video"
        return _reason("not_video", text, kind=kind)
    phrase = http.client.responses.get(status, "")  # Not the server's own, which may be anything.
    return _refusal(status, phrase, headers, parts)


def _get(
    address: str, timeout_s: float, authorization: str | None, context: ssl.SSLContext | None
) -> tuple[int, http.client.HTTPMessage]:
    """Return status and headers of an answer over HTTP."""
    headers = {} if authorization is None else {"Authorization": authorization}
    with http_within(timeout_s, address, context) as connection:
        connection.request("GET", http_target(address), headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers


def _ask_rtsp(
    parts: SplitResult, place: str, timeout_s: float, context: ssl.SSLContext | None
) -> InputError | None:
    """Ask for the description of a stream, as a player does first, with credentials if wanted."""
    known = _credentials(parts)
    address = without_login(parts)
    with within(timeout_s) as limit:
        connection = limit.connect(*place_of(parts), context)
        head = _describe(connection, address, 1, None)
        if head is not None and head[0] == 401 and known is not None:
            challenges = head[2].get_all("WWW-Authenticate", [])
            answer = answer_challenge(challenges, known, address, "DESCRIBE", address)
            if answer is None:
                return _unknown_challenge()
            head = _describe(connection, address, 2, answer)
    if head is None:
        return _reason("not_rtsp", f"{place} does not speak RTSP", place=place)
    return _refusal(*head, parts)


def _describe(
    connection: socket.socket, address: str, number: int, authorization: str | None
) -> tuple[int, str, Message] | None:
    """Return status, phrase and headers; None if the answer is no RTSP."""
    lines = [f"DESCRIBE {address} RTSP/1.0", f"CSeq: {number}", "Accept: application/sdp"]
    if authorization is not None:
        lines.append(f"Authorization: {authorization}")
    connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    answer = b""
    while b"\r\n\r\n" not in answer and len(answer) < _LONGEST_ANSWER_BYTES:
        received = connection.recv(4096)
        if not received:
            break
        answer += received
    head = answer.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    status = re.fullmatch(r"RTSP/\d\.\d (\d{3})\s*([\x20-\x7e]*)", head[0])
    if status is None:
        return None
    lines = [line for line in head[1:] if _HEADER.match(line)]  # Else all that follow are lost.
    return int(status[1]), status[2].strip(), message_from_string("\n".join(lines))


def answer_challenge(
    challenges: list[str], login: tuple[str, str], address: str, method: str, target: str
) -> str | None:
    """Return what to send as ``Authorization``, for Digest rather than Basic."""
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, address, *login)
    digest: Any = urllib.request.HTTPDigestAuthHandler(passwords)
    for challenge in sorted(challenges, key=str.lower, reverse=True):
        kind, _, values = challenge.partition(" ")
        if kind.lower() == "digest":
            request = SimpleNamespace(
                full_url=address, selector=target, data=None, get_method=lambda: method
            )
            try:
                fields = urllib.request.parse_keqv_list(urllib.request.parse_http_list(values))
                answer = digest.get_authorization(request, fields)
            except (ValueError, IndexError, OSError):
                # An algorithm or protection that is not known, or nonsense: perhaps another one is
                # offered. They come as URLError, an OSError, and of empty values as IndexError.
                continue
            if answer is not None:
                return f"Digest {answer}"
        if kind.lower() == "basic":
            return "Basic " + base64.b64encode(":".join(login).encode()).decode("ascii")
    return None
