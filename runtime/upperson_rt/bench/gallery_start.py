"""What it takes to open a gallery: a fresh process opens it and searches once, then a lot.

python -m upperson_rt.bench.gallery_start FOLDER QUERIES.npy
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from upperson_rt.bench.fresh_process import run_module
from upperson_rt.bench.startup import peak_rss_bytes

__all__ = ["GalleryStart", "measure_gallery_start"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryStart:
    """Of a fresh process."""

    open_s: float
    """`Gallery.open`; the index is not loaded yet."""
    first_search_s: float
    """Includes the import of faiss, and reading and checking the file of the index."""
    peak_rss_bytes: int | None
    """Most memory ever resident, after all queries; None where the system does not tell."""


def measure_gallery_start(folder: Path, queries: Path) -> GalleryStart:
    """Run it in a process of its own.

    Raises:
        BackendError: The process ends with an error.
    """
    return GalleryStart(**run_module(__name__, str(folder), str(queries)))


def _main(folder: str, queries: str) -> None:
    from upperson_rt.gallery import Gallery

    rows = np.load(queries)
    began = time.perf_counter()
    with Gallery.open(folder) as gallery:
        opened = time.perf_counter()
        gallery.search(rows[:1], 10)
        searched = time.perf_counter()
        for row in rows:
            gallery.search(row[None], 10)
    start = GalleryStart(
        open_s=opened - began,
        first_search_s=searched - opened,
        peak_rss_bytes=peak_rss_bytes(),
    )
    sys.stdout.write(json.dumps(asdict(start)) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
