"""A log of who asked what: one line of JSON a query, written before its results are shown.

Lines vouch for each other, see `log_chain`.
"""

import datetime
import errno
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upperson_rt.arguments import check_path, check_text
from upperson_rt.errors import InputError
from upperson_rt.files import sync_folder
from upperson_rt.gallery.protocol import check_filter
from upperson_rt.gallery.records import check_hits
from upperson_rt.locks import locked
from upperson_rt.log_chain import cut_off, head_of, read_end, sealed, write_head
from upperson_rt.printable import shown

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter, Hit
    from upperson_rt.preprocess import ImageSource

__all__ = ["QueryLog", "describe_picture", "process_user"]


class QueryLog:
    """Appends to a file that only its owner may read. Safe to use from several threads.

    Every line is flushed to disk before the query returns. Several processes may write to one
    file, and a line that a full disk cut off does not spoil the next one. Each line is chained to
    the one before, so that one that was changed or removed shows (`log_chain.verify_log`). Nothing
    here keeps the owner of the file from writing all of it anew: send the lines, or the last chain,
    elsewhere for that.
    """

    def __init__(self, path: str | os.PathLike[str], user: str | None = None) -> None:
        """Open a log, or make it with the permissions 0600.

        Args:
            path: The file; its folder must exist.
            user: Who asks; by default the user of the process. A service that answers several
                people opens the log once for each.

        Raises:
            InputError: The file cannot be opened for writing, or is no regular file.
        """
        self.path = Path(check_path(path, "the query log"))
        self.user = process_user() if user is None else check_text(user, "the user of a query log")
        self._lock = threading.Lock()
        self._written, self._chain = 0, ""
        """Where the log ended after the last line of this object, and the chain of that line."""
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"cannot write the query log {self.path}: not a regular file")
        try:
            is_new = not self.path.exists()
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            if is_new:
                sync_folder(self.path.parent)
            self._head = os.open(head_of(self.path), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._error(error) from error

    def write(
        self,
        query: str | Mapping[str, str],
        hits: "Sequence[Hit]",
        *,
        k: int,
        where: "Filter | None" = None,
        by_track: bool = False,
        gallery: str = "",
        action: str = "query",
        user: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a line and flush it to disk.

        Args:
            query: The sentence, or `describe_picture`.
            hits: What is about to be shown; their ids are logged.
            k: Hits asked for.
            where: Conditions of the query; those that are None are left out.
            by_track: Whether a track counted as one hit.
            gallery: Where the pictures are.
            action: ``query``, or what else was done with the hits, such as ``delete``.
            user: Who asks, where one log serves several people; by default the log's.
            details: What else belongs to it, such as a reason, as JSON.

        Raises:
            InputError: The line cannot be written, or made of these values.
            UsageError: ``where`` is no filter.
        """
        if not isinstance(query, str | Mapping):
            raise InputError(f"expected a sentence or describe_picture(), found {shown(query)}")
        conditions = asdict(check_filter(where))
        entry: dict[str, Any] = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
            "user": self.user if user is None else check_text(user, "the user of a query log"),
            "action": action,
            **({"sentence": query} if isinstance(query, str) else {"picture": dict(query)}),
            "filter": {name: value for name, value in conditions.items() if value},
            "k": k,
            "by_track": by_track,
            "gallery": gallery,
            "ids": [hit.id for hit in check_hits(hits)],
            **({} if details is None else {"details": dict(details)}),
        }
        try:
            with self._lock, locked(self._opened()):
                self._append(entry)
        except OSError as error:
            raise self._error(error) from error

    def last_chain(self) -> str:
        """Return what stands for the whole log now, see `log_chain`; empty for a new one.

        Raises:
            InputError: The log cannot be read.
        """
        try:
            with self._lock, locked(self._opened()):
                return read_end(self._file, os.lseek(self._file, 0, os.SEEK_END))[0]
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close the file; the object cannot be used afterwards. May be called again."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                os.close(self._head)
            self._file = -1

    def __enter__(self) -> "QueryLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _opened(self) -> int:
        if self._file < 0:
            raise OSError(errno.EBADF, "it has been closed")
        return self._file

    def _append(self, entry: Mapping[str, Any]) -> None:
        if not os.fstat(self._file).st_nlink:
            raise OSError(errno.ENOENT, "it was removed while it was open, start the program again")
        size = os.lseek(self._file, 0, os.SEEK_END)
        chain, between = self._chain, b""
        if size != self._written:  # Others have written, or it is not begun by this object.
            known = (self._written, chain) if size > self._written else (0, "")
            chain, between = read_end(self._file, size, *known)
        torn = between and not between.endswith(b"\n")
        if torn:
            entry = {**entry, **cut_off(between)}
            between += b"\n"
        try:
            line, chain = sealed(entry, chain, between)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"cannot write such a line into a query log: {error}") from error
        if torn:
            line = b"\n" + line
        end = size + len(line)
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)
        write_head(self._head, end, chain)
        self._written, self._chain = end, chain

    def _error(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write the query log {self.path}: {error.strerror or error}; no query is "
            "answered without it"
        )


def describe_picture(source: "ImageSource") -> dict[str, str]:
    """Return what the log says of a picture that was asked for, without the picture itself.

    Of a file its name and the SHA-256 of its content; of an image or array the SHA-256 of its
    pixels as they are.

    Raises:
        InputError: The file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        from upperson_rt.files import sha256_of_file

        path = os.fspath(source)
        try:
            return {"file": os.path.abspath(path), "sha256": sha256_of_file(path)}
        except OSError as error:
            raise InputError(f"cannot read image {path}: {error.strerror}") from error
    return {"sha256": hashlib.sha256(np.ascontiguousarray(source).tobytes()).hexdigest()}


def process_user() -> str:
    """Return the user by the system's word: a variable such as $USER can be set to anything."""
    try:
        import pwd
    except ImportError:  # Windows.
        import getpass

        return getpass.getuser()
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # A container may run under a number without a name.
        return f"uid {os.getuid()}"
