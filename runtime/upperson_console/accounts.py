"""Who asks and may do what: tokens, which are stored hashed, roles, and sessions of browsers."""

import hashlib
import hmac
import secrets
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from fastapi import Depends, Request

from upperson_console.credentials import (
    Credential,
    Followed,
    change_listed,
    put,
    read_listed,
    revoke,
)
from upperson_console.problems import ProblemError
from upperson_rt.arguments import check_name
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter
from upperson_rt.strict import Sha256

__all__ = [
    "COOKIE",
    "ROLES",
    "Access",
    "Account",
    "Accounts",
    "Role",
    "Sessions",
    "add_token",
    "read_tokens",
    "revoke_token",
]

Role: TypeAlias = Literal["viewer", "operator", "admin"]
"""Each may do what those before may: search; mark and export; delete and prune."""

ROLES: tuple[Role, ...] = get_args(Role)
_SESSION_S = 12 * 3600.0
_MOST_SESSIONS = 1000


@dataclass(frozen=True, kw_only=True)
class Account:
    """Somebody who uses the console."""

    name: str
    """Stands in the log."""
    role: Role
    cameras: tuple[str, ...] | None = None
    """The cameras whose pictures a viewer may see; None for all, those without a camera, too."""
    logs_in: bool = True
    """Whether it has a token; whoever sits at the machine needs none."""

    def may(self, role: Role) -> bool:
        """Whether this account may do what a role may."""
        return ROLES.index(self.role) >= ROLES.index(role)

    def sees(self, camera: str | None) -> bool:
        """Whether this account may see pictures of a camera."""
        return self.cameras is None or camera in self.cameras

    def visible(self, where: Filter) -> Filter | None:
        """Return a filter without the cameras that this account may not see; None if none is left.

        What it may not see is as if it were not there.
        """
        if self.cameras is None:
            return where
        asked = self.cameras if where.cameras is None else where.cameras
        left = tuple(camera for camera in asked if camera in self.cameras)
        return replace(where, camera=left) if left else None


@dataclass(frozen=True, kw_only=True)
class Token(Credential):
    """A line of a token file."""

    role: Role
    sha256: Sha256
    """Of the token. It is random and long, so one round of a fast hash is enough."""


@dataclass(frozen=True, kw_only=True)
class _TokenFile:
    schema_version: int
    tokens: tuple[Token, ...]


class Accounts:
    """Those whom a token file names, as it is now: a change counts from the next request on."""

    def __init__(self, path: Path) -> None:
        """Read a token file, as `add_token` writes it.

        Raises:
            InputError: It cannot be read, is malformed, or names nobody.
        """
        if not read_tokens(path):
            raise InputError(
                f"{path} names nobody: add somebody with  upperson-rt token {path} NAME"
            )
        self._tokens = Followed(path, read_tokens)

    def of_token(self, token: str) -> Account | None:
        """Return whose token it is; takes as long for a wrong one as for any other."""
        return self.of_digest(digest_of(token))

    def of_digest(self, digest: str) -> Account | None:
        """Return whose token has a SHA-256, as long as the file has it and it has not expired."""
        found = None
        for known in self._tokens.entries():
            if hmac.compare_digest(known.sha256, digest):
                found = known
        if found is None:
            return None
        return Account(name=found.name, role=found.role, cameras=found.cameras)


def add_token(
    path: Path,
    name: str,
    role: Role,
    cameras: tuple[str, ...] | None,
    lasts_s: float | None = None,
) -> str:
    """Put an account into a token file, made if need be, and return the new token.

    An earlier token of the same name is replaced. The token itself is not stored.

    Args:
        path: The file.
        name: Of the account.
        role: What it may do.
        cameras: What a viewer may see; None for all.
        lasts_s: Seconds until the token expires; None for never.

    Raises:
        InputError: The file is malformed or cannot be written.
        UsageError: Cameras for a role that sees all of them.
    """
    check_name(name, "the name of an account", UsageError)
    if cameras is not None and role != "viewer":
        raise UsageError(f"an {role} sees all cameras: leave --camera out, or make it a viewer")
    token, now = secrets.token_urlsafe(32), time.time()
    made = Token(
        name=name,
        role=role,
        sha256=digest_of(token),
        cameras=cameras,
        created=now,
        expires=None if lasts_s is None else now + lasts_s,
    )
    change_listed(path, read_tokens, "tokens", lambda known: put(known, made))
    return token


def revoke_token(path: Path, name: str) -> None:
    """Remove an account from a token file.

    Raises:
        InputError: The file is malformed or cannot be written, or has no such account.
    """
    change_listed(path, read_tokens, "tokens", lambda known: revoke(known, name, path))


def read_tokens(path: Path) -> tuple[Token, ...]:
    """Read a token file.

    Raises:
        InputError: It cannot be read, or is malformed.
    """
    return read_listed(path, _TokenFile, "tokens").tokens


class Sessions:
    """Browsers that are logged in. They are kept in memory: a restart logs everybody out.

    A session stands for its token, and ends with that.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[str, float]] = {}

    def begin(self, token: str) -> str:
        """Return the value of the cookie of a new session with a token."""
        value = secrets.token_urlsafe(32)
        with self._lock:
            now = time.monotonic()
            self._known = {
                digest: session for digest, session in self._known.items() if session[1] > now
            }
            while len(self._known) >= _MOST_SESSIONS:
                del self._known[next(iter(self._known))]
            self._known[digest_of(value)] = digest_of(token), now + _SESSION_S
        return value

    def find(self, value: str) -> str | None:
        """Return the SHA-256 of a session's token, as long as the session lasts."""
        with self._lock:
            token, until = self._known.get(digest_of(value), (None, 0.0))
        return token if until > time.monotonic() else None

    def end(self, value: str) -> None:
        """Forget a session."""
        with self._lock:
            self._known.pop(digest_of(value), None)


def digest_of(text: str) -> str:
    """Return the SHA-256 of a token."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --- Who sends a request: by a token, by a session's cookie, or whoever sits at this machine

COOKIE = "upperson_session"


class Access:
    """Tells whose request it is."""

    def __init__(self, accounts: Accounts | None, local: Account) -> None:
        """Ask for tokens.

        Args:
            accounts: Those who have one; None asks for none.
            local: Who it is then.
        """
        self.accounts = accounts
        self.sessions = Sessions()
        self._local = local

    def find(self, request: Request) -> Account | None:
        """Return whose request it is, or None for nobody's."""
        if self.accounts is None:
            return self._local
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self.accounts.of_token(token.strip())
        value = request.cookies.get(COOKIE)
        digest = None if value is None else self.sessions.find(value)
        return None if digest is None else self.accounts.of_digest(digest)

    def needs(self, role: Role) -> Any:
        """Return the default of a route's account: one that may do what a role may."""

        async def account(request: Request) -> Account:  # No thread is waited for.
            found = self.find(request)
            if found is None:
                raise ProblemError(
                    401,
                    "log in, or send a token:  Authorization: Bearer TOKEN",
                    {"WWW-Authenticate": "Bearer"},
                )
            if not found.may(role):
                raise ProblemError(403, f"this needs the role {role}; {found.name} is {found.role}")
            return found

        return Depends(account)
