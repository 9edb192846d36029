"""Make a small bundle, and a gallery of its pictures, with the code of an earlier commit.

    git worktree add /tmp/fb9b085 fb9b085
    PYTHONPATH=/tmp/fb9b085:/tmp/fb9b085/runtime python tests/golden/fb9b085_files.py \
        tests/golden/fb9b085
"""

import shutil
import sys
import tempfile
from pathlib import Path

from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_rt import Bundle, Gallery, Item, load_image
from upperson_rt.gallery.sqlite import index


def main(folder: Path) -> None:
    """Write ``bundle`` and ``gallery`` with two pictures of each colour and a search index."""
    for name in ("bundle", "gallery"):
        shutil.rmtree(folder / name, ignore_errors=True)
    make_toy_bundle(folder / "bundle")
    index._SEAL_ROWS = 4
    encoder = Bundle.open(folder / "bundle", "fp32").encoder()
    with (
        tempfile.TemporaryDirectory() as pictures,
        Gallery.open(
            folder / "gallery", encoder.fingerprint, encoder.embed_dim, create=True
        ) as gallery,
    ):
        colours = [*COLOURS, *COLOURS]
        files = [
            draw_person(Path(pictures, f"{number}.png"), colour, seed=number)
            for number, colour in enumerate(colours)
        ]
        items = [
            Item(
                key=f"{colour}-{number}", camera=("gate", "hall", None)[number % 3],
                time=1.7e9 + number, track=f"t{number // 4}", box=(0, 0, 64, 192),
                attributes={"number": number},
            )
            for number, colour in enumerate(colours)
        ]  # fmt: skip
        vectors = encoder.encode_images([load_image(file) for file in files])
        gallery.add(items, vectors, variant="fp32")
        gallery.search(vectors[:1], 1)
        gallery.add(items[:1], vectors[:1], variant="fp32")
        gallery.delete([items[-1].key])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
