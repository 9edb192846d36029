"""The collection of a Milvus gallery: made, recognised, read, searched and written.

What a gallery says about itself is the description of its collection, made in the same request as
the collection. milvus-lite keeps no descriptions; there it is a property.
"""

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from upperson_milvus.connection import (
    INDEX_PARAMETERS,
    MilvusLocation,
    comes_back,
    connect,
    disconnect,
    is_outage,
    server_away,
    translated,
)
from upperson_milvus.rows import (
    HASH_LENGTH,
    METADATA,
    MOST_ATTRIBUTES,
    TEXT_LIMIT,
    encode_vectors,
    expression_of_ids,
    item_from_row,
)
from upperson_rt.errors import BackendError, IntegrityError, UsageError
from upperson_rt.gallery.protocol import Meta, check_schema_version, made_now, read_item
from upperson_rt.gallery.records import Hit, Item

_T = TypeVar("_T")
SCHEMA_VERSION = 1
MOST_HITS = 16_384
"""The server's limit for rows per query."""
_NAME = "upperson"
"""Under which description or property hold a gallery's `MilvusMeta`."""
_TEXTS = ("key", "source", "camera", "track", "crop", "variant")
_FIELDS = {*METADATA, "variant", "hashes", "added", "id", "vector"}
_LOAD_TIMEOUT_S = 600.0
_PAUSE_S = 0.2
_AT_A_TIME = 5000
"""Rows or ids in one request."""
_LEAST_CANDIDATES = {"ef": 128, "nprobe": 64}
"""How thoroughly indexes that are not exact search; each takes its own and ignores the rest."""


@dataclass(frozen=True, kw_only=True)
class MilvusMeta(Meta):
    """The description of a collection."""

    vectors: str
    """``float32`` or ``float16``."""


@dataclass(frozen=True)
class Known:
    """What an item that is replaced passes on."""

    key: str
    camera: str
    added: int


