"""The collection of a Milvus gallery: connecting, creating, and telling it from any other.

What a gallery says about itself is the description of its collection, made in the same request as
the collection. milvus-lite keeps no descriptions; there it is a property.
"""

import datetime
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import upperson_rt
from upperson_rt.errors import (
    BackendError,
    InputError,
    IntegrityError,
    UppersonError,
    missing_extra,
)
from upperson_rt.gallery.milvus_location import TOKEN_VARIABLE, MilvusLocation
from upperson_rt.gallery.milvus_rows import HASH_LENGTH, METADATA, MOST_ATTRIBUTES, TEXT_LIMIT

__all__ = [
    "INDEX_PARAMETERS",
    "SCHEMA_VERSION",
    "Meta",
    "connect",
    "disconnect",
    "index_kind",
    "make_index",
    "open_collection",
    "translated",
]

SCHEMA_VERSION = 1
INDEX_PARAMETERS: dict[str, dict[str, int]] = {
    "flat": {},
    "hnsw": {"M": 16, "efConstruction": 200},
    "ivf_sq8": {"nlist": 1024},
}
_NAME = "upperson"
"""Under which description or property hold a gallery's `Meta`."""
_TEXTS = ("key", "source", "camera", "track", "crop", "variant")
_FIELDS = {*METADATA, "variant", "hashes", "added", "id", "vector"}
_LOAD_TIMEOUT_S = 600.0
_NOT_FOUND = 100
_lite_lock = threading.Lock()
_lite_users: Counter[Path] = Counter()


@dataclass(frozen=True)
class Meta:
    """What a gallery says about itself."""

    schema_version: int
    fingerprint: str
    embed_dim: int
    vectors: str
    """``float32`` or ``float16``."""
    created: str
    generator: str


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


def _ours(location: MilvusLocation, error: Exception) -> UppersonError:
    code, line = getattr(error, "code", None), _line(error)
    if code == _NOT_FOUND:
        return InputError(
            f"no gallery at {location.text}: make one with  upperson-rt index PATH...  or name "
            "another with  --gallery"
        )
    if "larger than max" in line:
        return InputError(
            f"gallery {location.text}: more than the server takes at once, nothing was stored: "
            f"add fewer items at a time ({line})"
        )
    if "auth" in line.lower() or "PERMISSION" in line.upper():
        return BackendError(
            f"Milvus refused the user of {location.text} ({line}): set  {TOKEN_VARIABLE}="
            "user:password"
        )
    return BackendError(f"Milvus failed for gallery {location.text}: {line}")


def _line(error: Exception) -> str:
    if callable(details := getattr(error, "details", None)):  # Of a gRPC error.
        text = str(details())
    else:
        text = str(getattr(error, "message", "") or error)
    return " ".join(text.split())[:300] or type(error).__name__


