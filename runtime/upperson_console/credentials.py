"""Credential files: the console's tokens, or ONVIF users.

One process at a time changes a file. A server reads it again after each change.
"""

import glob
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Generic, TypeVar

from upperson_rt.errors import InputError
from upperson_rt.files import locked_folder, make_folder, remove_unfinished, write_atomically
from upperson_rt.printable import get_logger, safe_repr
from upperson_rt.strict import Constraint, read_fields, read_json, require_version

__all__ = ["Credential", "CredentialFile", "change_listed", "put", "read_listed", "revoke"]

T = TypeVar("T")
_VERSIONS = (1, 2)
"""Files of version 1 have neither ``created`` nor ``expires``."""
_KINDS = {"tokens": ("tokens of the console", ""), "onvif_users": ("ONVIF users", " --onvif")}
"""By the key of its list: the content of a file, and the option of  upperson-rt token  for it."""
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Credential:
    """An entry of a credential file."""

    name: str
    cameras: Annotated[
        tuple[str, ...], Constraint(lambda names: bool(names), "at least one camera")
    ] | None = None  # fmt: skip
    created: float | None = None
    """Unix seconds; None in files of older releases."""
    expires: float | None = None
    """Unix seconds; None for never."""

    def has_expired(self) -> bool:
        """Return whether its time is over."""
        return self.expires is not None and self.expires <= time.time()


C = TypeVar("C", bound=Credential)


def read_listed(path: Path, kind: type[T], key: str) -> T:
    """Read a credential file.

    Args:
        path: The file.
        kind: Dataclass of its content.
        key: Key of the list in it, one of `_KINDS`.

    Raises:
        InputError: It cannot be read, is malformed, or lists something else.
    """
    what, option = _KINDS[key]
    expected = f"expected {what}, as  upperson-rt token FILE NAME{option}  writes them"
    try:
        content = read_json(path)
    except InputError as error:
        message = f"{error}; {expected}" if path.is_file() else str(error)
        raise InputError(message, code="credentials_unreadable", path=path) from error
    if not isinstance(content, dict) or key not in content:
        others = [other for other in _KINDS if isinstance(content, dict) and other in content]
        found = _KINDS[others[0]][0] if others else "something else"
        raise InputError(
            f"{path} holds {found}, {expected}: name another file",
            code="credentials_of_other_kind",
            path=path,
            found=others[0] if others else None,
            expected=key,
        )
    require_version(content, str(path), _VERSIONS, "update upperson-rt")
    return read_fields(kind, content, str(path))


def change_listed(
    path: Path,
    read: Callable[[Path], tuple[C, ...]],
    key: str,
    change: Callable[[tuple[C, ...]], tuple[C, ...]],
    private: bool = False,
) -> None:
    """Change a credential file, which is created if missing; it is on disk afterwards.

    Other processes that change a file in this folder wait. Temporary files of killed ones are
    removed.

    Args:
        path: The file.
        read: Reads its entries.
        key: Key of the list in it, one of `_KINDS`.
        change: Maps the present entries to the new ones.
        private: Whether only its owner may read it.

    Raises:
        InputError: The file is malformed or cannot be written.
    """
    try:
        make_folder(path.parent)
        with locked_folder(path.parent) as held:
            if held:
                remove_unfinished(path.parent, glob.escape(path.name))
            entries = change(read(path) if path.exists() else ())
            content = {"schema_version": _VERSIONS[-1], key: [asdict(entry) for entry in entries]}
            write_atomically(path, json.dumps(content, indent=2) + "\n", private)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def put(entries: tuple[C, ...], made: C) -> tuple[C, ...]:
    """Return the entries with a new one, which replaces one of the same name."""
    return (*(entry for entry in entries if entry.name != made.name), made)


def revoke(entries: tuple[C, ...], name: str, path: Path) -> tuple[C, ...]:
    """Return the entries without the one of a name.

    Raises:
        InputError: There is none.
    """
    left = tuple(entry for entry in entries if entry.name != name)
    if len(left) == len(entries):
        raise InputError(
            f"{path} has no entry {safe_repr(name)}: list them with  upperson-rt token {path} "
            "--list",
            code="credential_not_found",
            path=path,
            name=name,
        )
    return left


class CredentialFile(Generic[C]):
    """A credential file that is read again after each change. Safe for several threads."""

    def __init__(self, path: Path, read: Callable[[Path], tuple[C, ...]]) -> None:
        """Read a file with a function that returns its entries, or raises InputError."""
        self._path, self._read = path, read
        self._held = _stat_of(path), read(path)

    def entries(self) -> tuple[C, ...]:
        """Return the entries that have not expired; none while the file cannot be read."""
        state = _stat_of(self._path)
        if state != self._held[0]:
            try:
                self._held = state, self._read(self._path)
            except InputError as error:
                _LOG.error("%s; no credential of this file is accepted until it is fixed", error)
                self._held = state, ()
        return tuple(entry for entry in self._held[1] if not entry.has_expired())


def _stat_of(path: Path) -> tuple[int, ...]:
    """Return inode, size and times of a file; empty if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
