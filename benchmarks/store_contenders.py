"""Stores of vectors that `benchmarks.stores` compares, as their documentation shows them.

A store is in a folder and has the rows 0, 1, ... in the order of their insertion; ``rows`` is how
many it will have. Libraries are imported when it is opened: what they cost counts.

Shapes: N rows, D dimensions.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache
from importlib import import_module
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.month_data import Month, number_of
from upperson_rt.gallery import Filter, Gallery, Item

K = 10
BLOCK = 4096
COMMIT = 256
KILLED_ROWS = 4096
"""That a store has before it is filled and killed."""
_SAVE_ROWS = 65_536
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
Rows: TypeAlias = NDArray[np.float32]


class Where(NamedTuple):
    """A camera from one time on until before another, in unix seconds."""

    camera: str
    since: float
    until: float

    def __str__(self) -> str:
        """Return it as SQL."""
        return f"camera == '{self.camera}' and time >= {self.since!r} and time < {self.until!r}"


class _Store(Protocol):
    packages: tuple[str, ...]
    kind: str
    durable: str

    def __init__(self, folder: Path, dim: int, rows: int, create: bool) -> None: ...
    def insert(self, start: int, vectors: Rows, items: Sequence[Item]) -> None: ...
    def build(self) -> None: ...
    def search(self, query: Rows, where: Where | None) -> list[int]: ...
    def count(self) -> int: ...
    def close(self) -> None: ...


class _Ours:
    packages: tuple[str, ...] = ("upperson-rt", "faiss-cpu")
    kind = "exact, from 1,000,000 rows on IVF-RaBitQ and exact scores"
    durable = "SQLite transaction, synced"

    def __init__(self, folder: Path, dim: int, rows: int, create: bool) -> None:
        model = "sha256:" + 64 * "a"  # There is none.
        self._gallery, self._dim = Gallery.open(folder, model, dim, create=create), dim

    def insert(self, start: int, vectors: Rows, items: Sequence[Item]) -> None:
        self._gallery.add(items, vectors)

    def build(self) -> None:
        self.search(np.eye(1, self._dim, dtype=np.float32)[0], None)

    def search(self, query: Rows, where: Where | None) -> list[int]:
        chosen = None if where is None else Filter(**where._asdict())
        (hits,) = self._gallery.search(query[None], K, chosen)
        return [number_of(hit.item.key) for hit in hits]

    def count(self) -> int:
        return self._gallery.count()

    def close(self) -> None:
        self._gallery.close()


def _fields(item: Item) -> dict[str, Any]:
    return {name: getattr(item, name) for name in ("camera", "time", "track", "source")}


def _arrow(start: int, vectors: Rows, items: Sequence[Item]) -> Any:
    arrow = import_module("pyarrow")
    fields = arrow.Table.from_pylist([_fields(item) for item in items])
    fields = fields.append_column("id", arrow.array(range(start, start + len(items))))
    column = arrow.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
    return fields.append_column("vector", column)


class _LanceDB:
    packages: tuple[str, ...] = ("lancedb",)
    kind = "IVF-PQ with its defaults, 100 candidates re-ranked; bitmap and B-tree for the filter"
    durable = "new files, not synced"

    def __init__(self, folder: Path, dim: int, rows: int, create: bool) -> None:
        database = import_module("lancedb").connect(folder)
        if create:
            schema = _arrow(0, np.zeros((1, dim), np.float32), Month.items(0, 1)).schema
            self._table = database.create_table("rows", schema=schema)
        else:
            self._table = database.open_table("rows")

    def insert(self, start: int, vectors: Rows, items: Sequence[Item]) -> None:
        self._table.add(_arrow(start, vectors, items))
        if (start + len(items)) % _SAVE_ROWS == 0:  # Else each commit is slower than the last one.
            self._table.optimize(cleanup_older_than=timedelta(0))

    def build(self) -> None:
        self._table.optimize(cleanup_older_than=timedelta(0))
        self._table.create_index(metric="dot", vector_column_name="vector")
        self._table.create_scalar_index("camera", index_type="BITMAP")
        self._table.create_scalar_index("time", index_type="BTREE")

    def search(self, query: Rows, where: Where | None) -> list[int]:
        request = self._table.search(query).distance_type("dot").limit(K).refine_factor(10)
        if where is not None:
            request = request.where(str(where), prefilter=True)
        found: list[int] = request.select(["id", "_distance"]).to_arrow()["id"].to_pylist()
        return found

    def count(self) -> int:
        return int(self._table.count_rows())

    def close(self) -> None: ...


class _Chroma:
    packages: tuple[str, ...] = ("chromadb",)
    kind = "HNSW with its defaults"
    durable = "SQLite transaction"

    def __init__(self, folder: Path, dim: int, rows: int, create: bool) -> None:
        chroma = import_module("chromadb")
        settings = chroma.Settings(anonymized_telemetry=False)
        self._rows = chroma.PersistentClient(folder, settings=settings).get_or_create_collection(
            "rows", embedding_function=None, configuration={"hnsw": {"space": "ip"}}
        )

    def insert(self, start: int, vectors: Rows, items: Sequence[Item]) -> None:
        ids = [str(start + place) for place in range(len(items))]
        self._rows.add(ids=ids, embeddings=vectors, metadatas=[_fields(item) for item in items])

    def build(self) -> None: ...

    def search(self, query: Rows, where: Where | None) -> list[int]:
        chosen: dict[str, Any] | None = None
        if where is not None:
            times = [{"time": {"$gte": where.since}}, {"time": {"$lt": where.until}}]
            chosen = {"$and": [{"camera": where.camera}, *times]}
        found = self._rows.query(query_embeddings=query[None], n_results=K, where=chosen)
        return [int(id_) for id_ in found["ids"][0]]

    def count(self) -> int:
        return int(self._rows.count())

    def close(self) -> None: ...


class _SqliteVec:
    packages: tuple[str, ...] = ("sqlite-vec", "apsw")
    kind = "exact; cameras as partitions"
    durable = "SQLite transaction, synced"

    def __init__(self, folder: Path, dim: int, rows: int, create: bool) -> None:
        # Python's own sqlite3 may be built without extensions.
        self._database = import_module("apsw").Connection(str(folder / "rows.db"))
        self._database.enable_load_extension(True)
        import_module("sqlite_vec").load(self._database)
        self._database.execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL")
        if create:
            self._database.execute(
                f"CREATE VIRTUAL TABLE rows USING vec0(id integer primary key, vector float[{dim}] "
                "distance_metric=cosine, camera text partition key, time float, +track text, "
                "+source text)"
            )

    def insert(self, start: int, vectors: Rows, items: Sequence[Item]) -> None:
        rows = [
            (start + place, vector.tobytes(), *_fields(item).values())
            for place, (vector, item) in enumerate(zip(vectors, items, strict=True))
        ]
        with self._database:
            self._database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", rows)

    def build(self) -> None: ...

    def search(self, query: Rows, where: Where | None) -> list[int]:
        chosen = "" if where is None else f" AND {where}"
        sql = f"SELECT id FROM rows WHERE vector MATCH ? AND k = {K}{chosen}"
        return [id_ for (id_,) in self._database.execute(sql, (query.tobytes(),))]

    def count(self) -> int:
        return int(next(self._database.execute("SELECT count(*) FROM rows"))[0])

    def close(self) -> None:
        self._database.close()


class _DuckDB:
    packages: tuple[str, ...] = ("duckdb", "duckdb-extension-vss")
    kind = "HNSW with its defaults, made at the end; a filter drops what it found"
    durable = "transaction, synced"

    def __init__(self, folder: Path, dim: int, rows: int, create: bool) -> None:
        self._database, self._dim = import_module("duckdb").connect(folder / "rows.db"), dim
        with as_file(files("duckdb_extension_vss")) as package:
            (extension,) = package.glob("extensions/*/vss.duckdb_extension")
        self._database.execute(f"LOAD '{extension}'")
        self._database.execute("SET hnsw_enable_experimental_persistence = true")
        self._database.execute(f"SET threads = {len(os.sched_getaffinity(0))}")
        if create:
            self._database.execute(
                "CREATE TABLE rows (camera VARCHAR, time DOUBLE, track VARCHAR, source VARCHAR, "
                f"id BIGINT, vector FLOAT[{dim}])"
            )

    def insert(self, start: int, vectors: Rows, items: Sequence[Item]) -> None:
        self._database.register("added", _arrow(start, vectors, items))
        self._database.execute("INSERT INTO rows SELECT * FROM added")

    def build(self) -> None:
        self._database.execute("CREATE INDEX near ON rows USING HNSW (vector) WITH (metric = 'ip')")
        self._database.execute("CHECKPOINT")

    def search(self, query: Rows, where: Where | None) -> list[int]:
        chosen = "" if where is None else f" WHERE {where}"
        order = f"array_negative_inner_product(vector, ?::FLOAT[{self._dim}])"
        sql = f"SELECT id FROM rows{chosen} ORDER BY {order} LIMIT {K}"
        return [id_ for (id_,) in self._database.execute(sql, [query]).fetchall()]

    def count(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM rows").fetchone()[0])

    def close(self) -> None:
        self._database.close()


@cache
def _passing(columns: Path, where: Where) -> NDArray[np.int64]:
    """Return which rows pass: libraries without metadata leave that to their user."""
    with np.load(columns) as loaded:
        times, cameras = loaded["times"], loaded["cameras"]
    right = (times >= where.since) & (times < where.until) & (cameras == where.camera)
    return np.flatnonzero(right)


class _Usearch:
    packages: tuple[str, ...] = ("usearch",)
    kind = "HNSW of float16 with its defaults; rows that pass a filter are compared exactly"
    durable = f"nothing; the whole file every {_SAVE_ROWS:,} rows"

    def __init__(self, folder: Path, dim: int, rows: int, create: bool) -> None:
        self._file = folder / "rows.usearch"
        self._index = import_module("usearch.index").Index(ndim=dim, metric="ip", dtype="f16")
        if not create:
            self._index.load(str(self._file))

    def insert(self, start: int, vectors: Rows, items: Sequence[Item]) -> None:
        self._index.add(np.arange(start, start + len(vectors)), vectors, threads=2)
        if (start + len(items)) % _SAVE_ROWS == 0:
            self.build()

    def build(self) -> None:
        self._index.save(str(self._file))

    def search(self, query: Rows, where: Where | None) -> list[int]:
        if where is None:
            return [int(key) for key in self._index.search(query, K).keys]
        rows = _passing(self._file.parents[1] / "columns.npz", where)
        scores = np.asarray(self._index.get(rows), np.float32) @ query
        return [int(row) for row in rows[np.argsort(-scores)[:K]]]

    def count(self) -> int:
        return len(self._index)

    def close(self) -> None: ...


class _Faiss:
    packages: tuple[str, ...] = ("faiss-cpu",)
    kind = "IVF-SQ8, 2 sqrt(N) lists, 64 searched; a selector of rows for the filter"
    durable = _Usearch.durable

    def __init__(self, folder: Path, dim: int, rows: int, create: bool) -> None:
        self._faiss = faiss = import_module("faiss")
        self._file, self._waiting, lists = folder / "rows.faiss", list[Rows](), int(2 * rows**0.5)
        self._trained_with = min(rows, 40 * lists)  # Faiss asks for 39 a list.
        if create:
            bits, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            self._coarse = faiss.IndexFlatIP(dim)
            self._index = faiss.IndexIVFScalarQuantizer(self._coarse, dim, lists, bits, metric)
        else:
            self._index = faiss.read_index(str(self._file))

    def insert(self, start: int, vectors: Rows, items: Sequence[Item]) -> None:
        self._waiting.append(vectors)
        if self._index.is_trained or start + len(vectors) >= self._trained_with:
            rows, self._waiting = np.concatenate(self._waiting), []
            if not self._index.is_trained:
                self._index.train(rows)
            self._index.add(rows)
            if (start + len(items)) % _SAVE_ROWS == 0:
                self.build()

    def build(self) -> None:
        self._faiss.write_index(self._index, str(self._file))

    def search(self, query: Rows, where: Where | None) -> list[int]:
        chosen = None
        if where is not None:
            rows = _passing(self._file.parents[1] / "columns.npz", where)
            chosen = self._faiss.IDSelectorBatch(rows)
        searched = self._faiss.SearchParametersIVF(nprobe=64, sel=chosen)
        _, (found,) = self._index.search(query[None], K, params=searched)
        return [int(row) for row in found]

    def count(self) -> int:
        return int(self._index.ntotal)

    def close(self) -> None: ...


class _Milvus:
    packages: tuple[str, ...] = ("milvus", "pymilvus")
    kind = "standalone server; IVF-SQ8, 2,048 lists a segment, 64 searched"
    durable = "the server's log, not synced"

    def __init__(self, folder: Path, dim: int, rows: int, create: bool) -> None:
        # In a network namespace: the server listens on all interfaces, without a password.
        helper, pymilvus = import_module("tests.helpers.milvus_server"), import_module("pymilvus")
        self._server = helper.MilvusServer(folder / "data", folder.parent / "milvus-programs")
        self._server.start()
        self._client = pymilvus.MilvusClient(f"http://127.0.0.1:{self._server.port}")
        if create:
            schema, types = self._client.create_schema(), pymilvus.DataType
            schema.add_field("id", types.INT64, is_primary=True)
            schema.add_field("vector", types.FLOAT_VECTOR, dim=dim)
            schema.add_field("time", types.DOUBLE)
            for name in ("camera", "track", "source"):
                schema.add_field(name, types.VARCHAR, max_length=64)
            index = self._client.prepare_index_params()
            index.add_index("vector", "IVF_SQ8", metric_type="IP", params={"nlist": 2048})
            self._client.create_collection("rows", schema=schema, index_params=index)
        for _ in range(240):  # After a kill it says that it is healthy before it is ready.
            with suppress(pymilvus.MilvusException):
                self._client.load_collection("rows")
                break
            time.sleep(0.5)

    def insert(self, start: int, vectors: Rows, items: Sequence[Item]) -> None:
        rows = [
            {"id": start + place, "vector": vector, **_fields(item)}
            for place, (vector, item) in enumerate(zip(vectors, items, strict=True))
        ]
        self._client.insert("rows", rows)

    def build(self) -> None:
        self._client.flush("rows")
        while self._client.describe_index("rows", "vector")["pending_index_rows"]:
            time.sleep(0.5)
        self._client.refresh_load("rows")

    def search(self, query: Rows, where: Where | None) -> list[int]:
        chosen = "" if where is None else str(where)
        searched = {"metric_type": "IP", "params": {"nprobe": 64}}
        found = self._client.search("rows", [query], chosen, K, search_params=searched)
        return [hit["id"] for hit in found[0]]

    def count(self) -> int:
        found = self._client.query("rows", output_fields=["count(*)"], consistency_level="Strong")
        return int(found[0]["count(*)"])

    def close(self) -> None:
        self._client.close()
        self._server.kill()


STORES: dict[str, type[_Store]] = {
    "ours": _Ours,
    "LanceDB": _LanceDB,
    "Chroma": _Chroma,
    "usearch": _Usearch,
    "sqlite-vec": _SqliteVec,
    "DuckDB VSS": _DuckDB,
    "faiss IVF-SQ8": _Faiss,
    "Milvus": _Milvus,
}
"""By the name that is shown."""


def read_vectors(work: Path, dim: int, start: int, stop: int) -> Rows:
    """Return drawn rows as (N, D). Memory is the caller's: a mapped file would count as well."""
    count, offset = (stop - start) * dim, 2 * start * dim
    rows = np.fromfile(work / "vectors.f16", "<f2", count, offset=offset).reshape(-1, dim)
    return rows.astype(np.float32)


