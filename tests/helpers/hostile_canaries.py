"""Golden samples with right hashes that no export writes."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tests.helpers.toy_bundle import HEIGHT_PX, WIDTH_PX, replace_in_bundle

Change: TypeAlias = Callable[[Path], None]
"""Makes a sound bundle a hostile one."""


_IMAGE = (HEIGHT_PX, WIDTH_PX, 3)


def _arrays(folder: Path) -> dict[str, NDArray[Any]]:
    with np.load(folder / "canaries.npz") as archive:
        return {name: archive[name] for name in archive.files}


def _npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content


def _zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.npy", content)
    return target.getvalue()


def _written(array: NDArray[Any]) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def _canaries(change: Callable[[dict[str, bytes]], None]) -> Change:
    """Change the files inside of ``canaries.npz``."""

    def changed(folder: Path) -> None:
        files = {name: _written(array) for name, array in _arrays(folder).items()}
        change(files)
        replace_in_bundle(folder, "canaries.npz", _zip(files))

    return changed


def _header(header: str) -> Change:
    return _canaries(lambda files: files.update(images=_npy(header, bytes(4 * 24 * 8 * 3))))


def _fields(descr: str = "'|u1'", shape: str = "(4, 24, 8, 3)", fortran: str = "False") -> Change:
    return _header(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}")


def _values(**change: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    """Change the numbers in some arrays of ``canaries.npz``."""

    def changed(folder: Path) -> None:
        arrays = _arrays(folder)
        for name, function in change.items():
            key = name.replace("__", ".")
            arrays[key] = function(arrays[key]).astype(arrays[key].dtype)
        files = {name: _written(array) for name, array in arrays.items()}
        replace_in_bundle(folder, "canaries.npz", _zip(files))

    return changed


def _filled(name: str, value: float) -> Change:
    """Fill an array with one number."""
    return _values(**{name: lambda array: np.full_like(array, value)})


def _archive(change: Callable[[bytearray], bytes | bytearray]) -> Change:
    """Change the bytes of a zip file with four stored or packed entries and more."""

    def changed(folder: Path) -> None:
        files = {name: _written(array) for name, array in _arrays(folder).items()}
        replace_in_bundle(folder, "canaries.npz", bytes(change(bytearray(_zip(files)))))

    return changed


def _in_directory(offset: int, content: bytes) -> Change:
    """Overwrite the same field of all entries of the archive's directory."""

    def change(archive: bytearray) -> bytearray:
        at = archive.find(b"PK\1\2")
        while at >= 0:
            archive[at + offset : at + offset + len(content)] = content
            at = archive.find(b"PK\1\2", at + 4)
        return archive

    return _archive(change)


def _many_entries(archive: bytearray) -> bytes:
    """Return an archive whose directory takes nearly all that golden samples may."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", *[0] * 9, 6, *[0] * 6) + b"a/b/c/"
    count = (31 << 20) // len(entry)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    size = count * len(entry)
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, 0)
    place = struct.pack("<4sIQI", b"PK\6\7", 0, size, 1)
    return entry * count + end64 + place + end


def _thousands(folder: Path) -> None:
    """Golden inputs for hours of a real model, each of which would be run alone."""
    count = 100_000
    arrays = {
        name: np.resize(array, (count, *array.shape[1:])) for name, array in _arrays(folder).items()
    }
    files = {name: _written(array) for name, array in arrays.items()}
    replace_in_bundle(folder, "canaries.npz", _zip(files))


CANARIES = {
    "canaries: a directory of 600,000 entries": _archive(_many_entries),
    "canaries: 100,000 of each kind": _thousands,
    "canaries: nothing in the archive": lambda f: replace_in_bundle(f, "canaries.npz", _zip({})),
    "canaries: an empty file": lambda f: replace_in_bundle(f, "canaries.npz", b""),
    "canaries: a bare array": _archive(lambda _: _written(np.zeros((4, *_IMAGE), np.uint8))),
    "canaries: only the end of an archive": _archive(lambda content: content[-22:]),
    "canaries: entries that begin where none is": _in_directory(42, b"\xff\xff\xff\x7f"),
    "canaries: entries that all begin at the first": _in_directory(42, bytes(4)),
    "canaries: other checksums": _in_directory(16, b"\1\2\3\4"),
    "canaries: entries of nothing": _in_directory(24, bytes(4)),
    "canaries: a version of zip to come": _in_directory(6, b"\xff\xff"),
    "canaries: names of a lone byte": _in_directory(28, b"\1\0"),
    "canaries: patched data": _in_directory(8, b"\x20\0"),
    "canaries: strongly encrypted": _in_directory(8, b"\x41\0"),
    "canaries: cut off within the directory": _archive(lambda content: content[:-60]),
    "canaries: a shape of truths": _fields(shape="(True, 24, 8, 3)"),
    "canaries: a shape of fractions": _fields(shape="(4.0, 24, 8, 3)"),
    "canaries: a shape below zero": _fields(shape="(-4, 24, -8, 3)"),
    "canaries: a shape of 3,000 digits": _fields(shape=f"({'9' * 3000}, 24, 8, 3)"),
    "canaries: a shape of 3,000 axes": _fields(shape=f"({'1,' * 3000})"),
    "canaries: a shape that overflows to what is there": _fields(shape=f"({2**62 + 4}, 24, 8, 3)"),
    "canaries: a shape of text": _fields(shape="'abcd'"),
    "canaries: a shape in a shape": _fields(shape="((4, 24), 8, 3)"),
    "canaries: records": _fields(descr="[('a', '|u1')]"),
    "canaries: records in records": _fields(descr="[('a', [('b', [('c', '|u1')])])]"),
    "canaries: elements that are arrays": _fields(descr="('|u1', (1, 1))"),
    "canaries: texts of a billion characters": _fields(descr="'<U1000000000'"),
    "canaries: times": _fields(descr="'<M8[ns]'"),
    "canaries: no bytes an element": _fields(descr="'|V0'"),
    "canaries: in the order of Fortran": _fields(fortran="True"),
    "canaries: an order that is neither": _fields(fortran="'yes'"),
    "canaries: a call for a header": _header("__import__('os').abort()"),
    "canaries: a header of brackets": _header("(" * 9000),
    "canaries: a header of minus signs": _header("-" * 9000 + "1"),
    "canaries: a header of 60,000 bytes": _fields(shape="(4, 24, 8, 3)" + " " * 60_000),
    "canaries: a header with a null": _header("{'descr': '|u1\0'"),
    "canaries: tokens of no vocabulary": _filled("input_ids", 2**31 - 1),
    "canaries: tokens below zero": _filled("input_ids", -(2**31)),
    "canaries: no token": _filled("input_ids", 0),
    "canaries: embeddings of zero": _filled("image_embeds__int8", 0),
    "canaries: embeddings of 3e38": _filled("image_embeds__int8", 3e38),
    "canaries: embeddings of 1e-45": _filled("text_embeds__int8", 1e-45),
    "canaries: embeddings of the other tower": _values(image_embeds__int8=lambda a: -a),
    "canaries: one embedding that is not a number": _values(
        text_embeds__int8=lambda a: np.where(np.arange(a.size).reshape(a.shape) == 9, np.nan, a)
    ),
}  # fmt: skip
