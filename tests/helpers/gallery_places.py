"""Places where a gallery can be, one for each store, so that one suite runs on all of them."""

import itertools
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.sqlite.schema import GUARD

if TYPE_CHECKING:
    from tests.helpers.milvus_server import MilvusServer

DIM = 16
FINGERPRINT = "fp-of-the-suite"


class Place(ABC):
    """Locations of one store."""

    @abstractmethod
    def unused(self) -> str:
        """Return the location of a gallery that has not been made."""

    def empty(self) -> str:
        """Return the location of a gallery of DIM and FINGERPRINT that holds nothing."""
        location = self.unused()
        self.open(location, create=True).close()
        return location

    def open(self, location: str, **options: Any) -> Gallery:
        return Gallery.open(location, FINGERPRINT, DIM, **options)


class Folders(Place):
    """SQLite: a folder for each gallery."""

    def __init__(self, folder: Path) -> None:
        self._names = (str(folder / str(number)) for number in itertools.count())

    def unused(self) -> str:
        return next(self._names)


class Memory(Place):
    """The example of a store: galleries in this process."""

    _numbers = itertools.count()

    def unused(self) -> str:
        return f"memory://contract_{next(self._numbers)}"


class Milvus(Place):
    """One collection, emptied for each test: making one takes seconds.

    Args:
        address: For locations, ``milvus://...`` without the collection.
        uri: For `pymilvus.MilvusClient`, the same.
    """

    _numbers = itertools.count()

    def __init__(self, address: str, uri: str) -> None:
        self.address = address
        self._uri = uri
        self._shared: str | None = None

    def unused(self) -> str:
        return f"{self.address}/contract_{next(self._numbers)}"

    def empty(self) -> str:
        if self._shared is None:
            self._shared = self.unused()
            self.open(self._shared, create=True).close()
            return self._shared
        with self.client() as client:
            client.delete(self._shared.rsplit("/", 1)[1], filter="id >= 0")
        return self._shared

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Give a client that knows nothing of galleries."""
        from pymilvus import MilvusClient

        client = MilvusClient(self._uri, dedicated=True)
        try:
            yield client
        finally:
            client.close()


class MilvusOnServer(Milvus):
    """The same on a server of its own, started by the tests that need it.

    Args:
        server: Not started yet.
    """

    def __init__(self, server: "MilvusServer") -> None:
        address = f"127.0.0.1:{server.port}"
        super().__init__(f"milvus://{address}", f"http://{address}")
        self.server = server


def unit(*rows: Any) -> NDArray[np.float32]:
    """Return rows as (N, DIM) unit vectors; a number is an axis, a tuple the first coordinates."""
    vectors = np.zeros((len(rows), DIM), np.float32)
    for vector, row in zip(vectors, rows, strict=True):
        if isinstance(row, int):
            vector[row] = 1
        else:
            vector[: len(row)] = row
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def some_vectors(count: int, seed: int = 0, dim: int = DIM) -> NDArray[np.float32]:
    """Return (count, dim) random unit vectors."""
    vectors = np.random.default_rng(seed).normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def sql(folder: Path, statement: str, *values: object) -> list[Any]:
    """Run a statement on the database of a gallery in a folder, behind the gallery's back."""
    with closing(sqlite3.connect(folder / "gallery.sqlite")) as connection, connection:
        connection.create_function(GUARD, 0, lambda: None)
        return connection.execute(statement, values).fetchall()


def keys_of(items: Any) -> list[str]:
    """Return the sorted keys of items or hits."""
    return sorted(entry.key if isinstance(entry, Item) else entry.item.key for entry in items)
