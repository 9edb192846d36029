"""Golden samples: inputs with the embeddings they must give, stored inside a bundle.

Hashes show that a file is the one that was exported; golden samples show that this device, library
and driver compute the right thing with it.
"""

import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.agreement import is_constant, require_agreement
from upperson_rt.errors import IntegrityError
from upperson_rt.manifest import Manifest
from upperson_rt.printable import shortened
from upperson_rt.tokenizer import token_lengths
from upperson_rt.towers import Tower

_ODD, _LARGE = 3, 8
"""Batch sizes that are checked besides 1."""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_MOST_BYTES = 1 << 26
"""Of one array, unpacked."""
_MOST_SAMPLES = 64
"""Of each tower. Each is run by itself; exports write eight."""
_END, _END_BYTES = b"PK\5\6", 22
_END64, _END64_BYTES = b"PK\6\7", 20
_MOST_DIRECTORY_BYTES = 1 << 18
"""Of the archive's directory: all of it is read before any of its entries."""
_ADVICE = "try another backend or device, or  upperson-rt doctor; else export the bundle again"


@dataclass(frozen=True)
class GoldenSamples:
    """K golden inputs per tower, and the embeddings of one variant for them."""

    images: NDArray[np.uint8]
    """(K, H, W, 3) RGB."""
    input_ids: NDArray[np.int32]
    """(K, L), zero-padded."""
    image_embeds: NDArray[np.float32]
    """(K, D)."""
    text_embeds: NDArray[np.float32]
    """(K, D)."""

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], manifest: Manifest, variant: str
    ) -> "GoldenSamples":
        """Load `canaries.npz` of a bundle; one that is damaged or does not fit is refused."""
        size, dim = (manifest.image.height_px, manifest.image.width_px, 3), manifest.model.embed_dim
        wanted: dict[str, tuple[str, tuple[int | None, ...]]] = {
            "images": ("uint8", (None, *size)),
            "input_ids": ("int32", (None, None)),
            f"image_embeds.{variant}": ("float32", (None, dim)),
            f"text_embeds.{variant}": ("float32", (None, dim)),
        }
        try:
            _check_directory(path)
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
                if absent := [name for name in wanted if f"{name}.npy" not in names]:
                    raise _bad("array_missing", f"it lacks {', '.join(absent)}")
                arrays = [_read_array(archive, name, *wanted[name]) for name in wanted]
        except Exception as error:  # zipfile, zlib and numpy have a dozen kinds for bad content.
            raise IntegrityError(
                f"cannot read golden samples {os.fspath(path)}: "
                f"{str(error) or type(error).__name__}: export the bundle again",
                code="golden_samples_unreadable",
                path=os.fspath(path),
                reason=error.code if isinstance(error, IntegrityError) else "library",
            ) from error
        images, input_ids, image_embeds, text_embeds = arrays
        fits = (
            {len(array) for array in arrays} == {len(images)}
            and len(images) <= _MOST_SAMPLES
            and 0 < input_ids.shape[1] <= manifest.text.context_length
            and all(bool(np.isfinite(embeds).all()) for embeds in (image_embeds, text_embeds))
        )
        if not fits:
            message = (
                f"the golden samples in {os.fspath(path)} do not fit the manifest (expected images "
                f"uint8 (K, {size[0]}, {size[1]}, 3) with K up to {_MOST_SAMPLES}, input_ids "
                f"int32 (K, L) with L from 1 to {manifest.text.context_length} and finite "
                f"embeddings float32 (K, {dim})): export the bundle again"
            )
            raise IntegrityError(message, code="golden_samples_unfit", path=os.fspath(path))
        return cls(images, input_ids, image_embeds, text_embeds)


def _bad(code: str, problem: str) -> IntegrityError:
    return IntegrityError(problem, code=code)