def _open(place: str, rows: int, create: bool = False) -> tuple[_Store, Path, dict[str, Any]]:
    work = Path(place).parent
    plan = json.loads((work / "plan.json").read_text())
    return STORES[Path(place).stem](Path(place), plan["dim"], rows, create), work, plan


def fill(place: str, rows: int) -> dict[str, float]:
    """Insert rows in commits and make the index; what drawing takes does not count."""
    store, work, plan = _open(place, rows, create=True)
    began, began_cpu, drawing, drawing_cpu = time.perf_counter(), _usage("cpu"), 0.0, 0.0
    for first in range(0, rows, BLOCK):
        before, before_cpu = time.perf_counter(), time.thread_time()
        vectors = read_vectors(work, plan["dim"], first, min(first + BLOCK, rows))
        items = Month.items(first, first + len(vectors))
        drawing += time.perf_counter() - before
        drawing_cpu += time.thread_time() - before_cpu
        for start in range(0, len(items), COMMIT):
            part = slice(start, start + COMMIT)
            store.insert(first + start, vectors[part], items[part])
    inserted, inserted_cpu = time.perf_counter(), _usage("cpu")
    store.build()
    result = {
        "rows_per_s": rows / (inserted - began - drawing),
        "cpu_us_per_row": 1e6 * (inserted_cpu - began_cpu - drawing_cpu) / rows,
        "build_s": time.perf_counter() - inserted,
        "build_cpu_s": _usage("cpu") - inserted_cpu,
        "peak_bytes": _usage("VmHWM"),
    }
    store.close()
    return result


