"""One call of an ONVIF device: SOAP 1.2 with WS-Security, over HTTP.

A device is not trusted: its time and its answers are bounded, and it cannot redirect. A password is
never sent, only a digest of it.
"""

import base64
import datetime
import http.client
import secrets
import time
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser
from xml.sax.saxutils import escape, quoteattr

from upperson_camera.access import USUAL_ACCESS, Access, answer_challenge
from upperson_camera.reasons import reason_of_failure
from upperson_network.remote import http_target, http_within, password_digest
from upperson_rt.errors import InputError
from upperson_rt.printable import one_line, shortened

ENVELOPE = "http://www.w3.org/2003/05/soap-envelope"
_WSS = "http://docs.oasis-open.org/wss/2004/01/oasis-200401-wss"
_CALL_S = 5.0
_CALLS_S = 20.0
"""For all calls of one device together, except the last one."""
_MOST_BYTES = 2**20


class RefusedError(InputError):
    """A device answered with a refusal."""


class Caller:
    """Calls one device, with a login if any, and no other host."""

    def __init__(
        self, host: str, login: tuple[str, str] | None, access: Access = USUAL_ACCESS
    ) -> None:
        self.host, self.access = host, access
        self._login = login
        self._until = time.monotonic() + _CALLS_S
        self.clock_ahead_s = 0.0
        """How far the device's clock is ahead of ours: it refuses digests of another time."""

    def call(
        self, address: str, namespace: str, name: str, content: str = "", with_login: bool = True
    ) -> Element:
        """Call an operation of a service; return the body of the answer."""
        if time.monotonic() > self._until:
            text = f"it is too slow: it has {_CALLS_S:g} s for all calls"
            raise InputError(text, code="device_too_slow")
        if not is_http_of(address, self.host):
            text = f"it sends on to another place, {shortened(address)}"
            raise InputError(text, code="service_elsewhere")
        login = self._login if with_login else None
        token = "" if login is None else _username_token(*login, self.clock_ahead_s)
        envelope = (
            f'<?xml version="1.0" encoding="utf-8"?><s:Envelope xmlns:s="{ENVELOPE}">'
            f"<s:Header>{token}</s:Header><s:Body>"
            f"<m:{name} xmlns:m={quoteattr(namespace)}>{content}</m:{name}></s:Body></s:Envelope>"
        ).encode()
        reply = _post(address, envelope, None, self.access)
        if reply.status == 401:  # Some know the digest of HTTP only.
            digests = [one for one in reply.challenges if one.lower().startswith("digest")]
            answer = answer_challenge(digests, login, address, "POST", http_target(address))
            if answer is not None:
                reply = _post(address, envelope, answer, self.access)
        return _body_of(reply, login is not None)


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    challenges: list[str]
    content: bytes


def _username_token(user: str, password: str, clock_ahead_s: float) -> str:
    nonce = secrets.token_bytes(16)
    now = datetime.datetime.fromtimestamp(time.time() + clock_ahead_s, datetime.timezone.utc)
    created = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return (
        f'<w:Security s:mustUnderstand="1" xmlns:w="{_WSS}-wssecurity-secext-1.0.xsd" '
        f'xmlns:u="{_WSS}-wssecurity-utility-1.0.xsd"><w:UsernameToken>'
        f"<w:Username>{escape(user)}</w:Username>"
        f'<w:Password Type="{_WSS}-username-token-profile-1.0#PasswordDigest">'
        f"{password_digest(nonce, created, password)}</w:Password>"
        f'<w:Nonce EncodingType="{_WSS}-soap-message-security-1.0#Base64Binary">'
        f"{base64.b64encode(nonce).decode('ascii')}</w:Nonce>"
        f"<u:Created>{created}</u:Created></w:UsernameToken></w:Security>"
    )


def _post(address: str, envelope: bytes, authorization: str | None, access: Access) -> _Reply:
    """Send a request, without proxies and redirections: the device is on this very network."""
    headers = {"Content-Type": "application/soap+xml; charset=utf-8", "Connection": "close"}
    if authorization is not None:
        headers["Authorization"] = authorization
    parts = urlsplit(address)
    context = access.context(f"https://{parts.hostname}") if parts.scheme == "https" else None
    try:
        with http_within(_CALL_S, address, context) as connection:
            connection.request("POST", http_target(address), envelope, headers)
            answer = connection.getresponse()
            content = answer.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise InputError("its answer is longer than any", code="answer_too_long")
        challenges = answer.headers.get_all("WWW-Authenticate", [])
        return _Reply(answer.status, challenges, content)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise reason_of_failure(error, parts.hostname or "", shortened(address)) from error


def is_http_of(address: str, host: str) -> bool:
    """Return whether an address is one of HTTP on a host."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.hostname == host


def _body_of(reply: _Reply, has_login: bool) -> Element:
    state = "wrong" if has_login else "missing"
    if reply.status == 401:
        raise RefusedError(f"user name and password are {state}", code=f"credentials_{state}")
    try:
        body = next(iter(named(parse_xml(reply.content), "Body")), None)
        if body is None:
            raise ValueError("there is no body")
    except ValueError as error:
        text = f"it answers {reply.status} and no SOAP ({error})"
        raise InputError(text, code="not_soap", status=reply.status) from error
    for fault in named(body, "Fault"):
        values = [value.text or "" for value in named(fault, "Value")]
        if any(value.rpartition(":")[2].strip() == "NotAuthorized" for value in values):
            raise RefusedError(f"user name and password are {state}", code=f"credentials_{state}")
        text = shortened(one_line(child_text(fault, "Text") or "?"))
        raise RefusedError(f"it refuses: {text}", code="device_refuses")
    return body


def named(element: Element, name: str) -> list[Element]:
    """Return the elements below one that have a name, whatever their namespace."""
    return [found for found in element.iter() if found.tag.rpartition("}")[2] == name]


def child_text(element: Element, name: str) -> str | None:
    """Return the text of the first element of a name; None if there is none, or it is empty."""
    texts = [(found.text or "").strip() for found in named(element, name)]
    return next((text for text in texts if text), None)


class _Builder(TreeBuilder):
    def doctype(self, *_: object) -> NoReturn:
        raise ValueError("a document type is not taken")


def parse_xml(content: bytes | bytearray) -> Element:
    """Return the root of a message.

    Entities, the bombs made of them and files from elsewhere all need a document type, and no
    message of SOAP has one. The caller bounds the length of what it gives.

    Raises:
        ValueError: It is no XML, or has a document type.
    """
    if b"<!DOCTYPE" in content:  # Before the parser sees it, which would read on after an error.
        raise ValueError("a document type is not taken")
    parser = XMLParser(target=_Builder())
    try:
        parser.feed(content)
        root: Element = parser.close()
    except ParseError as error:
        raise ValueError(f"it is not well-formed: {error}") from error
    except LookupError as error:
        raise ValueError("its encoding is unknown") from error
    return root
