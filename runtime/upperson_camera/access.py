"""Which addresses a camera's stream may open, with which login and which certificates."""

import base64
import ssl
import string
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from upperson_rt.errors import InputError
from upperson_rt.printable import get_logger, shortened

_log = get_logger(__name__)

PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443, "rtmp": 1935, "rtmps": 443}
"""Of the schemes whose servers are reached over TCP."""
MOST_REDIRECTS = 5
_WITH_TLS = {"rtsp": "rtsps", "http": "https"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Which hosts a camera may redirect to, and which certificates are trusted."""

    ca_file: Path | None = None
    """Certificates of authorities in PEM that are trusted, too, besides those of the system."""
    insecure: bool = False
    """Accept any certificate; each connection is logged."""
    allowed_hosts: frozenset[str] = frozenset()
    """Hosts besides the camera's own that redirects and playlists may name, in lower case."""

    def context(self, logged_as: str | None = None) -> ssl.SSLContext:
        """Return what a TLS connection verifies; one that verifies nothing is logged by a name."""
        context = ssl.create_default_context()
        if self.insecure and logged_as is not None:
            text = "%s: the certificate is not verified, as --insecure says"
            _log.warning(text, logged_as, extra={"event": "insecure"})
        if self.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        elif self.ca_file is not None:
            try:
                context.load_verify_locations(self.ca_file)
            except OSError as error:  # Of which ssl.SSLError is one.
                why = error.strerror or type(error).__name__
                text = f"{self.ca_file} holds no certificates that can be read, expected PEM: {why}"
                raise InputError(text, code="ca_unreadable", path=self.ca_file) from error
        return context


USUAL_ACCESS = Access()


def place_of(parts: SplitResult) -> tuple[str, int]:
    """Return host and port of an address."""
    return parts.hostname or "", parts.port or PORTS.get(parts.scheme, 0)


def escaped(address: str) -> str:
    """Return an address with escapes for blanks and letters that no request may have."""
    parts = urlsplit(address)
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return parts._replace(path=path, query=query, fragment="").geturl()


def without_login(parts: SplitResult) -> str:
    """Return an address without user name and password."""
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def login_of(parts: SplitResult) -> tuple[str, str] | None:
    """Return user name and password of an address; None if it has none."""
    if parts.username is None:
        return None
    return unquote(parts.username), unquote(parts.password or "")


def answer_challenge(
    challenges: list[str], login: tuple[str, str] | None, address: str, method: str, target: str
) -> str | None:
    """Return what to send as ``Authorization``, for Digest rather than Basic; None if nothing."""
    if login is None:
        return None
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, address, *login)
    digest: Any = urllib.request.HTTPDigestAuthHandler(passwords)
    request = SimpleNamespace(
        full_url=address, selector=target, data=None, get_method=lambda: method
    )
    for challenge in sorted(challenges, key=str.lower, reverse=True):
        kind, _, values = challenge.partition(" ")
        if kind.lower() == "basic":
            return "Basic " + base64.b64encode(":".join(login).encode()).decode("ascii")
        if kind.lower() != "digest":
            continue
        try:
            fields = urllib.request.parse_keqv_list(urllib.request.parse_http_list(values))
            answer = digest.get_authorization(request, fields)
        except (ValueError, IndexError, OSError):
            # An algorithm or protection that is not known, or nonsense: perhaps another one is
            # offered. They come as URLError, an OSError, and of empty values as IndexError.
            continue
        if answer is not None:
            return f"Digest {answer}"
    return None


def target_of(
    address: str, location: str, base: str | None, access: Access, *, redirects: int = 0
) -> str:
    """Return the address that a camera redirects to, if it may be opened.

    It has the camera's login only if it is of the same scheme, host and port, or the same host with
    TLS, both at their usual ports. A login that the camera names is left out.

    Args:
        address: Of the camera as the user named it, perhaps with a login.
        location: Of a redirect, or of a file that a playlist names; may be relative.
        base: What a relative one is relative to; None for the camera's own address.
        access: Of this camera.
        redirects: How many there were before.
    """
    own = urlsplit(address)
    try:
        found = urlsplit(_joined(without_login(urlsplit(base or address)), location))
        host, port = place_of(found)
    except ValueError:
        text = "it sends to an address that cannot be read"
        raise InputError(text, code="redirect_unreadable") from None
    secure = _WITH_TLS.get(own.scheme, own.scheme)
    if found.scheme not in (own.scheme, secure) or not host:
        text = (
            f"it sends to an address of {shortened(found.scheme or '?')}:, and a stream of "
            f"{own.scheme}: goes on with {' or '.join(dict.fromkeys((own.scheme, secure)))} only"
        )
        raise InputError(text, code="redirect_to_other_protocol", scheme=found.scheme)
    if host != own.hostname and host not in access.allowed_hosts:
        text = (
            f"it sends to another host, {shortened(host)}: if that is right, name it with "
            "--allow-host, or as the camera's address"
        )
        raise InputError(text, code="redirect_to_other_host", host=host)
    if redirects >= MOST_REDIRECTS:
        raise InputError(f"it sends on more than {MOST_REDIRECTS} times", code="too_many_redirects")
    own_port = place_of(own)[1]
    places = {(own.hostname, own.scheme, own_port)}
    if own_port == PORTS[own.scheme]:
        places.add((own.hostname, secure, PORTS[secure]))
    login, at, _ = own.netloc.rpartition("@")
    there = found.netloc.rpartition("@")[2]
    if (host, found.scheme, port) in places:
        there = f"{login}{at}{there}"
    return found._replace(netloc=there, fragment="").geturl()


def _joined(base: str, location: str) -> str:
    """Join as `urljoin` does, which knows ``rtsps`` only in newer versions of Python."""
    if urlsplit(location).scheme:
        return location
    parts = urlsplit(base)
    joined = urljoin(parts._replace(scheme="http").geturl(), location)
    return urlsplit(joined)._replace(scheme=parts.scheme).geturl()
