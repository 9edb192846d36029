"""Where a Milvus gallery is, and the way to it: ``milvus://...``, the client, and its errors.

    milvus://host:19530/collection                 a server
    milvus://user@host/database/collection         another database, and a user
    milvus:///folder/people.db/collection          a folder of milvus-lite on this machine
    milvus://host/collection?index=hnsw&tls=true   options, see `Options`

A password does not belong on a command line: it is taken from ``UPPERSON_MILVUS_TOKEN``, as
``user:password`` or as the key of a hosted service. One that is given in the location anyway works,
and is never shown.
"""

import logging
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from upperson_network.remote import may_hide_login
from upperson_rt.errors import BackendError, InputError, UppersonError, UsageError, missing_extra
from upperson_rt.gallery.protocol import no_gallery

TOKEN_VARIABLE = "UPPERSON_MILVUS_TOKEN"
INDEX_PARAMETERS: dict[str, dict[str, int]] = {
    "flat": {},
    "hnsw": {"M": 16, "efConstruction": 200},
    "ivf_sq8": {"nlist": 1024},
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}", re.ASCII)
_DEFAULT_PORT = 19530
_EXAMPLE = "milvus://host:19530/collection or milvus:///folder/people.db/collection"
_NOT_FOUND = 100
_COMES_BACK = {2, 101, 103, 503, 901, 902}
"""Codes of a server that starts: no connection, collection not or not fully loaded, channel not
available, node not found or offline."""
_REFUSED = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
"""Names of gRPC's codes for a wrong or missing password."""
_lite_lock = threading.Lock()
_lite_users: Counter[Path] = Counter()


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
        "index": tuple(INDEX_PARAMETERS),
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
    """Take a location apart."""
    try:
        split = urlsplit(location)
        port = split.port or _DEFAULT_PORT
        if may_hide_login(location):
            raise ValueError
    except ValueError as error:
        # Python's message quotes the port, which may be a part of a password.
        reason = "a password wants %2F for / and %40 for @" if "@" in location else error
        raise _malformed(f"malformed address of a gallery ({reason})") from None
    *folders, collection = unquote(split.path).split("/")[1:] or [""]
    if not _NAME.fullmatch(collection):
        raise _malformed(
            f"'{collection}' is not the name of a Milvus collection (letters, digits and _ only)"
        )
    options = _options(split.query)
    query = f"?{split.query}" if split.query else ""
    if not split.hostname:
        path = Path("/", *folders)
        if path.suffix != ".db" or split.username:
            raise _malformed("a gallery of milvus-lite is a folder that ends in .db")
        text = f"milvus://{quote(str(path))}/{collection}{query}"
        return MilvusLocation(
            text=text, collection=collection, uri=str(path), file=path, options=options
        )
    if len(folders) > 1 or not all(_NAME.fullmatch(name) for name in folders):
        raise UsageError(
            f"write a database as  milvus://host/database/collection,  not '{split.path}'",
            code="location_malformed",
        )
    host = f"[{split.hostname}]" if ":" in split.hostname else split.hostname
    user = f"{split.username}@" if split.username else ""
    path_text = "/".join([*folders, collection])
    return MilvusLocation(
        text=f"milvus://{user}{host}:{port}/{path_text}{query}",
        collection=collection,
        uri=f"{'https' if options.tls else 'http'}://{host}:{port}",
        token=_token(split),
        database="".join(folders),
        options=options,
    )


def _malformed(problem: str) -> UsageError:
    return UsageError(f"{problem}: write  {_EXAMPLE}", code="location_malformed")


def _token(split: SplitResult) -> str:
    given = os.environ.get(TOKEN_VARIABLE, "")
    if not split.username:
        return given
    user = unquote(split.username)
    if split.password:
        return f"{user}:{unquote(split.password)}"
    if not given.startswith(f"{user}:"):
        raise UsageError(
            f"no password for the Milvus user '{user}': set  {TOKEN_VARIABLE}={user}:PASSWORD",
            code="password_missing",
            user=user,
        )
    return given


def _options(query: str) -> Options:
    known = [item.name.removesuffix("_s") for item in fields(Options)]
    values: dict[str, object] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        choices = Options.CHOICES.get(name)
        seconds = math.nan
        with suppress(ValueError):
            seconds = float(value)
        problem = None
        if name not in known:
            problem = f"unknown option '{name}' of a Milvus gallery; there are {known}"
        elif choices is not None and value not in choices:
            problem = f"option {name} of a Milvus gallery is one of {choices}, not '{value}'"
        elif name == "timeout" and not 0 < seconds < 1e6:
            problem = f"option timeout takes seconds above 0, not '{value}'"
        if problem is not None:
            raise UsageError(problem, code="option_invalid", option=name)
        if name == "timeout":
            values["timeout_s"] = seconds
        else:
            values[name] = value == "true" if name == "tls" else value
    return Options(**values)  # type: ignore[arg-type]


