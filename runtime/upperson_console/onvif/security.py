"""ONVIF authentication: WS-Security UsernameToken with a digest, or HTTP Digest (RFC 7616).

Both prove knowledge of a password without sending it, so the server must store the password itself,
not a hash. So ONVIF has users with random passwords of their own, in a file that only its owner can
read; they give access to this search only. Tokens of the console are no ONVIF passwords.

To prevent replays, used nonces are remembered for as long as they are valid.
"""

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.request import parse_http_list, parse_keqv_list
from xml.etree.ElementTree import Element

from upperson_console.accounts import Account
from upperson_console.credentials import Credential, CredentialFile
from upperson_console.onvif.soap import WSSE, WSU, FaultError, child, unix_time
from upperson_network.remote import password_digest
from upperson_rt.errors import UsageError
from upperson_rt.printable import safe_repr
from upperson_rt.strict import Constraint

_REALM = "UP-Person Edge"
_WITHIN_S = 300.0
"""Allowed clock difference, and lifetime of a challenge."""
_MOST_REMEMBERED = 20_000
"""Nonces of one user within that time."""
_LONGEST_NONCE = 256
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
"""Names that all clients encode alike in both headers."""
_PASSWORD_TYPE = (
    "http://docs.oasis-open.org/wss/2004/01/oasis-200401-wss-username-token-profile-1.0"
    "#PasswordDigest"
)
_HASHES = {"SHA-256": hashlib.sha256, "MD5": hashlib.md5}
"""Algorithms of RFC 7616 in the order of preference; ONVIF requires both."""


@dataclass(frozen=True, kw_only=True)
class User(Credential):
    """An ONVIF user."""

    password: Annotated[str, Constraint(lambda text: len(text) >= 16, "at least 16 letters")]


@dataclass(frozen=True, kw_only=True)
class _UserFile:
    schema_version: int
    onvif_users: tuple[User, ...]


class Users(CredentialFile[User]):
    """The ONVIF users of a file; a change of the file counts from the next request on."""

    key = "onvif_users"
    content = _UserFile
    is_private = True
    _unused_password = secrets.token_urlsafe(18)

    def password(self, name: str) -> str:
        """Return a user's password; for an unknown name a random one."""
        user = self._find(name)
        return self._unused_password if user is None else user.password

    def account(self, name: str) -> Account | None:
        """Return the account of a user, or None."""
        user = self._find(name)
        if user is None:
            return None
        return Account(name=user.name, role="viewer", cameras=user.cameras)

    def _find(self, name: str) -> User | None:
        return {user.name: user for user in self.entries()}.get(name)


