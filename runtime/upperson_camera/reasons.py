"""Find out from the server why a source does not open; OpenCV and FFmpeg rarely report it.

A reason is an `InputError` with a code, such as ``host_unknown``, ``connection_refused``,
``credentials_missing`` or ``certificate_untrusted``; `not_opened` adds the source to it.
"""

import errno
import http.client
import os
import re
import socket
import ssl
from email import message_from_string
from email.message import Message
from urllib.parse import SplitResult, urljoin, urlsplit

from upperson_camera.access import (
    PORTS,
    USUAL_ACCESS,
    Access,
    answer_challenge,
    login_of,
    place_of,
    without_login,
)
from upperson_network.remote import http_target, http_within, may_hide_login, within
from upperson_rt.errors import InputError
from upperson_rt.printable import one_line, shortened

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
        text = "there is no such device: plug the camera in, or name another"
        return InputError(text, code="device_not_found")
    if not os.access(path, os.R_OK | os.W_OK):
        text = "it may not be read: add the user to the group that owns it, mostly  video"
        return InputError(text, code="device_forbidden")
    return InputError("it is in use or gives no pictures", code="device_busy")


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
        if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
            text = f"there is no way to {host} ({error.strerror})"
            return InputError(text, code="no_route", host=host)
        return reason_of_failure(error, host, place)
    return None


def _malformed(how: str) -> InputError:
    return InputError(f"the address is malformed{how}", code="address_malformed")


def reason_of_failure(error: Exception, host: str, place: str) -> InputError:
    """Return why a connection failed, to a host and, as a user reads it, a place there."""
    if isinstance(error, socket.gaierror):
        text = f"the host '{host}' is unknown ({error.strerror})"
        return InputError(text, code="host_unknown", host=host)
    if isinstance(error, TimeoutError):
        return InputError(f"{place} does not answer", code="no_answer", place=place)
    if isinstance(error, ConnectionRefusedError):
        text = f"{place} refuses connections: nothing listens there"
        return InputError(text, code="connection_refused", place=place)
    if isinstance(error, ssl.SSLCertVerificationError):
        text = (
            f"the certificate of {place} is not trusted ({one_line(error.verify_message)}): name "
            "the file of its authority with --ca, or accept any of this camera with --insecure"
        )
        return InputError(text, code="certificate_untrusted", place=place)
    kind = type(error).__name__
    return InputError(f"{place} breaks off ({kind})", code="broke_off", place=place, error=kind)


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
    return InputError(text, code=code, status=status)


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
    text = "the server wants other credentials than Basic and Digest with MD5"
    return InputError(text, code="challenge_unknown")


def _ask_http(
    parts: SplitResult, timeout_s: float, context: ssl.SSLContext | None
) -> InputError | None:
    def get(**headers: str) -> tuple[int, http.client.HTTPMessage]:
        with http_within(timeout_s, address, context) as connection:
            connection.request("GET", target, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers

    login, address = login_of(parts), without_login(parts)
    target = http_target(address)
    status, headers = get()
    if status == 401 and login is not None:
        challenges = headers.get_all("WWW-Authenticate", [])
        answer = answer_challenge(challenges, login, address, "GET", target)
        if answer is None:
            return _unknown_challenge()
        status, headers = get(Authorization=answer)
    kind = headers.get("Content-Type", "")
    if 200 <= status < 300 and kind.startswith(_NO_VIDEO):
        kind = kind.partition(";")[0]
        text = f"the server answers with {kind}, which is no video"
        return InputError(text, code="not_video", kind=kind)
    phrase = http.client.responses.get(status, "")  # Not the server's own, which may be anything.
    return _refusal(status, phrase, headers, parts)


def _ask_rtsp(
    parts: SplitResult, place: str, timeout_s: float, context: ssl.SSLContext | None
) -> InputError | None:
    """Ask for the description of a stream, as a player does first, with credentials if wanted."""
    login, address = login_of(parts), without_login(parts)
    with within(timeout_s) as limit:
        connection = limit.connect(*place_of(parts), context)
        head = _describe(connection, address, 1, None)
        if head is not None and head[0] == 401 and login is not None:
            challenges = head[2].get_all("WWW-Authenticate", [])
            answer = answer_challenge(challenges, login, address, "DESCRIBE", address)
            if answer is None:
                return _unknown_challenge()
            head = _describe(connection, address, 2, answer)
    if head is None:
        return InputError(f"{place} does not speak RTSP", code="not_rtsp", place=place)
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
