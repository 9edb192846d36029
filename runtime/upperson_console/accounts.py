"""Accounts of the console: tokens (stored as hashes), roles, and browser sessions."""

import hashlib
import hmac
import re
import secrets
import threading
import time
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from fastapi import Depends, Request, Response
from starlette.datastructures import URL

from upperson_console.credentials import Credential, CredentialFile
from upperson_console.oversight import PURPOSE_COOKIE, Context, Oversight
from upperson_console.problems import ProblemError
from upperson_rt.arguments import check_name
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter
from upperson_rt.printable import safe_repr
from upperson_rt.strict import Sha256

Role: TypeAlias = Literal["viewer", "operator", "admin"]
"""Each may also do what those before it may: search; mark, export and change alerts; delete and
prune."""

ROLES: tuple[Role, ...] = get_args(Role)
BIN_USER = "(bin)"
"""User of the log's lines for what the server deletes from the bin; no account gets this name."""
_SESSION_S = 12 * 3600.0
_MOST_SESSIONS = 1000
_MOST_SESSIONS_EACH = 20
"""Of one token."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """A user of the console: a person or a program."""

    name: str
    """As it stands in the query log."""
    role: Role
    cameras: tuple[str, ...] | None = None
    """The cameras whose pictures a viewer or operator may see; None for all, and for pictures
    without a camera."""
    logs_in: bool = True
    """Whether it has a token; the user at this machine needs none."""
    created: float | None = field(default=None, compare=False)
    """See `Token.created`."""
    context: Context = field(default_factory=Context, compare=False)
    """What the query log says of its request."""
    sees_approvals: bool = field(default=False, compare=False)
    """Whether a second person approves some actions, and this one may ask for them."""

    def may(self, role: Role) -> bool:
        """Return whether this account has the rights of a role."""
        return ROLES.index(self.role) >= ROLES.index(role)

    def sees(self, camera: str | None) -> bool:
        """Return whether this account may see pictures of a camera."""
        return self.cameras is None or camera in self.cameras

    def path(self, text: str | None) -> str | None:
        """Return a path or address; its last part alone, unless for an administrator."""
        return text if text is None or self.may("admin") else re.split(r"[/\\]", text)[-1]

    def visible(self, where: Filter) -> Filter | None:
        """Return a filter without the cameras that this account may not see; None if none is left.

        Hidden cameras look as if they did not exist.
        """
        if self.cameras is None:
            return where
        wanted = self.cameras if where.cameras is None else where.cameras
        left = tuple(camera for camera in wanted if camera in self.cameras)
        return replace(where, camera=left) if left else None


@dataclass(frozen=True, kw_only=True)
class Token(Credential):
    """An entry of a token file."""

    role: Role
    sha256: Sha256
    """Of the token, which is random and long: one round of a fast hash is enough."""


@dataclass(frozen=True, kw_only=True)
class _TokenFile:
    schema_version: int
    tokens: tuple[Token, ...]


class Accounts(CredentialFile[Token]):
    """The accounts of a token file; a change of the file counts from the next request on."""

    key = "tokens"
    content = _TokenFile

    def of_token(self, token: str) -> Account | None:
        """Return the account of a token, in a time that does not depend on the token."""
        return self.of_digest(digest_of(token))

    def of_digest(self, digest: str) -> Account | None:
        """Return the account whose token has a SHA-256, unless it was revoked or has expired."""
        account = None
        for known in self.entries():
            if hmac.compare_digest(known.sha256, digest):
                account = _account(known)
        return account

    def of_name(self, name: str) -> Account | None:
        """Return the account of a name, unless it was revoked or has expired."""
        return next((_account(known) for known in self.entries() if known.name == name), None)


def _account(known: Token) -> Account:
    return Account(name=known.name, role=known.role, cameras=known.cameras, created=known.created)


def add_token(
    path: Path,
    name: str,
    role: Role,
    cameras: tuple[str, ...] | None,
    lasts_s: float | None = None,
) -> str:
    """Add an account to a token file, which is created if missing, and return the new token.

    An earlier token of the same name is replaced. Only the hash of the token is stored. It expires
    after ``lasts_s`` seconds, if given.

    Raises:
        InputError: The file is malformed or cannot be written.
        UsageError: As `check_account` and `check_new_name`.
    """
    expires = None if lasts_s is None else time.time() + lasts_s
    check_new_name(name, Accounts.read(path) if path.exists() else ())
    entry, token = new_token(name, role, cameras, expires)
    Accounts.put(path, entry)
    return token


def new_token(
    name: str, role: Role, cameras: tuple[str, ...] | None, expires: float | None
) -> tuple[Token, str]:
    """Return the entry of a new token, and the token; raises UsageError, see `check_account`.

    ``expires`` is in unix seconds.
    """
    token = secrets.token_urlsafe(32)
    entry = Token(
        name=name,
        role=role,
        sha256=digest_of(token),
        cameras=cameras,
        created=time.time(),
        expires=expires,
    )
    check_account(entry)
    return entry, token


def check_new_name(name: str, known: Iterable[Token]) -> None:
    """Raise UsageError for a new name that looks like one of the known accounts."""
    names = {one.name for one in known}
    if name in names:
        return
    if not name.isprintable():
        what = f"the name {safe_repr(name)} holds characters that are not shown"
        raise UsageError(f"{what}: choose another name", code="name_not_printable")
    if _folded(name) == BIN_USER:
        what = f"{BIN_USER} stands in the log for what the server deletes itself"
        raise UsageError(f"{what}: choose another name", code="name_reserved")
    same = next((one for one in names if _folded(one) == _folded(name)), None)
    if same is not None:
        what = f"there is an account {safe_repr(same)}, which reads the same"
        raise UsageError(f"{what}: choose another name", code="account_exists")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().casefold()


def check_account(entry: Token) -> None:
    """Raise UsageError for a malformed name, or an administrator who is limited to cameras."""
    check_name(entry.name, "the name of an account", UsageError)
    if entry.cameras is not None and entry.role == "admin":
        raise UsageError(
            "an admin sees all cameras: leave them out, or make it an operator or a viewer",
            code="admin_sees_all",
        )


class BrowserSessions:
    """Sessions of logged-in browsers, in memory: a restart logs all of them out.

    A session ends with its token.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[str, float]] = {}

    def begin(self, token: str) -> str:
        """Begin a session for a token; return the value of its cookie."""
        value = secrets.token_urlsafe(32)
        with self._lock:
            now = time.monotonic()
            self._known = {
                digest: session for digest, session in self._known.items() if session[1] > now
            }
            own = [digest for digest, one in self._known.items() if one[0] == digest_of(token)]
            if len(own) >= _MOST_SESSIONS_EACH:
                del self._known[own[0]]
            elif len(self._known) >= _MOST_SESSIONS:
                del self._known[next(iter(self._known))]
            self._known[digest_of(value)] = digest_of(token), now + _SESSION_S
        return value

    def find(self, value: str) -> str | None:
        """Return the SHA-256 of a session's token; None after the session has ended."""
        with self._lock:
            token, until = self._known.get(digest_of(value), (None, 0.0))
        return token if until > time.monotonic() else None

    def end(self, value: str) -> None:
        """End a session."""
        with self._lock:
            self._known.pop(digest_of(value), None)