def add_user(
    path: Path, name: str, cameras: tuple[str, ...] | None, lasts_s: float | None = None
) -> str:
    """Add a user to a file, which is created if missing, and return the new password.

    An earlier password of the same name is replaced. It expires after ``lasts_s`` seconds, if
    given.

    Raises:
        InputError: The file is malformed or cannot be written.
        UsageError: The name cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "the name of an ONVIF user has 1 to 64 letters a-z, digits and ._@-, found "
            f"{safe_repr(name)}",
            code="onvif_name_invalid",
            found=name,
        )
    password, now = secrets.token_urlsafe(18), time.time()
    expires = None if lasts_s is None else now + lasts_s
    Users.put(
        path, User(name=name, password=password, cameras=cameras, created=now, expires=expires)
    )
    return password


class UnauthorizedError(FaultError):
    """A request without valid credentials."""

    def __init__(self, reason: str, challenges: Sequence[str] = (), *, problem: str) -> None:
        """Refuse a request, with values of ``WWW-Authenticate``.

        ``problem`` is a code for tests and logs, such as ``replayed``.
        """
        super().__init__("Sender", ("NotAuthorized",), reason)
        self.challenges = challenges
        self.problem = problem


class Authentication:
    """Authenticates requests. For one thread."""

    def __init__(self, users: Users, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._users = users
        self._key = secrets.token_bytes(32)
        self._used: dict[str, dict[bytes, float]] = {}

    def by_header(self, security: Element) -> Account:
        """Return the account of a WS-Security header; raises UnauthorizedError."""
        tokens = security.findall(f"{{{WSSE}}}UsernameToken")
        token = tokens[0] if len(tokens) == 1 else Element("none")
        name, password, nonce, created = (
            _text(token, *place)
            for place in ((WSSE, "Username"), (WSSE, "Password"), (WSSE, "Nonce"), (WSU, "Created"))
        )
        kind = child(token, WSSE, "Password")
        if not created or not nonce or kind is None or kind.get("Type") != _PASSWORD_TYPE:
            reason = "a UsernameToken needs Nonce, Created and a digest as Password"
            raise UnauthorizedError(reason, problem="malformed")
        try:
            given = base64.b64decode(nonce, validate=True)
            at = unix_time("Created", created)
        except (ValueError, FaultError) as error:
            reason = "nonce or time of the UsernameToken cannot be read"
            raise UnauthorizedError(reason, problem="malformed") from error
        made = password_digest(given, created, self._users.password(name))
        account = self._users.account(name)
        if account is None or not _equal(made, password):
            raise UnauthorizedError("name or password is not known", problem="unknown")
        if abs(self.clock() - at) > _WITHIN_S:
            reason = "the UsernameToken is too old or too new: ask GetSystemDateAndTime"
            raise UnauthorizedError(reason, problem="clock_differs")
        if len(given) > _LONGEST_NONCE or not self._first_time(name, given, at + _WITHIN_S):
            reason = "this UsernameToken was used before: make a new nonce"
            raise UnauthorizedError(reason, problem="replayed")
        return account

    def by_digest(self, header: str, method: str, target: str) -> Account:
        """Return the account of an ``Authorization: Digest`` header; raises UnauthorizedError.

        ``header`` is the text after the word Digest, ``target`` path and query as they were sent.
        """
        try:
            given = parse_keqv_list(parse_http_list(header))
            name, nonce, count = given["username"], given["nonce"], given["nc"]
            answer, client = given["response"].lower(), given["cnonce"]
            hashed = _HASHES[given.get("algorithm", "MD5").upper()]
            if given["qop"] != "auth" or given["realm"] != _REALM or given["uri"] != target:
                raise ValueError
        except (ValueError, KeyError, IndexError) as error:
            reason = "the Digest cannot be read, or is for another address"
            raise self.challenge(reason, problem="malformed") from error

        def of(*parts: str) -> str:
            return hashed(":".join(parts).encode(), usedforsecurity=False).hexdigest()

        known = of(name, _REALM, self._users.password(name))
        proof = of(known, nonce, count, client, "auth", of(method, target))
        start, _, seal = nonce.rpartition("-")
        account = self._users.account(name)
        if account is None or not _equal(proof, answer) or not _equal(self._sealed(start), seal):
            raise self.challenge("name or password is not known", problem="unknown")
        until = int(start.partition("-")[0], 16) + _WITHIN_S
        if until < self.clock():
            reason = "the nonce of the Digest is too old: take a new one"
            raise self.challenge(reason, problem="nonce_expired")
        if not self._first_time(name, f"{nonce} {count}".encode(), until):
            raise self.challenge("this Digest was used before: count up", problem="replayed")
        return account

    def challenge(self, reason: str, problem: str) -> UnauthorizedError:
        """Return a refusal with a challenge for each hash, all of the same nonce."""
        start = f"{int(self.clock()):x}-{secrets.token_hex(8)}"
        nonce = f"{start}-{self._sealed(start)}"
        stale = ", stale=true" if problem == "nonce_expired" else ""
        challenges = [
            f'Digest realm="{_REALM}", qop="auth", nonce="{nonce}", algorithm={name}{stale}'
            for name in _HASHES
        ]
        return UnauthorizedError(reason, challenges, problem=problem)

    def _sealed(self, start: str) -> str:
        return hmac.digest(self._key, start.encode(), "sha256").hex()[:32]

    def _first_time(self, name: str, what: bytes, until: float) -> bool:
        """Return whether a user sends a nonce for the first time, and remember it until its end."""
        used = self._used.setdefault(name, {})
        if what in used:
            return False
        if len(used) >= _MOST_REMEMBERED:
            now = self.clock()
            used = self._used[name] = {one: end for one, end in used.items() if end >= now}
        if len(used) >= _MOST_REMEMBERED:
            raise FaultError(
                "Receiver", ("Action",), "too many requests of one user: try again in some minutes"
            )
        used[what] = until
        return True


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _text(parent: Element, namespace: str, name: str) -> str:
    found = child(parent, namespace, name)
    return "" if found is None else (found.text or "").strip()
