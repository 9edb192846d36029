"""Make a site's bundle from its adapter file and a base bundle, with numpy alone."""

import hashlib
import math
import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_adapter.package import AdapterFile, BaseBundle, GraphSection, TensorPlace
from upperson_adapter.weights import Weights, fold_trained, smooth, stored
from upperson_rt.backends import installed_backends
from upperson_rt.bundle import (
    Bundle,
    named_files,
    read_manifest,
    require_replaceable,
    unowned_in_bundle,
)
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.files import all_names, new_folder, read_bounded
from upperson_rt.machine import trim_heap
from upperson_rt.manifest import NO_ADAPTER, SIGNATURE_FILE, Manifest
from upperson_rt.towers import TOWERS, Tower
from upperson_signature.signature import (
    files_of_signature,
    named_key,
    read_public_key,
    verify_folder,
)

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (work, done, total)."""

EXACT = "fp32"
"""The variant whose weights all others are made from."""

_MOST_COPIED_BYTES = 2 << 30
"""Of a file that is taken from the base, such as a graph or a tokenizer."""


def apply_adapter(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    trust: str | os.PathLike[str] | None = None,
    progress: Progress = lambda work, done, total: None,
    *,
    force: bool = False,
) -> Manifest:
    """Make the bundle that was exported with the adapter, byte for byte, and return its manifest.

    Every file is compared with the hash that the export recorded, and every variant computes its
    golden samples, before the bundle appears at ``output`` in one step, in place of an earlier one.

    Args:
        adapter: File that ``upperson export RUN --adapter-for BUNDLE`` wrote.
        base: That bundle.
        output: Folder of the new bundle.
        trust: File with a public key (PEM). Its owner must have signed the adapter.
        progress: Called while it works.
        force: Replace the bundle of another site, or over another base, too.

    Raises:
        InputError: A file is missing, ``output`` holds something that is not a bundle, or the
            bundle of another site or base, or the disk is full.
        UsageError: ``output`` is the base bundle.
        IntegrityError: The adapter or the base is damaged, the adapter belongs to another base, a
            file comes out otherwise than it was exported or than its signature names it, a golden
            sample differs, or the adapter is not signed by the key that is trusted.
    """
    base, output = Path(base), Path(output)
    _require_apart(base, output)
    with AdapterFile(adapter) as file:
        _require_base(base, file.manifest.base)
        _require_same_site(output, file.bundle, force)
        Bundle.open(base, EXACT).check_files()
        signed = _signed(file, trust)
        with new_folder(output, unowned_in_bundle) as folder, _shown_as(folder, file.path):
            for name in (*file.file_names(), *file.manifest.copied):
                is_copied = name in file.manifest.copied
                content = _base_file(base, name) if is_copied else file.file(name)
                _require_named(folder, name, _write(folder, name, [content]), signed)
            for tower in TOWERS:
                _write_graphs(file, tower, base, folder, signed, progress)
            if trust is not None:
                verify_folder(folder, trust)
            check_variants(folder, file.bundle, progress)
        return file.bundle


def restore_base(
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    trust: str | os.PathLike[str] | None = None,
    progress: Progress = lambda work, done, total: None,
    *,
    force: bool = False,
) -> Manifest:
    """Put a copy of the base bundle at ``output``, in one step, in place of an adapted one.

    Raises as `apply_adapter`.
    """
    base, output = Path(base), Path(output)
    _require_apart(base, output)
    manifest = read_base(base, trust)
    _require_same_site(output, manifest, force)
    named_key(base)  # A malformed signature is refused before anything is written.
    with new_folder(output, unowned_in_bundle) as folder, _shown_as(folder, base):
        for name in set(all_names(base)) - unowned_in_bundle(base):
            _write(folder, name, [_base_file(base, name)])
        if trust is not None:
            verify_folder(folder, trust)
        check_variants(folder, manifest, progress)
    return manifest


def read_base(folder: Path, trust: str | os.PathLike[str] | None = None) -> Manifest:
    """Read the manifest of a base bundle; UsageError if it has an adapter or no float32 graphs."""
    manifest = read_manifest(folder, trust)
    if manifest.model.adapter_sha256 != NO_ADAPTER or EXACT not in manifest.variants:
        raise UsageError(
            f"{folder} is the bundle of {manifest.model.name}, expected that of a base without "
            "adapter: make one with  upperson export --base",
            code="base_has_adapter",
            path=str(folder),
        )
    return manifest


def check_variants(folder: Path, manifest: Manifest, progress: Progress) -> None:
    """Check files and golden samples of every variant on a CPU, one tower in memory at a time."""
    checks = [(variant, tower) for variant in manifest.variants for tower in TOWERS]
    for done, (variant, tower) in enumerate(checks):
        progress("golden samples", done, len(checks))
        Bundle.open(folder, variant, installed_backends("cpu")[0]).backend(tower)
        trim_heap()
    progress("golden samples", len(checks), len(checks))


@contextmanager
def _shown_as(folder: Path, path: Path) -> Iterator[None]:
    """Let errors name what the user named instead of the temporary folder."""
    try:
        yield
    except IntegrityError as error:
        fields = {
            name: value.replace(str(folder), str(path)) if isinstance(value, str) else value
            for name, value in error.fields.items()
        }
        message = str(error).replace(str(folder), str(path))
        raise IntegrityError(message, code=error.code, **fields) from error


def _require_apart(base: Path, output: Path) -> None:
    one, other = base.resolve(), output.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise UsageError(
            f"the base bundle {base} stays as it is: choose an output outside it that does not "
            "hold it",
            code="output_is_base",
        )


def _require_same_site(output: Path, manifest: Manifest, force: bool) -> None:
    """Refuse to replace the bundle of another site or over another base."""

    def is_same(found: Manifest) -> bool:
        one, other = found.model, manifest.model
        is_base = NO_ADAPTER in (one.adapter_sha256, other.adapter_sha256)
        return one.base_sha256 == other.base_sha256 and (is_base or one.name == other.name)

    if not force:
        require_replaceable(output, is_same)


def _signed(file: AdapterFile, trust: str | os.PathLike[str] | None) -> dict[str, str] | None:
    """Return the SHA-256 of the files that the signature names; None without a signature.

    With ``trust`` there must be one, of that key.
    """
    if SIGNATURE_FILE in file.file_names():
        key = None if trust is None else read_public_key(trust)
        return files_of_signature(file.file(SIGNATURE_FILE), key, str(file.path))
    if trust is None:
        return None
    raise IntegrityError(
        f"{file.path} is not signed: get one that was exported with --sign",
        code="adapter_unsigned",
        path=str(file.path),
    )


def _base_file(base: Path, name: str) -> bytes:
    try:
        return read_bounded(base / name, _MOST_COPIED_BYTES)
    except InputError as error:
        raise IntegrityError(
            f"the base bundle is not complete: {error}", code="base_incomplete", file=name
        ) from error


def _require_base(base: Path, expected: BaseBundle) -> None:
    found = read_manifest(base)
    graphs = found.variants.get(EXACT)
    for tower in TOWERS:
        if graphs is None or graphs.file(tower) != expected.graphs[tower]:
            raise IntegrityError(
                f"the adapter belongs to another base: expected the bundle of {expected.name} with "
                f"the {tower} graph {expected.graphs[tower].sha256[:12]}..., found that of "
                f"{found.model.name} with "
                f"{'no fp32' if graphs is None else graphs.file(tower).sha256[:12] + '...'} in "
                f"{base}: name the base bundle that the adapter was exported for",
                code="adapter_of_other_base",
                tower=tower,
                expected=expected.graphs[tower].sha256,
                found=None if graphs is None else graphs.file(tower).sha256,
            )


def _write(folder: Path, name: str, pieces: Iterable[bytes]) -> str:
    """Write a file of the new bundle and return its SHA-256."""
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with place.open("wb") as out:
        for piece in pieces:
            digest.update(piece)
            out.write(piece)
    return digest.hexdigest()


def _require_named(place: Path, name: str, sha256: str, signed: Mapping[str, str] | None) -> None:
    """Refuse a file that a signature, if there is one, does not name with this SHA-256."""
    if signed is not None and name != SIGNATURE_FILE and signed.get(name) != sha256:
        raise IntegrityError(
            f"{place / name} is not what the adapter's signature names: get the adapter again",
            code="file_changed",
            path=str(place / name),
        )


# --- Graphs: the bytes that never change, and weights between them


def _write_graphs(
    file: AdapterFile,
    tower: Tower,
    base: Path,
    folder: Path,
    signed: Mapping[str, str] | None,
    progress: Progress,
) -> None:
    sections = {n: s for n, s in file.manifest.graphs.items() if s.tower == tower}
    try:
        adapted = AdaptedWeights(file, tower, base)
        for done, (name, section) in enumerate(sections.items()):
            progress(f"folding the {tower} tower", done, len(sections))
            entry = named_files(file.bundle)[name]
            weights = adapted.weights(section.smoothed)
            pieces = graph_bytes(file.graph(name), section, weights)
            found = _write(folder, name, _at_most(entry.size_bytes, pieces))
            if found != entry.sha256:
                raise IntegrityError(
                    f"'{name}' comes out otherwise than it was exported: expected SHA-256 "
                    f"{entry.sha256[:12]}..., found {found[:12]}...; copy the adapter and the base "
                    "bundle again",
                    code="graph_differs",
                    file=name,
                    expected=entry.sha256,
                    found=found,
                )
            _require_named(folder, name, found, signed)
    except (IntegrityError, OSError):
        raise
    except Exception as error:  # numpy has a dozen kinds for shapes that do not fit.
        code = error.code if isinstance(error, InputError) else "adapter_damaged"
        raise IntegrityError(
            f"{file.path} does not fit the base: {error or type(error).__name__}; copy it again",
            code=code,
            path=str(file.path),
        ) from error
    progress(f"folding the {tower} tower", len(sections), len(sections))


def _at_most(most_bytes: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Give pieces until they are more than a file has: its hash differs then anyway."""
    for piece in pieces:
        if most_bytes < len(piece):
            return
        most_bytes -= len(piece)
        yield piece