class RecentWrites:
    """Rows written or deleted by this process in the last seconds.

    A gallery reads an item before it replaces it. A read that sees all writes waits for the next
    clock tick of the server, 0.2 s or more; one that may miss the last 5 s does not wait.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        self._seconds = seconds
        self._writes: OrderedDict[int, tuple[float, Known | None]] = OrderedDict()

    def record(self, rows: Mapping[int, Known | None]) -> None:
        """Remember rows; None for a row that was deleted."""
        now = time.monotonic()
        for id_, known in rows.items():
            self._writes[id_] = now, known
            self._writes.move_to_end(id_)
        while self._writes and next(iter(self._writes.values()))[0] < now - self._seconds:
            self._writes.popitem(last=False)

    def update(self, read: dict[int, Known], ids: Iterable[int]) -> None:
        """Correct what was read of these rows."""
        for id_ in ids:
            if id_ in self._writes:
                known = self._writes[id_][1]
                if known is None:
                    read.pop(id_, None)
                else:
                    read[id_] = known


class Collection:
    """A collection that is open. Errors of Milvus come out as ours."""

    def __init__(self, location: MilvusLocation, create: tuple[str, int] | None) -> None:
        """Open a collection and load it; make what there is not of it, its index last."""
        self.location = location
        self.writing = threading.RLock()
        """Held while rows are read in order to write."""
        self._name = location.collection
        self._recent = RecentWrites()
        self._has_waited = False
        self._timeout = {"timeout": location.options.timeout_s}
        self._read = {
            "consistency_level": location.options.consistency.capitalize(),
            **self._timeout,
        }
        self._connection: Any | None = connect(location, create is not None)
        try:
            with self.client() as client:
                if create is not None and not client.has_collection(self._name, **self._timeout):
                    _create(client, location, *create)
                description = client.describe_collection(self._name, **self._timeout)
                self.meta = _read_meta(location, description)
                if not client.list_indexes(self._name):
                    _make_index(client, location)
                # Waits, if that goes on already.
                client.load_collection(self._name, timeout=_LOAD_TIMEOUT_S)
        except BaseException as error:
            self.close()
            if isinstance(error, BackendError) and is_outage(error.__cause__):
                raise server_away(location, error.__cause__ or error) from error
            raise

    def close(self) -> None:
        """Close the connection; a second call does nothing."""
        with self.writing:
            if self._connection is not None:
                disconnect(self.location, self._connection)
            self._connection = None

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Give the client, and translate its errors."""
        client = self._connection
        if client is None:
            raise UsageError(f"gallery {self.location.text} has been closed", code="gallery_closed")
        with translated(self.location):
            yield client

    def _request(self, request: str, **arguments: Any) -> Any:
        """Make a request of `pymilvus.MilvusClient` about this collection, see `_insist`."""
        return self._insist(lambda client: getattr(client, request)(self._name, **arguments))

    def _insist(self, request: Callable[[Any], _T]) -> _T:
        """Make a request, and again while the server restarts: what it writes, it writes by id."""
        until = time.monotonic() + self.location.options.timeout_s
        while True:
            try:
                with self.client() as client:
                    return request(client)
            except BackendError as error:
                if not comes_back(error.__cause__) or time.monotonic() + _PAUSE_S > until:
                    raise
            time.sleep(_PAUSE_S)

    def count(self, condition: str) -> int:
        """Return how many rows pass."""
        (row,) = self._request("query", filter=condition, output_fields=["count(*)"], **self._read)
        return int(row["count(*)"])

    def rows(self, condition: str, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield fields of the rows that pass, by id."""
        for page in self.pages(condition, fields, _AT_A_TIME):
            yield from page

    def pages(
        self, condition: str, fields: Sequence[str], size: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield fields of the rows that pass, by id, at most `size` at a time."""
        size = min(size, MOST_HITS)
        first = self.some(condition, fields, size)
        if len(first) < size:  # All of it, in one request.
            if first:
                yield sorted(first, key=lambda row: row["id"])
            return
        query = _query(condition, fields)
        iterator = self._request("query_iterator", **query, batch_size=size, **self._timeout)
        try:
            while page := self._insist(lambda _: iterator.next()):
                yield list(page)
        finally:  # Also where the caller has seen enough.
            iterator.close()

    def some(self, condition: str, fields: Sequence[str], count: int) -> list[dict[str, Any]]:
        """Return fields of at most `count` of the rows that pass, of any, in one request."""
        query = _query(condition, fields)
        return list(self._request("query", **query, limit=min(count, MOST_HITS), **self._read))

    def search(
        self, queries_QD: NDArray[np.float32], limit: int, condition: str
    ) -> list[list[Hit]]:
        """Return up to `limit` hits of each query, by falling score, then by id."""
        data = encode_vectors(queries_QD, self.meta.vectors)
        candidates = {name: max(limit, least) for name, least in _LEAST_CANDIDATES.items()}
        found: list[list[Hit]] = []
        step = max(1, MOST_HITS // limit)
        for start in range(0, len(data), step):
            answer = self._request(
                "search",
                data=data[start : start + step],
                anns_field="vector",
                filter=condition,
                limit=limit,
                output_fields=list(METADATA),
                search_params={"metric_type": "IP", "params": candidates},
                **self._read,
            )
            for line in answer:
                hits = [
                    Hit(id=hit["id"], score=hit["distance"], item=self.item(hit["entity"]))
                    for hit in line
                ]
                found.append(sorted(hits, key=lambda hit: (-hit.score, hit.id)))
        return found

    def item(self, row: Mapping[str, Any]) -> Item:
        """Return the item of a row."""
        return read_item(item_from_row, row, self.location.text)

    def rows_of(self, ids: Sequence[int], fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield fields of those of these rows that are there."""
        for start in range(0, len(ids), _AT_A_TIME):
            yield from self.rows(expression_of_ids(ids[start : start + _AT_A_TIME]), fields)

    def known(self, ids: Sequence[int]) -> dict[int, Known]:
        """Return which of these rows are there, with what a row that replaces them keeps.

        The first call waits for what others wrote or deleted before. Later ones do not wait: what
        others do meanwhile may be missing for some moments.
        """
        known: dict[int, Known] = {}
        for start in range(0, len(ids), _AT_A_TIME):
            found = self._request(
                "query",
                filter=expression_of_ids(ids[start : start + _AT_A_TIME]),
                output_fields=["id", "key", "camera", "added"],
                consistency_level="Bounded" if self._has_waited else "Strong",
                **self._timeout,
            )
            self._has_waited = True
            known |= {row["id"]: Known(row["key"], row["camera"], row["added"]) for row in found}
        self._recent.update(known, ids)
        return known

    def check_model(self) -> None:
        """Refuse a collection that was dropped and made again for another model since `open`."""
        description = self._insist(
            lambda client: client.describe_collection(self._name, **self._timeout)
        )
        found = _read_meta(self.location, description)
        if found.fingerprint != self.meta.fingerprint or found.embed_dim != self.meta.embed_dim:
            raise IntegrityError(
                f"gallery {self.location.text} was replaced while it was open and now holds "
                "embeddings of another model, nothing was stored: use the bundle it was made with, "
                f"or name another with  --gallery  (expected {self.meta.fingerprint}, found "
                f"{found.fingerprint})",
                code="gallery_of_other_model",
                path=self.location.text,
                expected=self.meta.fingerprint,
                found=found.fingerprint,
            )

    def write(self, rows: Mapping[int, dict[str, Any]], known: Mapping[int, Known]) -> None:
        """Add rows by id, or replace those that are there, in one request."""
        self._request("upsert", data=list(rows.values()), **self._timeout)
        self._recent.record({id_: known[id_] for id_ in rows})

    def delete(self, ids: Sequence[int]) -> int:
        """Delete rows that are there; return how many."""
        for start in range(0, len(ids), _AT_A_TIME):
            part = list(ids[start : start + _AT_A_TIME])
            self._request("delete", ids=part, **self._timeout)
            self._recent.record(dict.fromkeys(part))
        return len(ids)

    def make_index(self) -> None:
        """Make the index that the location asks for, in place of any other."""
        with self.writing, self.client() as client:
            client.flush(self._name)
            _make_index(client, self.location)

    def index_kind(self) -> str:
        """Return the kind of index that there is, in lower case."""
        with self.client() as client:
            (name, *_) = client.list_indexes(self._name)
            return str(client.describe_index(self._name, name)["index_type"]).lower()


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
            f"{version}: leave vectors=float16 out",
            code="float16_unsupported",
        )
    meta = MilvusMeta(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint,
        embed_dim=embed_dim,
        vectors=kind,
        **made_now(),
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


def _read_meta(location: MilvusLocation, description: dict[str, Any]) -> MilvusMeta:
    no_gallery = IntegrityError(
        f"{location.text} is a collection, but not a gallery; it was left as it is: name another "
        "with  --gallery",
        code="not_a_gallery",
    )
    try:
        text = description["description"] or description["properties"][_NAME]
        values = json.loads(text)[_NAME]
        check_schema_version(location.text, int(values["schema_version"]), SCHEMA_VERSION)
        meta = MilvusMeta(**values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise no_gallery from error
    if not {field["name"] for field in description["fields"]} >= _FIELDS:
        raise no_gallery
    return meta


def _make_index(client: Any, location: MilvusLocation) -> None:
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


def _query(condition: str, fields: Sequence[str]) -> dict[str, Any]:
    return {"filter": condition or "id >= 0", "output_fields": [*fields, "id"]}
