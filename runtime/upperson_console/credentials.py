"""Credential files: the tokens of the console.

One process at a time changes a file. A server reads it again after each change.
"""

import glob
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from upperson_rt.errors import InputError
from upperson_rt.files import make_folder, remove_unfinished, write_atomically
from upperson_rt.locks import locked_folder
from upperson_rt.printable import get_logger, safe_repr
from upperson_rt.strict import Constraint, read_fields, read_json, require_version

_VERSIONS = (1, 2)
"""Files of version 1 have neither ``created`` nor ``expires``."""
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


class CredentialFile(Generic[C]):
    """A credential file of one kind, read again after each change. Safe for several threads."""

    key: ClassVar[str]
    """Key of the list in the file."""
    content: ClassVar[type[Any]]
    """Dataclass of the whole file."""

    def __init__(self, path: Path) -> None:
        """Read a file to accept its credentials.

        Raises:
            InputError: It cannot be read, is malformed or empty.
        """
        self.path = path
        self._held = _stat_of(path), self.read(path)
        if not self._held[1]:
            raise InputError(
                f"{path} has no {self.key}: add one with  upperson-rt token {path} NAME",
                code="credentials_empty",
                path=path,
            )

    def entries(self) -> tuple[C, ...]:
        """Return the entries that have not expired; none while the file cannot be read."""
        state = _stat_of(self.path)
        if state != self._held[0]:
            try:
                self._held = state, self.read(self.path)
            except InputError as error:
                _LOG.error("%s; no credential of this file is accepted until it is fixed", error)
                self._held = state, ()
        return tuple(entry for entry in self._held[1] if not entry.has_expired())

    @classmethod
    def read(cls, path: Path) -> tuple[C, ...]:
        """Read all entries; raises InputError for another or a malformed file."""
        expected = f"expected {cls.key}, as  upperson-rt token FILE NAME  writes them"
        try:
            content = read_json(path)
        except InputError as error:
            message = f"{error}; {expected}" if path.is_file() else str(error)
            raise InputError(message, code="credentials_unreadable", path=path) from error
        if not isinstance(content, dict) or cls.key not in content:
            raise InputError(
                f"{path} holds something else, {expected}: name another file",
                code="credentials_of_other_kind",
                path=path,
                expected=cls.key,
            )
        require_version(content, str(path), _VERSIONS, "update upperson-rt")
        entries: tuple[C, ...] = getattr(read_fields(cls.content, content, str(path)), cls.key)
        return entries

    @classmethod
    def put(cls, path: Path, made: C) -> None:
        """Add an entry, which replaces one of the same name, to a file, created if missing."""
        cls._change(path, lambda known: (*_others(known, made.name), made))

    @classmethod
    def revoke(cls, path: Path, name: str) -> None:
        """Remove the entry of a name; raises InputError if there is none."""

        def without(known: tuple[C, ...]) -> tuple[C, ...]:
            left = _others(known, name)
            if len(left) == len(known):
                raise InputError(
                    f"{path} has no entry {safe_repr(name)}: list them with  "
                    f"upperson-rt token {path} --list",
                    code="credential_not_found",
                    path=path,
                    name=name,
                )
            return left

        cls._change(path, without)

    @classmethod
    def _change(cls, path: Path, change: Callable[[tuple[C, ...]], tuple[C, ...]]) -> None:
        """Change the entries; they are on disk afterwards.

        Other processes that change a file in this folder wait. Temporary files of killed ones are
        removed.
        """
        try:
            make_folder(path.parent)
            with locked_folder(path.parent) as held:
                if held:
                    remove_unfinished(path.parent, glob.escape(path.name))
                entries = [asdict(one) for one in change(cls.read(path) if path.exists() else ())]
                content = {"schema_version": _VERSIONS[-1], cls.key: entries}
                write_atomically(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _others(entries: tuple[C, ...], name: str) -> tuple[C, ...]:
    return tuple(entry for entry in entries if entry.name != name)


def _stat_of(path: Path) -> tuple[int, ...]:
    """Return inode, size and times of a file; empty if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