def graph_bytes(literal: bytes, section: GraphSection, weights: Weights) -> Iterator[bytes]:
    """Give the content of a graph file piece by piece."""
    place = 0
    for part in section.parts:
        yield literal[place : place + part.literal_bytes]
        place += part.literal_bytes
        if part.weight is not None:
            yield stored(part.weight, weights, section.pair_limit).tobytes()


class AdaptedWeights:
    """The weights of a tower: those of the base, with what was trained folded into them."""

    def __init__(self, file: AdapterFile, tower: Tower, base: Path) -> None:
        section = file.manifest.towers[tower]
        self._sites = section.sites
        self._factors = file.smoothing(tower)
        frozen = FrozenWeights(base / file.manifest.base.graphs[tower].file, section.frozen)
        folded = fold_trained(frozen, file.trained(tower), section.heads)
        self._plain = ChainMap(folded, frozen)  # type: ignore[arg-type]  # It is only read.

    def weights(self, smoothed: bool) -> Weights:
        """Return the weights by name, with smoothing factors in them or not."""
        if not smoothed:
            return self._plain
        return self._plain.new_child(smooth(self._plain, self._sites, self._factors))


class FrozenWeights(Mapping[str, NDArray[np.float32]]):
    """Weights of a base's float32 graph, read from its file when they are needed."""

    def __init__(self, path: Path, places: Mapping[str, TensorPlace]) -> None:
        """Raise InputError if the places do not lie in the file, or overlap."""
        self._path = path
        self._places = places
        left = path.stat().st_size
        for name, place in places.items():
            size_bytes = 4 * math.prod(place.shape)
            left -= size_bytes
            if left < 0 or place.offset + size_bytes > path.stat().st_size:
                raise InputError(
                    f"the weight '{name}' is not in the base's graph",
                    code="weight_unfit",
                    name=name,
                )

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        place = self._places[name]
        values = np.fromfile(self._path, "<f4", math.prod(place.shape), offset=place.offset)
        return values.reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
