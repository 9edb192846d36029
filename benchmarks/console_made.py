"""What the console's benchmark puts there before the server starts: rows, pictures, a log."""

import datetime
import time
from pathlib import Path

import numpy as np
from PIL import Image

from upperson_rt.bundle import Bundle
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.log_chain import sealed, write_head

_AT_A_TIME = 10_000
_PICTURES = 200


def fill_gallery(place: Path, bundle: Bundle, rows: int) -> float:
    """Make a gallery of random rows, a part at a time; return the seconds that took."""
    began = time.monotonic()
    rng = np.random.default_rng(0)
    dim = bundle.manifest.model.embed_dim
    with Gallery.open(place, bundle.manifest.fingerprint, dim, create=True) as gallery:
        if gallery.crops_dir is None:
            raise InputError(f"gallery {place} keeps no pictures")
        gallery.crops_dir.mkdir(exist_ok=True)
        for number in range(_PICTURES if rows else 0):
            noise = rng.integers(0, 256, (24, 8, 3), np.uint8)
            picture = Image.fromarray(noise).resize((128, 384))
            picture.save(gallery.crops_dir / f"{number}.jpg")
        for start in range(0, rows, _AT_A_TIME):
            count = min(_AT_A_TIME, rows - start)
            vectors = rng.normal(size=(count, dim)).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            gallery.add([_item(start + number) for number in range(count)], vectors)
        if rows:
            gallery.rebuild()  # A million and more get their approximate index here, once.
    return time.monotonic() - began


def _item(number: int) -> Item:
    track = number // 5
    return Item(
        key=f"r{number}",
        camera=f"old{track % 20}",
        time=1e9 + number,
        track=str(track),
        crop=f"{number % _PICTURES}.jpg",
    )


def write_log(path: Path, lines: int) -> None:
    """Write a log of so many searches, as the console would have, but to the disk once."""
    path.parent.mkdir(exist_ok=True)
    chain, moment = "", datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    with open(path, "wb") as file:
        for number in range(lines):
            moment += datetime.timedelta(seconds=20)
            entry = {
                "time": moment.isoformat(timespec="milliseconds"),
                "user": f"user{number % 7}",
                "action": "query",
                "sentence": f"woman in a red coat, {number}",
                "filter": {},
                "k": 24,
                "by_track": True,
                "gallery": "gallery",
                "ids": list(range(number, number + 24)),
                "details": {"order": "match", "from": 0},
            }
            line, chain = sealed(entry, chain, b"")
            file.write(line)
        size = file.tell()
    write_head(path, size, chain)
