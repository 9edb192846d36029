"""Where a Milvus gallery is: the parts of ``milvus://...``.

    milvus://host:19530/collection                 a server
    milvus://user@host/database/collection         another database, and a user
    milvus:///folder/people.db/collection          a folder of milvus-lite on this machine
    milvus://host/collection?index=hnsw&tls=true   options, see `Options`

A password does not belong on a command line: it is taken from ``UPPERSON_MILVUS_TOKEN``, as
``user:password`` or as the key of a hosted service. One that is given in the location anyway works,
and is never shown.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from upperson_rt.errors import UsageError

__all__ = ["INDEX_KINDS", "TOKEN_VARIABLE", "MilvusLocation", "Options", "parse"]

TOKEN_VARIABLE = "UPPERSON_MILVUS_TOKEN"
INDEX_KINDS = ("flat", "hnsw", "ivf_sq8")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}", re.ASCII)
_DEFAULT_PORT = 19530
_EXAMPLE = "milvus://host:19530/collection or milvus:///folder/people.db/collection"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may follow the ``?`` of a location."""

    index: str = "flat"
    """How a new or rebuilt collection is searched: flat is exact, hnsw and ivf_sq8 are not."""
    vectors: str = "float32"
    """How a new collection stores vectors: float32 or float16 (Milvus 2.4 and newer)."""
    consistency: str = "strong"
    """What a read sees: strong all that any process has added, session all that this one has."""
    timeout_s: float = 30.0
    """Longest time for one request, in the location ``timeout``."""
    tls: bool = False

    CHOICES: ClassVar[Mapping[str, Sequence[str]]] = {
        "index": INDEX_KINDS,
        "vectors": ("float32", "float16"),
        "consistency": ("strong", "session"),
        "tls": ("true", "false"),
    }


@dataclass(frozen=True, kw_only=True)
class MilvusLocation:
    """A parsed location."""

    text: str
    """The location as it may be shown: without a password."""
    collection: str
    uri: str
    """For `pymilvus.MilvusClient`: an address, or the path of a folder of milvus-lite."""
    file: Path | None = None
    """That path."""
    token: str = field(default="", repr=False)
    database: str = ""
    options: Options = Options()


def parse(location: str) -> MilvusLocation:
    """Take a location apart.

    Raises:
        UsageError: It is malformed, or there is no password for its user.
    """
    try:
        split = urlsplit(location)
        port = split.port or _DEFAULT_PORT
    except ValueError as error:
        raise UsageError(f"malformed address of a gallery ({error}): write  {_EXAMPLE}") from error
    *folders, collection = unquote(split.path).split("/")[1:] or [""]
    if not _NAME.fullmatch(collection):
        raise UsageError(
            f"'{collection}' is not the name of a Milvus collection (letters, digits and _ only): "
            f"write  {_EXAMPLE}"
        )
    options = _options(split.query)
    if not split.hostname:
        path = Path("/", *folders)
        if path.suffix != ".db" or split.username:
            raise UsageError(
                f"a gallery of milvus-lite is a folder that ends in .db: write  {_EXAMPLE}"
            )
        text = f"milvus://{quote(str(path))}/{collection}{_query(split)}"
        return MilvusLocation(
            text=text, collection=collection, uri=str(path), file=path, options=options
        )
    if len(folders) > 1 or not all(_NAME.fullmatch(name) for name in folders):
        raise UsageError(
            f"write a database as  milvus://host/database/collection,  not '{split.path}'"
        )
    host = f"[{split.hostname}]" if ":" in split.hostname else split.hostname
    user = f"{split.username}@" if split.username else ""
    path_text = "/".join([*folders, collection])
    return MilvusLocation(
        text=f"milvus://{user}{host}:{port}/{path_text}{_query(split)}",
        collection=collection,
        uri=f"{'https' if options.tls else 'http'}://{host}:{port}",
        token=_token(split),
        database="".join(folders),
        options=options,
    )


def _token(split: SplitResult) -> str:
    given = os.environ.get(TOKEN_VARIABLE, "")
    if not split.username:
        return given
    user = unquote(split.username)
    if split.password:
        return f"{user}:{unquote(split.password)}"
    if not given.startswith(f"{user}:"):
        raise UsageError(
            f"no password for the Milvus user '{user}': set  {TOKEN_VARIABLE}={user}:PASSWORD"
        )
    return given


def _query(split: SplitResult) -> str:
    return f"?{split.query}" if split.query else ""


def _options(query: str) -> Options:
    known = {item.name.removesuffix("_s"): item.name for item in fields(Options)}
    values: dict[str, object] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise UsageError(f"unknown option '{name}' of a Milvus gallery; there are {[*known]}")
        choices = Options.CHOICES.get(name)
        if choices is not None and value not in choices:
            raise UsageError(
                f"option {name} of a Milvus gallery is one of {choices}, not '{value}'"
            )
        if name == "timeout":
            try:
                values["timeout_s"] = float(value)
            except ValueError as error:
                raise UsageError(f"option timeout takes seconds, not '{value}'") from error
            if not 0 < float(value) < 1e6:
                raise UsageError(f"option timeout takes seconds above 0, not '{value}'")
        else:
            values[name] = value == "true" if name == "tls" else value
    return Options(**values)  # type: ignore[arg-type]
