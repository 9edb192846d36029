"""What a search calls of a log of queries; the package `upperson_log` has one."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from upperson_rt.errors import InputError
from upperson_rt.extensions import load_service
from upperson_rt.files import sha256_of_file

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter, Hit
    from upperson_rt.preprocess import ImageSource

__all__ = ["QueryLogger", "describe_picture", "open_query_log"]


class QueryLogger(AbstractContextManager["QueryLogger"], Protocol):
    """Gets a line a query before its hits are returned."""

    @property
    def problem(self) -> str:
        """What to warn of, such as lines that are missing; empty if nothing is wrong."""

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
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a line; raises InputError if it cannot: the query fails then.

        Arguments as of `upperson_rt.QueryLog.write`.
        """


def open_query_log(path: Path) -> QueryLogger:
    """Open a log; raises InputError if no line can be written, BackendError if there is none."""
    log: QueryLogger = load_service("query-log")(path)
    return log


def describe_picture(source: "ImageSource") -> dict[str, str]:
    """Return what the log says of a picture: the name and SHA-256 of a file, or of the pixels."""
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        try:
            return {"file": os.path.abspath(path), "sha256": sha256_of_file(path)}
        except OSError as error:
            message = f"cannot read image {path}: {error.strerror}"
            raise InputError(message, code="image_unreadable", path=path) from error
    return {"sha256": hashlib.sha256(np.ascontiguousarray(source).tobytes()).hexdigest()}