def _check_directory(path: str | os.PathLike[str]) -> None:
    """Refuse an archive of so many entries that reading their names takes minutes."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - _END_BYTES - _END64_BYTES))
        content = file.read()
    end64, end = content[:-_END_BYTES], content[-_END_BYTES:]
    if not end.startswith(_END) or end64.startswith(_END64):
        raise _bad("no_archive", "it does not end like an archive that numpy writes")
    if (size_bytes := int.from_bytes(end[12:16], "little")) > _MOST_DIRECTORY_BYTES:
        problem = f"its directory has {size_bytes} bytes, expected at most {_MOST_DIRECTORY_BYTES}"
        raise _bad("directory_too_large", problem)


def _read_array(
    archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int | None, ...]
) -> NDArray[Any]:
    """Read an array of this type and shape (None: any number from 1); nothing else is unpacked."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.flag_bits & _ENCRYPTED or entry.compress_type not in _METHODS:
        problem = f"{name} is encrypted or packed by a method that numpy does not write"
        raise _bad("packed_otherwise", problem)
    with archive.open(entry) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise _bad("array_format", f"{name} is not in numpy's format 1.0")
        found, transposed, found_dtype = np.lib.format.read_array_header_1_0(file)
        fits = len(found) == len(shape) and all(
            size > 0 and wanted in (None, size) for size, wanted in zip(found, shape, strict=True)
        )
        if not fits or transposed or found_dtype != np.dtype(dtype):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            problem = f"{name} does not fit the manifest: expected {dtype} ({expected}), found "
            problem += f"{shortened(str(found_dtype))} {shortened(str(found))}"
            raise _bad("array_unfit", problem)
        size_bytes = math.prod(found) * found_dtype.itemsize
        if size_bytes > _MOST_BYTES:
            size = f"{shortened(str(size_bytes))} bytes"
            raise _bad("array_too_large", f"{name} has {size}, expected at most {_MOST_BYTES}")
        content = file.read(size_bytes + 1)
    if len(content) != size_bytes:
        raise _bad("array_cut", f"{name} has another size than its header says")
    return np.frombuffer(content, found_dtype).reshape(found).copy()  # Which may be written to.


@dataclass(frozen=True)
class GoldenCheck:
    """A passed check of one tower at one batch size."""

    tower: Tower
    batch_size: int
    min_cosine: float
    """The worst of the K samples."""


def check_tower(
    tower: Tower,
    embed: Callable[[NDArray[np.generic]], NDArray[np.float32]],
    golden: GoldenSamples,
    min_cosine: float,
    subject: str,
) -> list[GoldenCheck]:
    """Run golden inputs one by one, in an odd batch and in one of 8 or more, and compare.

    ``embed`` runs the tower: (N, ...) inputs to (N, D) embeddings. ``subject`` is for messages.
    Some backends have other graphs for other batch sizes; fewer golden inputs are repeated.
    """
    inputs, expected_KD = (
        (golden.images, golden.image_embeds)
        if tower == "image"
        else (golden.input_ids, golden.text_embeds)
    )
    singles = [inputs[i : i + 1] for i in range(len(inputs))]
    if tower == "text":
        singles = [ids[:, : token_lengths(ids)[0]] for ids in singles]
    order = np.arange(max(len(inputs), _LARGE)) % len(inputs)
    cases = [(1, singles, expected_KD)]
    cases += [(len(rows), [inputs[rows]], expected_KD[rows]) for rows in (order[:_ODD], order)]
    # A tower may be right alone and wrong in a batch: a shape was frozen, a kernel is broken.
    checks = []
    for batch_size, batches, expected in cases:
        found = [embed(batch) for batch in batches]
        where = f"{subject}, {tower} tower at batch {batch_size}"
        fields: dict[str, object] = {"tower": tower, "batch_size": batch_size}
        shapes = [(len(batch), expected_KD.shape[1]) for batch in batches]
        if [rows.shape for rows in found] != shapes:
            message = f"{where}: expected embeddings of shape {shapes[0]}, found {found[0].shape}"
            raise IntegrityError(message, code="golden_shape_differs", **fields)
        found_ND = np.concatenate(found)
        if is_constant(found_ND) and not is_constant(expected):
            message = f"{where}: the output is the same for every input; {_ADVICE}"
            raise IntegrityError(message, code="output_constant", **fields)
        agreement = require_agreement(
            expected,
            found_ND,
            min_cosine,
            where=where,
            row="golden sample",
            reference="its golden embedding",
            advice=_ADVICE,
            **fields,
        )
        checks.append(GoldenCheck(tower, batch_size, agreement.min_cosine))
    return checks
