"""Make a site's bundle from its adapter file and a base bundle, with numpy alone."""

import hashlib
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_adapter.package import AdapterFile, BaseBundle, GraphSection, TensorPlace
from upperson_adapter.weights import Site, Weights, fold_trained, smooth, stored
from upperson_rt.backends import installed_backends
from upperson_rt.bundle import Bundle, read_manifest, unowned_in_bundle
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.files import all_names, new_folder
from upperson_rt.machine import trim_heap
from upperson_rt.manifest import Manifest
from upperson_rt.signature import SIGNATURE_FILE, verify_folder
from upperson_rt.towers import TOWERS, Tower

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (work, done, total)."""

_EXACT = "fp32"


def apply_adapter(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    trust: str | os.PathLike[str] | None = None,
    progress: Progress = lambda work, done, total: None,
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

    Raises:
        InputError: A file is missing, ``output`` holds something that is not a bundle, or the disk
            is full.
        UsageError: ``output`` is the base bundle.
        IntegrityError: The adapter or the base is damaged, the adapter belongs to another base, a
            file comes out otherwise than it was exported, a golden sample differs, or the adapter
            is not signed by the key that is trusted.
    """
    base, output = Path(base), Path(output)
    _require_apart(base, output)
    with AdapterFile(adapter) as file:
        if trust is not None and SIGNATURE_FILE not in file.file_names():
            raise IntegrityError(
                f"{file.path} is not signed: get one that was exported with --sign",
                code="adapter_unsigned",
                path=str(file.path),
            )
        _require_base(base, file.manifest.base)
        Bundle.open(base, _EXACT).check_files()
        with new_folder(output, unowned_in_bundle) as folder, _shown_as(folder, file.path):
            for name in file.file_names():
                _place(folder, name).write_bytes(file.file(name))
            for name, source in file.manifest.copied.items():
                shutil.copyfile(base / source, _place(folder, name))
            for tower in TOWERS:
                _write_graphs(file, tower, base, folder, progress)
            if trust is not None:
                verify_folder(folder, trust)
            check_variants(folder, file.bundle, progress)
        return file.bundle


def restore_base(
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    trust: str | os.PathLike[str] | None = None,
    progress: Progress = lambda work, done, total: None,
) -> Manifest:
    """Put a copy of the base bundle at ``output``, in one step, in place of an adapted one.

    Raises as `apply_adapter`.
    """
    base, output = Path(base), Path(output)
    _require_apart(base, output)
    manifest = read_manifest(base, trust)
    with new_folder(output, unowned_in_bundle) as folder:
        for name in set(all_names(base)) - unowned_in_bundle(base):
            shutil.copyfile(base / name, _place(folder, name))
        check_variants(folder, manifest, progress)
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
    """Let errors name the adapter instead of the temporary folder."""
    try:
        yield
    except IntegrityError as error:
        message = str(error).replace(str(folder), str(path))
        raise IntegrityError(message, code=error.code, **error.fields) from error


def _require_apart(base: Path, output: Path) -> None:
    if base.resolve() == output.resolve():
        raise UsageError(
            f"the base bundle {base} stays as it is: choose another output", code="output_is_base"
        )


def _require_base(base: Path, expected: BaseBundle) -> None:
    found = read_manifest(base)
    graphs = found.variants.get(_EXACT)
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


def _place(folder: Path, name: str) -> Path:
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


# --- Graphs: the bytes that never change, and weights between them


def _write_graphs(
    file: AdapterFile, tower: Tower, base: Path, folder: Path, progress: Progress
) -> None:
    expected = {
        entry.file: entry
        for variant in file.bundle.variants.values()
        for entry in (variant.image, variant.text)
    }
    sections = {n: s for n, s in file.manifest.graphs.items() if s.tower == tower}
    if unknown := sorted(sections.keys() - expected.keys()):
        raise IntegrityError(
            f"{file.path} makes '{unknown[0]}', which no variant has: copy it again",
            code="adapter_damaged",
            path=str(file.path),
        )
    adapted = AdaptedWeights(file, tower, base)
    for done, (name, section) in enumerate(sections.items()):
        progress(f"folding the {tower} tower", done, len(sections))
        entry, digest, size_bytes = expected[name], hashlib.sha256(), 0
        with _place(folder, name).open("wb") as out:
            for data in graph_bytes(file.graph(name), section, adapted.weights(section.smoothed)):
                size_bytes += len(data)
                if size_bytes > entry.size_bytes:
                    break
                digest.update(data)
                out.write(data)
        if size_bytes != entry.size_bytes or digest.hexdigest() != entry.sha256:
            raise IntegrityError(
                f"'{name}' comes out otherwise than it was exported: expected SHA-256 "
                f"{entry.sha256[:12]}..., found {digest.hexdigest()[:12]}...; copy the adapter and "
                "the base bundle again",
                code="graph_differs",
                file=name,
                expected=entry.sha256,
                found=digest.hexdigest(),
            )
    progress(f"folding the {tower} tower", len(sections), len(sections))


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
        self._sites = {
            name: Site(site.divided, site.readers) for name, site in section.sites.items()
        }
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
        self._data = np.memmap(path, np.uint8, "r")
        self._places = places

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        place = self._places[name]
        count = 1
        for size in place.shape:
            count *= size
        if place.offset + 4 * count > len(self._data):
            raise InputError(
                f"the weight '{name}' ends behind the base's graph: the adapter was changed, copy "
                "it again",
                code="weight_unfit",
                name=name,
            )
        return np.frombuffer(self._data, "<f4", count, place.offset).reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
