"""What it takes to open a gallery: its own module, since its memory is that of a fresh process."""

import time
from typing import Any

import numpy as np

from upperson_machine.description import resident_bytes


def gallery_start(folder: str, queries: str) -> dict[str, Any]:
    """Open a gallery in this process and search it once, then for all queries of a .npy file.

    Returns:
        ``open_s``: the index is not loaded yet. ``first_search_s``: includes the import of faiss,
        and reading and checking the file of the index. ``peak_rss_bytes``: most memory ever
        resident, after all queries; None where the system does not tell.
    """
    from upperson_rt.gallery import Gallery

    rows = np.load(queries)
    began = time.perf_counter()
    with Gallery.open(folder) as gallery:
        opened = time.perf_counter()
        gallery.search(rows[:1], 10)
        searched = time.perf_counter()
        for row in rows:
            gallery.search(row[None], 10)
    return {
        "open_s": opened - began,
        "first_search_s": searched - opened,
        "peak_rss_bytes": resident_bytes("VmHWM"),
    }
