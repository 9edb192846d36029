"""Who asks and may do what: tokens, which are stored hashed, roles, and sessions of browsers."""

import hashlib
import hmac
import json
import secrets
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

from fastapi import Depends, Request

from upperson_rt.arguments import check_name
from upperson_rt.errors import InputError, UsageError
from upperson_rt.files import write_atomically
from upperson_rt.gallery import Filter
from upperson_rt.serve.problems import ProblemError
from upperson_rt.strict import Constraint, Sha256, read_fields, read_json, require_version

__all__ = [
    "COOKIE",
    "ROLES",
    "Access",
    "Account",
    "Accounts",
    "Role",
    "Sessions",
    "add_token",
    "read_listed",
]

T = TypeVar("T")
Role: TypeAlias = Literal["viewer", "operator", "admin"]
"""Each may do what those before may: search; mark and export; delete and prune."""

ROLES: tuple[Role, ...] = get_args(Role)
_VERSION = 1
_KINDS = {"tokens": ("tokens of the console", ""), "onvif_users": ("ONVIF users", " --onvif")}
"""By the key of its list: what a file holds, and how  upperson-rt token  is told to write it."""
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
class _Token:
    """A line of a token file."""

    name: str
    role: Role
    sha256: Sha256
    """Of the token. It is random and long, so one round of a fast hash is enough."""
    cameras: Annotated[
        tuple[str, ...], Constraint(lambda names: bool(names), "at least one camera")
    ] | None = None  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _TokenFile:
    schema_version: int
    tokens: tuple[_Token, ...]


class Accounts:
    """Those whom a token file names."""

    def __init__(self, path: Path) -> None:
        """Read a token file, as `add_token` writes it.

        Raises:
            InputError: It cannot be read, is malformed, or names nobody.
        """
        self._tokens = _read(path)
        if not self._tokens:
            raise InputError(
                f"{path} names nobody: add somebody with  upperson-rt token {path} NAME"
            )

    def of_token(self, token: str) -> Account | None:
        """Return whose token it is; takes as long for a wrong one as for any other."""
        digest = _digest(token)
        found = None
        for known in self._tokens:
            if hmac.compare_digest(known.sha256, digest):
                found = known
        if found is None:
            return None
        return Account(name=found.name, role=found.role, cameras=found.cameras)


def add_token(path: Path, name: str, role: Role, cameras: tuple[str, ...] | None) -> str:
    """Put somebody into a token file, which is made if need be, and return the new token.

    An earlier token of the same name is replaced. The token itself is not stored.

    Raises:
        InputError: The file is malformed or cannot be written.
        UsageError: Cameras for a role that sees all of them.
    """
    check_name(name, "the name of an account", UsageError)
    if cameras is not None and role != "viewer":
        raise UsageError(f"an {role} sees all cameras: leave --camera out, or make it a viewer")
    token = secrets.token_urlsafe(32)
    others = tuple(known for known in _read(path) if known.name != name) if path.exists() else ()
    made = _Token(name=name, role=role, sha256=_digest(token), cameras=cameras)
    content = asdict(_TokenFile(schema_version=_VERSION, tokens=(*others, made)))
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    return token


class Sessions:
    """Browsers that are logged in. They are kept in memory: a restart logs everybody out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Account, float]] = {}

    def begin(self, account: Account) -> str:
        """Return the value of a new session's cookie."""
        value = secrets.token_urlsafe(32)
        with self._lock:
            now = time.monotonic()
            self._known = {
                digest: session for digest, session in self._known.items() if session[1] > now
            }
            while len(self._known) >= _MOST_SESSIONS:
                del self._known[next(iter(self._known))]
            self._known[_digest(value)] = account, now + _SESSION_S
        return value

    def find(self, value: str) -> Account | None:
        """Return whose session it is, as long as it lasts."""
        with self._lock:
            account, until = self._known.get(_digest(value), (None, 0.0))
        return account if until > time.monotonic() else None

    def end(self, value: str) -> None:
        """Forget a session."""
        with self._lock:
            self._known.pop(_digest(value), None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_listed(path: Path, kind: type[T], key: str) -> T:
    """Read a file that lists who may do what.

    Args:
        path: The file.
        kind: What it holds.
        key: Of `_KINDS`, where the list stands in it.

    Raises:
        InputError: It cannot be read, is malformed, or lists something else.
    """
    what, option = _KINDS[key]
    expected = f"expected {what}, as  upperson-rt token FILE NAME{option}  writes them"
    try:
        content = read_json(path)
    except InputError as error:
        raise InputError(str(error) if not path.is_file() else f"{error}; {expected}") from error
    if not isinstance(content, dict) or key not in content:
        others = [other for other in _KINDS if isinstance(content, dict) and other in content]
        found = _KINDS[others[0]][0] if others else "something else"
        raise InputError(f"{path} holds {found}, {expected}: name another file")
    require_version(content, str(path), (_VERSION,), "update upperson-rt")
    return read_fields(kind, content, str(path))


def _read(path: Path) -> tuple[_Token, ...]:
    return read_listed(path, _TokenFile, "tokens").tokens


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
        return None if value is None else self.sessions.find(value)

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
