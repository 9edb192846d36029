"""A gallery as plain files: vectors for numpy, metadata as CSV and, with pyarrow, as Parquet."""

import csv
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from upperson_rt.arguments import check_callable
from upperson_rt.errors import InputError
from upperson_rt.files import all_names, new_folder
from upperson_rt.gallery.crops import picture_file, read_crop
from upperson_rt.gallery.protocol import Gallery
from upperson_rt.gallery.records import Filter, Item

_COLUMNS = (
    "key", "source", "camera", "time", "track", "x0", "y0", "x1", "y1", "crop", "attributes",
)  # fmt: skip
_FACTS, _VECTORS, _CSV, _PARQUET = "gallery.json", "vectors.npy", "items.csv", "items.parquet"
_FILES = frozenset((_FACTS, _VECTORS, _CSV, _PARQUET))


@dataclass(frozen=True)
class Exported:
    """What `export_gallery` wrote."""

    items: int
    files: list[Path]


def export_gallery(
    gallery: Gallery,
    folder: Path,
    where: Filter | None = None,
    progress: Callable[[int], None] | None = None,
) -> Exported:
    """Write the items that pass into a folder, completely or not at all.

    ``vectors.npy`` is (N, D) float32; row n belongs to line n of ``items.csv`` (after its header)
    and of ``items.parquet``, which is written where pyarrow is installed. ``gallery.json`` says
    where they are from. Crops stay where they are; each that is there is checked.

    Args:
        gallery: Other processes may add to it meanwhile.
        folder: New, empty, or an earlier export, which is replaced.
        where: Only items that pass.
        progress: Called with the number of items written so far.

    Raises:
        InputError: The folder holds something else, or cannot be written to.
        IntegrityError: The gallery is damaged, or a crop was altered.
    """
    if progress is not None:
        check_callable(progress, "progress")
    try:
        with new_folder(folder, _unowned_files) as temporary, ExitStack() as stack:
            done = 0
            vectors = stack.enter_context(open(temporary / _VECTORS, "wb"))
            header = {"descr": "<f4", "fortran_order": False}
            # Numpy leaves room for the number of rows, which is known at the end.
            write_header = np.lib.format.write_array_header_1_0
            write_header(vectors, header | {"shape": (0, gallery.embed_dim)})
            table = csv.writer(
                stack.enter_context(open(temporary / _CSV, "w", encoding="utf-8", newline=""))
            )
            table.writerow(_COLUMNS)
            parquet = _parquet_writer(temporary / _PARQUET, stack)
            for items, rows in gallery.vectors(where):
                for item in items:
                    crop = item.crop and picture_file(item, gallery.crops_dir)
                    if crop:
                        read_crop(crop)
                vectors.write(rows.astype("<f4").tobytes())
                values = [_values(item) for item in items]
                table.writerows(values)
                if parquet is not None:
                    parquet(values)
                done += len(items)
                if progress is not None:
                    progress(done)
            vectors.seek(0)
            write_header(vectors, header | {"shape": (done, gallery.embed_dim)})
            facts = {
                "gallery": gallery.location,
                "fingerprint": gallery.fingerprint,
                "embed_dim": gallery.embed_dim,
                "items": done,
            }
            (temporary / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    return Exported(done, sorted(folder.iterdir()))


def _values(item: Item) -> tuple[Any, ...]:
    return (
        item.key,
        item.source,
        item.camera,
        item.time,
        item.track,
        *(item.box or (None,) * 4),
        item.crop,
        json.dumps(dict(item.attributes), ensure_ascii=False),
    )


def _parquet_writer(
    path: Path, stack: ExitStack
) -> Callable[[Sequence[tuple[Any, ...]]], None] | None:
    """Return a function that writes rows, or None without pyarrow."""
    if find_spec("pyarrow") is None:
        return None
    pa: Any = import_module("pyarrow")
    pq: Any = import_module("pyarrow.parquet")

    kinds = {"time": pa.float64(), **dict.fromkeys(("x0", "y0", "x1", "y1"), pa.int64())}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in _COLUMNS])
    # Opened here: pyarrow takes no path that is not Unicode.
    file = stack.enter_context(open(path, "wb"))  # noqa: SIM115 - The stack closes it.
    writer = stack.enter_context(pq.ParquetWriter(file, schema))

    def write(rows: Sequence[tuple[Any, ...]]) -> None:
        columns = [
            pa.array(column, kind)
            for column, kind in zip(zip(*rows, strict=True), schema.types, strict=True)
        ]
        writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    return write


def _unowned_files(folder: Path) -> set[str]:
    names = set(all_names(folder))
    return names - _FILES if names >= {_FACTS, _VECTORS, _CSV} else names
