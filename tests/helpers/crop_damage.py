"""Manipulates crops of a gallery at random, and has `verify`, an export and a sheet look at each.

    python -m tests.helpers.crop_damage --trials 800 --seed 1

`verify` must name the item of each file that changed, an export must be refused, and a picture must
not be drawn.
"""

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.crops import name_with_hash, use_picture
from upperson_rt.gallery.export import export_gallery


def jpeg(rng: np.random.Generator, folder: Path) -> bytes:
    """Return a picture of random colours as JPEG."""
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
        content = jpeg(rng, folder.parent)
        name = name_with_hash(f"{number:06d}", content)
        (folder / name).write_bytes(content)
        files.append(folder / name)
        items.append(Item(key=f"{number:06d}", camera="gate", crop=f"gate/{name}"))
    (folder.parent / "made.jpg").unlink()
    gallery.add(items, some_vectors(crops))
    return files


def _swap(rng: np.random.Generator, one: Path, other: Path) -> list[Path]:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return [one, other]


def _cut(rng: np.random.Generator, one: Path, other: Path) -> list[Path]:
    os.truncate(one, int(rng.integers(1, one.stat().st_size)))
    return [one]


def _empty(rng: np.random.Generator, one: Path, other: Path) -> list[Path]:
    one.write_bytes(b"")
    return [one]


def _replace(rng: np.random.Generator, one: Path, other: Path) -> list[Path]:
    one.write_bytes(jpeg(rng, one.parent.parent.parent))
    return [one]


def _flip(rng: np.random.Generator, one: Path, other: Path) -> list[Path]:
    content = bytearray(one.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    times = one.stat()
    one.write_bytes(content)
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    return [one]


def _append(rng: np.random.Generator, one: Path, other: Path) -> list[Path]:
    with one.open("ab") as file:
        file.write(rng.bytes(int(rng.integers(1, 100))))
    return [one]


def _hard_link(rng: np.random.Generator, one: Path, other: Path) -> list[Path]:
    one.unlink()
    one.hardlink_to(other)
    return [one]


def _link(rng: np.random.Generator, one: Path, other: Path) -> list[Path]:
    one.unlink()
    one.symlink_to(other)
    return [one]


def _link_to_copy(rng: np.random.Generator, one: Path, other: Path) -> list[Path]:
    copy = one.parent.parent.parent / "copy.jpg"
    copy.write_bytes(one.read_bytes())
    one.unlink()
    one.symlink_to(copy)
    return [one]


def _remove(rng: np.random.Generator, one: Path, other: Path) -> list[Path]:
    one.unlink()
    return [one]


KINDS: dict[str, Callable[[np.random.Generator, Path, Path], list[Path]]] = {
    "swap": _swap,
    "cut": _cut,
    "empty": _empty,
    "replace": _replace,
    "flip one bit": _flip,
    "append": _append,
    "hard link": _hard_link,
    "symbolic link": _link,
    "symbolic link to a copy": _link_to_copy,
    "remove": _remove,
}


def missed(gallery: Gallery, files: list[Path], kind: str, rng: np.random.Generator) -> list[str]:
    """Manipulate a crop, or two; return what did not find it, then put all back."""
    one, other = (files[place] for place in rng.choice(len(files), 2, replace=False))
    before = {file: file.read_bytes() for file in (one, other)}
    changed = KINDS[kind](rng, one, other)
    blind = []
    named = [line.split(":")[0] for line in gallery.verify()]
    if sorted(named) != sorted(f"item {file.name[:6]}" for file in changed):
        blind.append(f"verify: {named}")
    if kind != "remove" and not _is_refused(gallery):
        blind.append("export")
    for file in changed:
        try:
            use_picture(file, lambda pixels: None)
        except (IntegrityError, InputError):
            continue
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


def _trials(folder: Path, trials: int, seed: int) -> int:
    rng, counts = np.random.default_rng(seed), Counter[str]()
    with Gallery.open(folder / "gallery", FINGERPRINT, DIM, create=True) as gallery:
        files = fill(gallery, 30, seed)
        for number in range(trials):
            kind = list(KINDS)[number % len(KINDS)]
            blind = missed(gallery, files, kind, rng)
            counts[f"{kind}: {'missed by ' + ', '.join(blind) if blind else 'found'}"] += 1
        sound = gallery.verify() == []
    for outcome, count in sorted(counts.items()):
        print(f"{count:6}  {outcome}")
    print("sound at the end" if sound else "not sound at the end")
    return int(not sound or any("missed" in outcome for outcome in counts))


def main() -> int:
    """Run what the command line says; 1 if a manipulation was not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return _trials(Path(folder), given.trials, given.seed)


if __name__ == "__main__":
    raise SystemExit(main())
