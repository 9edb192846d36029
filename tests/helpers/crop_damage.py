"""Manipulates crops of a gallery at random, and has `verify`, an export and a sheet look at each.

    python -m tests.helpers.crop_damage --trials 800 --seed 1

`verify` must name the item of each file that changed, an export must be refused, and a picture must
not be drawn.
"""

import os
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors
from tests.helpers.trials import parse, report
from upperson_maintenance.export import export_gallery
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.crops import name_with_hash, use_picture

KINDS = (
    "swap", "cut", "empty", "replace", "flip one bit", "append", "hard link", "symbolic link",
    "symbolic link to a copy", "remove",
)  # fmt: skip


def jpeg(rng: np.random.Generator, folder: Path) -> bytes:
    file = folder / "made.jpg"
    Image.fromarray(rng.integers(0, 255, (48, 16, 3), np.uint8)).save(file, "JPEG")
    return file.read_bytes()


def fill(gallery: Gallery, crops: int, seed: int = 0) -> list[Path]:
    """Add items with crops, and return the files of those."""
    rng = np.random.default_rng(seed)
    folder = Path(gallery.crops_dir, "gate")
    folder.mkdir(parents=True)
    items, files = [], []
    for number in range(crops):
        content = jpeg(rng, folder.parent.parent)
        name = name_with_hash(f"{number:06d}", content)
        (folder / name).write_bytes(content)
        files.append(folder / name)
        items.append(Item(key=f"{number:06d}", camera="gate", crop=f"gate/{name}"))
    gallery.add(items, some_vectors(crops))
    return files


def _manipulate(kind: str, one: Path, other: Path, rng: np.random.Generator) -> None:
    content, times = bytearray(one.read_bytes()), one.stat()
    outside = one.parent.parent.parent
    if kind == "swap":
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "cut":
        os.truncate(one, int(rng.integers(1, len(content))))
    elif kind == "empty":
        one.write_bytes(b"")
    elif kind == "replace":
        one.write_bytes(jpeg(rng, outside))
    elif kind == "flip one bit":
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        one.write_bytes(content)
        os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif kind == "append":
        one.write_bytes(content + rng.bytes(int(rng.integers(1, 100))))
    else:
        one.unlink()
        if kind == "hard link":
            one.hardlink_to(other)
        elif kind == "symbolic link":
            one.symlink_to(other)
        elif kind == "symbolic link to a copy":
            (outside / "copy.jpg").write_bytes(content)
            one.symlink_to(outside / "copy.jpg")


def missed(gallery: Gallery, files: list[Path], kind: str, rng: np.random.Generator) -> list[str]:
    """Manipulate a crop, or two; return what did not find it, then put all back."""
    one, other = (files[place] for place in rng.choice(len(files), 2, replace=False))
    before = {file: file.read_bytes() for file in (one, other)}
    _manipulate(kind, one, other, rng)
    changed = [one, other] if kind == "swap" else [one]
    blind = []
    named = [line.split(":")[0] for line in gallery.verify()]
    if sorted(named) != sorted(f"item {file.name[:6]}" for file in changed):
        blind.append(f"verify: {named}")
    if kind != "remove" and not _is_refused(gallery):
        blind.append("export")
    for file in changed:
        with suppress(IntegrityError, InputError):
            use_picture(file, lambda pixels: None)
            blind.append("picture")
    for file, content in before.items():
        file.unlink(missing_ok=True)
        file.write_bytes(content)
    return blind


def _is_refused(gallery: Gallery) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_gallery(gallery, Path(folder, "exported"))
        except IntegrityError:
            return not Path(folder, "exported").exists()
    return False


def main() -> int:
    """Run what the command line says; 1 if a manipulation was not found."""
    given = parse(__doc__, trials=500, seed=0)
    rng, counts = np.random.default_rng(given.seed), Counter[str]()
    with (
        tempfile.TemporaryDirectory() as folder,
        Gallery.open(Path(folder, "gallery"), FINGERPRINT, DIM, create=True) as gallery,
    ):
        files = fill(gallery, 30, given.seed)
        for number in range(given.trials):
            kind = KINDS[number % len(KINDS)]
            blind = missed(gallery, files, kind, rng)
            counts[f"{'missed by ' + ', '.join(blind) if blind else 'found'}: {kind}"] += 1
        counts["sound at the end" if gallery.verify() == [] else "not sound at the end"] += 1
    return report(counts, ("missed", "not sound"))


if __name__ == "__main__":
    raise SystemExit(main())