def ask(place: str, rows: int) -> dict[str, float]:
    """Open and search on one processor; queries were asked once before they are timed."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    queries = np.load(Path(place).parent / "queries.npy")
    began = time.perf_counter()
    store, _, plan = _open(place, rows)
    store.search(queries[0], None)
    result = {"first_answer_s": time.perf_counter() - began}
    for prefix, where in ("", None), ("filter_", Where(*plan["where"])):
        for query in queries:
            store.search(query, where)
        times, right, cpu = list[float](), 0, _usage("cpu")
        for query, best in zip(queries, plan[f"{prefix}best"], strict=True):
            before = time.perf_counter()
            found = store.search(query, where)
            times.append(1e3 * (time.perf_counter() - before))
            right += len({*found} & {*best})
        result[f"{prefix}cpu_ms"] = 1e3 * (_usage("cpu") - cpu) / len(times)
        result[f"{prefix}recall"] = right / (K * len(times))
        for p in (50, 95):
            result[f"{prefix}p{p}_ms"] = float(np.percentile(times, p))
    result["rss_bytes"] = _usage("VmRSS")
    store.close()
    return result


def feed(place: str, start: int) -> None:
    """Add rows for ever, and print how many there should be after each commit."""
    store, work, plan = _open(place, KILLED_ROWS)
    while True:
        vectors = read_vectors(work, plan["dim"], first := start % BLOCK, first + COMMIT)
        store.insert(start, vectors, Month.items(start, start + COMMIT))
        start += COMMIT
        print(start, flush=True)


def count(place: str, newest: int) -> tuple[int, bool]:
    """Return how many rows a store has, and whether a search finds the row with this number."""
    store, work, plan = _open(place, KILLED_ROWS)
    (vector,) = read_vectors(work, plan["dim"], newest % BLOCK, newest % BLOCK + 1)
    result = store.count(), newest in store.search(vector, None)
    store.close()
    return result


def _usage(what: str) -> float:
    """Return processor seconds or resident bytes of this process and those that it started."""
    pids, total = [os.getpid()], 0.0
    for pid in pids:
        folder = Path(f"/proc/{pid}")
        for children in folder.glob("task/*/children"):
            pids += map(int, children.read_text().split())
        if what == "cpu":
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            total += _TICK_S * (int(fields[11]) + int(fields[12]))
        else:
            lines = (folder / "status").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(what))
    return total


if __name__ == "__main__":
    feed(sys.argv[1], int(sys.argv[2]))