def digest_of(text: str) -> str:
    """Return the SHA-256 of a token."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --- Authentication of a request: a token, a session cookie, or none on this machine alone

COOKIE = "upperson_session"
_OF_PROGRAMS = ("/api/", "/v1/")
_EVENTS = "text/event-stream"


def is_of_programs(request: Request) -> bool:
    """Return whether a request gets problem+json, not a page."""
    if request.headers.get("accept") == _EVENTS:  # An EventSource cannot show a page.
        return True
    opens = request.headers.get("sec-fetch-mode") == "navigate"
    return request.url.path.startswith(_OF_PROGRAMS) and not opens


def login_place(request: Request, form: str = "/login") -> str:
    """Return the address of the login or another form, which leads back to a request's page."""
    back = request.url
    if request.method not in ("GET", "HEAD"):  # Its form cannot be sent again.
        back = URL(request.headers.get("referer", ""))
        if back.netloc != request.url.netloc:
            back = URL("/")
    place = f"{back.path}?{back.query}".rstrip("?")
    return str(URL(form).include_query_params(next=place))


class Access:
    """Authenticates requests."""

    def __init__(
        self, accounts: Accounts | None, local: Account, oversight: Oversight | None = None
    ) -> None:
        """Authenticate by tokens; without accounts every request is of the ``local`` one."""
        self.accounts = accounts
        self.oversight = oversight or Oversight()
        self.sessions = BrowserSessions()
        self._local = local

    def find(self, request: Request) -> Account | None:
        """Return the account of a request; None if it has no valid token or session."""
        found = self._authenticated(request)
        if found is None:
            return None
        cookie, headers = request.cookies.get(PURPOSE_COOKIE), request.headers
        context = self.oversight.context(found.name, address_of(request), headers, cookie)
        sees = bool(self.oversight.two_persons) and found.may("operator")
        return replace(found, context=context, sees_approvals=sees)

    def of_name(self, name: str | None) -> Account | None:
        """Return the account of a name as it is now; None without accounts."""
        return None if self.accounts is None or name is None else self.accounts.of_name(name)

    def _authenticated(self, request: Request) -> Account | None:
        if self.accounts is None:
            return self._local
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self.accounts.of_token(token.strip())
        value = request.cookies.get(COOKIE)
        digest = None if value is None else self.sessions.find(value)
        return None if digest is None else self.accounts.of_digest(digest)

    @staticmethod
    def set_cookie(response: Response, request: Request, name: str, value: str) -> None:
        """Set a cookie of the browser's session."""
        is_secure = request.url.scheme == "https"
        response.set_cookie(name, value, httponly=True, samesite="strict", secure=is_secure)

    def needs(self, role: Role, purpose: bool = True) -> Any:
        """Return the dependency of a route that needs a role, and a purpose if users state one."""

        async def account(request: Request) -> Account:  # Async, so that it takes no thread.
            found = self.find(request)
            if found is None:
                what = "log in, or send a token:  Authorization: Bearer TOKEN"
                raise ProblemError(401, what, {"WWW-Authenticate": "Bearer"})
            if not found.may(role):
                what = f"this needs the role {role}; {found.name} is {found.role}"
                raise ProblemError(403, what, code="role_missing")
            if purpose:
                self.oversight.require_purpose(found.context)
            return found

        return Depends(account)


def address_of(request: Request) -> str | None:
    """Return the client's address; uvicorn takes that which a proxy on this machine forwards."""
    return None if request.client is None else request.client.host
