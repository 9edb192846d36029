"""Places where a gallery can be, one for each store, so that one suite runs on all of them."""

import itertools
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.clips import clip_name, clips_dir
from upperson_rt.gallery.crops import name_with_hash
from upperson_rt.gallery.sqlite.schema import GUARD

DIM = 16
FINGERPRINT = "fp-of-the-suite"
START = 1_790_000_000.0
"""When `add_filmed` begins."""


class Place:
    """Locations of one store, which begin alike."""

    _numbers = itertools.count()

    def __init__(self, start: str) -> None:
        self._start = start

    def unused(self) -> str:
        return f"{self._start}{next(self._numbers)}"

    def empty(self) -> str:
        """Return the location of a gallery of DIM and FINGERPRINT that holds nothing."""
        location = self.unused()
        self.open(location, create=True).close()
        return location

    def open(self, location: str, **options: Any) -> Gallery:
        return Gallery.open(location, FINGERPRINT, DIM, **options)


class Milvus(Place):
    """One collection, emptied for each test: making one takes seconds."""

    def __init__(self, address: str, uri: str) -> None:
        super().__init__(f"{address}/contract_")
        self.address = address
        self._uri = uri
        self._shared: str | None = None

    def empty(self) -> str:
        if self._shared is None:
            self._shared = super().empty()
        with self.client() as client:
            client.delete(self._shared.rsplit("/", 1)[1], filter="id >= 0")
        return self._shared

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Give a client that knows nothing of galleries."""
        from pymilvus import MilvusClient

        with closing(MilvusClient(self._uri, dedicated=True)) as client:
            yield client


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
    vectors = np.random.default_rng(seed).normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def items_of(numbers: Iterable[int | str], **fields: Any) -> list[Item]:
    """Return items with keys ``k0``, ... or as given; a field may be a function of the number."""
    return [
        Item(
            key=one if isinstance(one, str) else f"k{one}",
            **{name: value(one) if callable(value) else value for name, value in fields.items()},
        )
        for one in numbers
    ]


def put(
    gallery: Gallery,
    numbers: Iterable[int | str],
    seed: int = 0,
    variant: str | None = None,
    **fields: Any,
) -> list[str]:
    """Add `items_of` with `some_vectors`."""
    items = items_of(numbers, **fields)
    return gallery.add(items, some_vectors(len(items), seed, gallery.embed_dim), variant)


def save(folder: Path, *names: str, content: bytes = b"jpeg") -> None:
    """Write files in a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def add_filmed(gallery: Gallery, *names: str) -> None:
    """Add pictures ``CAMERA/TRACK/SECONDS`` with crop, frame and a clip of 10 s."""
    crops = gallery.crops_dir
    assert crops is not None
    for name in names:
        camera, track, seconds = name.split("/")
        at = START + float(seconds)
        crop = f"{camera}/day/{name_with_hash(f'{track}-{seconds}', name.encode())}"
        save(crops, crop, content=name.encode())
        clips = clip_name(crop, ".jpg", at), clip_name(crop, ".mp4", at - 5, at + 5)
        save(clips_dir(crops), *clips, content=name.encode())
        columns = {"camera": camera, "track": track, "time": at, "crop": crop}
        more = {"box": (1, 2, 3, 4), "attributes": {"floor": 2, "deleted": "no"}}
        put(gallery, [name], len(name) + int(float(seconds)), "int8", **columns, **more)


def open_new(folder: str | Path, dim: int = DIM, create: bool = True) -> Gallery:
    """Open the gallery of a folder; make it if need be."""
    return Gallery.open(folder, FINGERPRINT, dim, create)


def sql(folder: Path, statement: str, *values: object) -> list[Any]:
    """Run a statement on the database of a gallery in a folder, behind the gallery's back."""
    with closing(sqlite3.connect(folder / "gallery.sqlite")) as connection, connection:
        connection.create_function(GUARD, 0, lambda: None)
        return connection.execute(statement, values).fetchall()


def keys_of(items: Any) -> list[str]:
    return sorted(entry.key if isinstance(entry, Item) else entry.item.key for entry in items)
