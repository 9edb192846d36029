"""Indexes pictures on a cluster of Ray, then joins the shards into one gallery.

    pip install './runtime[cpu,ray]'
    python index_on_ray.py bundle pictures/ shards/ gallery/

Run it again after it was interrupted: shards that are finished are left alone. Without a cluster it
starts one on this machine; ``RAY_ADDRESS`` names another.
"""

import sys
from pathlib import Path

from upperson_ray.index import index_on_ray
from upperson_shards.merge import merge_shards

SHARDS, WORKERS = 16, 2


def main(bundle: str, pictures: str, output: str, gallery: str) -> None:
    """Index, then merge."""
    done = index_on_ray(
        bundle,
        [pictures],
        output,
        shards=SHARDS,
        workers=WORKERS,
        encoder={"threads": 1},
        progress=lambda done, total: print(f"{done} of {total} shards", file=sys.stderr),
    )
    merged = merge_shards(done.folders, Path(gallery))
    print(f"{merged.pictures} pictures: {merged.items.count} rows, {done.skipped} not usable")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: index_on_ray.py BUNDLE PICTURES SHARDS GALLERY")
    main(*sys.argv[1:])