def connect(location: MilvusLocation, create: bool) -> Any:
    """Return a `pymilvus.MilvusClient`; give it back to `disconnect`.

    Raises:
        BackendError: pymilvus is not installed, or the server does not answer.
        InputError: The folder of milvus-lite is missing or in use by another process.
    """
    try:
        from pymilvus import MilvusClient
        from pymilvus import exceptions as milvus

        grpc = import_module("grpc")
    except ImportError as error:
        raise missing_extra("pymilvus", "milvus", "a gallery in Milvus") from error
    # Both write to standard error, with tracebacks, what they raise as well.
    for name in ("pymilvus", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if location.file is not None:
        _prepare_lite(location, location.file, create)
        # It has no such method as pymilvus asks for first, says so, and all is well.
        logging.getLogger("grpc._server").addFilter(_is_worth_reading)
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
            f"cannot open gallery {location.text}: another process has it open, or it is damaged"
        ) from error
    except (milvus.MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
        if "auth" in _line(error).lower():
            raise _ours(location, error) from error
        raise BackendError(
            f"no Milvus server answers at {location.uri} ({_line(error)}): start it, or name "
            "another with  --gallery"
        ) from error
    if location.file is not None:
        with _lite_lock:
            _lite_users[location.file] += 1
    return client


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return "Method not implemented" not in record.getMessage()


def _prepare_lite(location: MilvusLocation, folder: Path, create: bool) -> None:
    try:
        import_module("milvus_lite")
    except ImportError as error:
        raise BackendError(
            f"{location.text} needs the package 'milvus-lite', which is not installed: run  "
            "pip install milvus-lite"
        ) from error
    if folder.is_file() or (not folder.exists() and not create):
        raise InputError(
            f"no gallery at {location.text}: make one with  upperson-rt index PATH...  or name "
            "another with  --gallery"
        )
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


def open_collection(
    client: Any, location: MilvusLocation, fingerprint: str | None, embed_dim: int | None
) -> Meta:
    """Return the `Meta` of the collection, which is made where there is none.

    It is loaded, and gets its index if an earlier attempt has been cut off before that.

    Args:
        client: From `connect`.
        location: Of the gallery.
        fingerprint: For a new collection; None if it must be there.
        embed_dim: The same.

    Raises:
        InputError: There is none, or its schema is newer.
        IntegrityError: Some other collection.
        BackendError: The server cannot do what the location asks for.
    """
    name = location.collection
    if fingerprint is not None and embed_dim is not None and not client.has_collection(name):
        _create(client, location, fingerprint, embed_dim)
    description = client.describe_collection(name)
    meta = _read_meta(location, description)
    if not client.list_indexes(name):
        make_index(client, location)
    client.load_collection(name, timeout=_LOAD_TIMEOUT_S)  # Waits, if that goes on already.
    return meta


def _create(client: Any, location: MilvusLocation, fingerprint: str, embed_dim: int) -> None:
    from pymilvus import DataType, MilvusClient
    from pymilvus.exceptions import MilvusException

    version = client.get_server_version()
    numbers = re.match(r"v?(\d+)\.(\d+)", version)
    kind = location.options.vectors
    # Milvus 2.3 accepts float16 vectors without a word, and then finds nothing.
    if kind == "float16" and (numbers is None or (int(numbers[1]), int(numbers[2])) < (2, 4)):
        raise BackendError(
            f"{location.text} asks for float16 vectors, which needs Milvus 2.4 or newer, found "
            f"{version}: leave vectors=float16 out"
        )
    meta = Meta(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint,
        embed_dim=embed_dim,
        vectors=kind,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        generator=f"upperson-rt {upperson_rt.__version__}",
    )
    text = json.dumps({_NAME: asdict(meta)})
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=text)
    schema.add_field("id", DataType.INT64, is_primary=True)
    for field in _TEXTS:
        schema.add_field(field, DataType.VARCHAR, max_length=TEXT_LIMIT)
    schema.add_field("time", DataType.DOUBLE)
    schema.add_field("box", DataType.JSON)
    schema.add_field("attributes", DataType.JSON)
    schema.add_field(
        "hashes",
        DataType.ARRAY,
        element_type=DataType.VARCHAR,
        max_capacity=MOST_ATTRIBUTES,
        max_length=HASH_LENGTH,
    )
    schema.add_field("added", DataType.INT64)
    vector = DataType.FLOAT16_VECTOR if kind == "float16" else DataType.FLOAT_VECTOR
    schema.add_field("vector", vector, dim=embed_dim)
    is_lite = "lite" in version and numbers is None
    try:
        client.create_collection(
            location.collection,
            schema=schema,
            consistency_level="Strong",
            **({"properties": {_NAME: text}} if is_lite else {}),
        )
    except MilvusException:
        if not client.has_collection(location.collection):  # Else another process was faster.
            raise


def _read_meta(location: MilvusLocation, description: dict[str, Any]) -> Meta:
    foreign = IntegrityError(
        f"{location.text} is a collection, but not a gallery; it was left as it is: name another "
        "with  --gallery"
    )
    try:
        text = description["description"] or description["properties"][_NAME]
        values = json.loads(text)[_NAME]
        version = int(values["schema_version"])
        if version > SCHEMA_VERSION:
            raise InputError(
                f"gallery {location.text} has schema version {version}, this program reads up to "
                f"{SCHEMA_VERSION}: update it with  pip install -U upperson-rt"
            )
        meta = Meta(**values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise foreign from error
    if not {field["name"] for field in description["fields"]} >= _FIELDS:
        raise foreign
    return meta


def make_index(client: Any, location: MilvusLocation) -> None:
    """Make the index that the location asks for, in place of any other."""
    name = location.collection
    if client.list_indexes(name):
        client.release_collection(name)
        client.drop_index(name, "vector")
    parameters = client.prepare_index_params()
    parameters.add_index(
        "vector",
        index_type=location.options.index.upper(),
        metric_type="IP",
        params=INDEX_PARAMETERS[location.options.index],
    )
    client.create_index(name, parameters, timeout=_LOAD_TIMEOUT_S)
    client.load_collection(name, timeout=_LOAD_TIMEOUT_S)


def index_kind(client: Any, location: MilvusLocation) -> str:
    """Return the kind of index that the collection has, in lower case."""
    (name, *_) = client.list_indexes(location.collection)
    return str(client.describe_index(location.collection, name)["index_type"]).lower()
