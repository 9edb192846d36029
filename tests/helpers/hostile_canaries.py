"""Golden samples with right hashes that no export writes."""

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tests.helpers.hostile_changes import Change, changed

Arrays: TypeAlias = dict[str, NDArray[Any]]


def _npy_of(array: NDArray[Any]) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def _zip(files: Mapping[str, NDArray[Any] | bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            packed = content if isinstance(content, bytes) else _npy_of(content)
            archive.writestr(f"{name}.npy", packed)
    return target.getvalue()


def _canaries(change: Callable[[Arrays], Mapping[str, NDArray[Any] | bytes]]) -> Change:
    """Replace some arrays of ``canaries.npz``, or their files."""

    def made(content: bytes) -> bytes:
        with np.load(io.BytesIO(content)) as archive:
            arrays = dict(archive)
        return _zip(arrays | change(arrays))

    return changed("canaries.npz", made)


def _header(header: str) -> Change:
    text = header.encode("latin-1") + b"\n"
    start = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
    return _canaries(lambda _: {"images": start + bytes(4 * 24 * 8 * 3)})


def _fields(descr: str = "'|u1'", shape: str = "(4, 24, 8, 3)", fortran: str = "False") -> Change:
    return _header(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}")


def _values(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    """Change the numbers in an array of ``canaries.npz``."""
    return _canaries(lambda arrays: {name: change(arrays[name]).astype(arrays[name].dtype)})


def _filled(name: str, value: float) -> Change:
    """Fill an array with one number."""
    return _values(name, lambda array: np.full_like(array, value))


def _archive(change: Callable[[bytearray], bytes | bytearray]) -> Change:
    """Change the bytes of the archive, whose entries are packed."""
    pack = _canaries(lambda _: {})

    def made(folder: Path) -> None:
        pack(folder)
        changed("canaries.npz", lambda content: bytes(change(bytearray(content))))(folder)

    return made


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


def _thousands(arrays: Arrays) -> Arrays:
    """Return golden inputs for hours of a real model, each of which would be run alone."""
    return {name: np.resize(one, (100_000, *one.shape[1:])) for name, one in arrays.items()}


CANARIES = {
    "canaries: a directory of 600,000 entries": _archive(_many_entries),
    "canaries: 100,000 of each kind": _canaries(_thousands),
    "canaries: nothing in the archive": _archive(lambda _: _zip({})),
    "canaries: an empty file": _archive(lambda _: b""),
    "canaries: a bare array": _archive(lambda _: _npy_of(np.zeros((4, 24, 8, 3), np.uint8))),
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
    "canaries: embeddings of zero": _filled("image_embeds.int8", 0),
    "canaries: embeddings of 3e38": _filled("image_embeds.int8", 3e38),
    "canaries: embeddings of 1e-45": _filled("text_embeds.int8", 1e-45),
    "canaries: embeddings of the other tower": _values("image_embeds.int8", np.negative),
    "canaries: one embedding that is not a number": _values(
        "text_embeds.int8",
        lambda a: np.where(np.arange(a.size).reshape(a.shape) == 9, np.nan, a),
    ),
}  # fmt: skip