def connect(location: MilvusLocation, create: bool) -> Any:
    """Return a `pymilvus.MilvusClient`; give it back to `disconnect`."""
    try:
        from pymilvus import MilvusClient
        from pymilvus import exceptions as milvus

        grpc = import_module("grpc")
    except ImportError as error:
        raise missing_extra("pymilvus", "milvus", "a gallery in Milvus") from error
    # Both write to standard error, with tracebacks, what they raise as well.
    for name in ("pymilvus", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # noqa: TID251 - theirs
    if location.file is not None:
        _prepare_lite(location, location.file, create)
        # It has no such method as pymilvus asks for first, says so, and all is well.
        logging.getLogger("grpc._server").addFilter(  # noqa: TID251
            lambda record: "Method not implemented" not in record.getMessage()
        )
    try:
        client = MilvusClient(
            uri=location.uri,
            token=location.token,
            db_name=location.database,
            timeout=location.options.timeout_s,
            dedicated=True,  # Closing one gallery leaves the connections of others alone.
        )
    except milvus.ConnectionConfigException as error:
        if location.file is None:
            raise _ours(location, error) from error
        raise InputError(
            f"cannot open gallery {location.text}: another process has it open, or it is damaged",
            code="gallery_in_use",
        ) from error
    except (milvus.MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
        # For most of what gRPC says, pymilvus says the same sentence.
        is_hidden = comes_back(error) and isinstance(error.__cause__, grpc.RpcError)
        reason = error.__cause__ if is_hidden else error
        if is_outage(reason) and location.file is None:
            raise server_away(location, reason) from error
        raise _ours(location, reason) from error
    if location.file is not None:
        with _lite_lock:
            _lite_users[location.file] += 1
    return client


def _prepare_lite(location: MilvusLocation, folder: Path, create: bool) -> None:
    try:
        import_module("milvus_lite")
    except ImportError as error:
        raise BackendError(
            f"{location.text} needs the package 'milvus-lite', which is not installed: run  "
            "pip install milvus-lite",
            code="extra_missing",
            package="milvus_lite",
        ) from error
    if folder.is_file() or (not folder.exists() and not create):
        raise no_gallery(location.text)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make gallery {location.text}: {error.strerror}") from error


def disconnect(location: MilvusLocation, client: Any) -> None:
    """Close a client; the last one of a folder of milvus-lite leaves it to other processes."""
    client.close()
    if location.file is None:
        return
    manager = import_module("milvus_lite.server_manager").server_manager_instance
    with _lite_lock:
        _lite_users[location.file] -= 1
        if not _lite_users[location.file]:
            manager.release_server(str(location.file))


@contextmanager
def translated(location: MilvusLocation) -> Iterator[None]:
    """Turn errors of Milvus and of the way to it into ours, in one line, naming the gallery."""
    from pymilvus import exceptions as milvus

    grpc = import_module("grpc")
    try:
        yield
    except (milvus.DataNotMatchException, milvus.ParamError) as error:  # Found before sending.
        raise InputError(f"gallery {location.text}: {_line(error)}") from error
    except (milvus.MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
        raise _ours(location, error) from error


def server_away(location: MilvusLocation, error: BaseException) -> BackendError:
    """Return the error for a server that may answer later; see `is_outage`."""
    return BackendError(
        f"no Milvus server answers at {location.uri} ({_line(error)}): start it, or name "
        "another with  --gallery",
        code="server_away",
        address=location.uri,
        location=location.text,
    )


def _ours(location: MilvusLocation, error: BaseException) -> UppersonError:
    code, line = _code(error), _line(error)
    if code == _NOT_FOUND:
        return no_gallery(location.text)
    if "larger than max" in line:
        return InputError(
            f"gallery {location.text}: more than the server takes at once, nothing was stored: "
            f"add fewer items at a time ({line})",
            code="batch_too_large",
        )
    says_so = "auth" in line.lower() or "PERMISSION" in line.upper()
    if getattr(code, "name", "") in _REFUSED or (says_so and not is_outage(error)):
        return BackendError(
            f"Milvus refused the user of {location.text} ({line}): set  {TOKEN_VARIABLE}="
            "user:password",
            code="user_refused",
        )
    return BackendError(f"Milvus failed for gallery {location.text}: {line}", code="server_failed")


def comes_back(error: BaseException | None) -> bool:
    """Whether a request failed because the server is away or has just started."""
    code = _code(error)
    return (
        getattr(error, "retriable", False)
        or code in _COMES_BACK
        or getattr(code, "name", "") == "UNAVAILABLE"
    )


def is_outage(error: BaseException | None) -> bool:
    """Whether a request failed for a reason that may pass: `comes_back`, or it took too long."""
    is_late = getattr(_code(error), "name", "") == "DEADLINE_EXCEEDED"
    return is_late or comes_back(error) or type(error).__name__ == "FutureTimeoutError"


def _code(error: BaseException | None) -> Any:
    code = getattr(error, "code", None)
    return code() if callable(code) else code  # Of a gRPC error, or of Milvus.


def _line(error: BaseException) -> str:
    if callable(details := getattr(error, "details", None)):  # Of a gRPC error.
        text = str(details())
    else:
        text = str(getattr(error, "message", "") or error)
    return " ".join(text.split())[:300] or type(error).__name__
