"""An adapter file: what a run trained, and how a site's bundle is made from it and a base bundle.

    adapter.json           `AdapterManifest`
    trained.safetensors    the trained tensors of both towers, float16 or float32
    smoothing.safetensors  smoothing factors of int8, by tower and site
    graphs/NAME            a graph of the bundle without its large weights
    files/NAME             every other file of the bundle, such as bundle.json with the accuracy of
                           each variant, calibration.json with the activation ranges of int8, the
                           golden samples and the signature

It is an archive (zip). Whatever it says is held against limits before memory or disk is taken.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_adapter.weights import Site
from upperson_rt.bundle import MANIFEST_FILE, UNNAMED_FILES, named_files
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.manifest import FileEntry, Manifest, check_relative_path, parse_manifest
from upperson_rt.printable import safe_repr
from upperson_rt.strict import Count, Positive, parse_json, read_fields, require_version
from upperson_rt.towers import TOWERS, Tower

SCHEMA_VERSION = 1

_MANIFEST = "adapter.json"
_TRAINED, _SMOOTHING = "trained.safetensors", "smoothing.safetensors"
_GRAPHS, _FILES = "graphs/", "files/"
_MOST_BYTES = 256 << 20
"""Of trained tensors or a graph's literal part; ViT-L/14 trains 72 MB in float32."""
_MOST_TEXT_BYTES = 8 << 20
"""Of ``adapter.json`` and of a bundle's pages; ViT-B/16 has 0.3 MB."""
_MOST_FILE_BYTES = 64 << 20
"""Of a file that the bundle's manifest names, such as a tokenizer."""
_MOST_ENTRIES = 64
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "I32": np.dtype("<i4"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BaseBundle:
    """The bundle that an adapter belongs to."""

    name: str
    graphs: dict[str, FileEntry]
    """The float32 graph of each tower."""


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where a frozen weight, float32, lies in the base's graph file."""

    offset: Count
    shape: tuple[Positive, ...]


@dataclass(frozen=True, kw_only=True)
class AdaptedTower:
    """What folding needs to know of a tower."""

    heads: Positive
    frozen: dict[str, TensorPlace]
    sites: dict[str, Site]


@dataclass(frozen=True, kw_only=True)
class GraphPart:
    """Bytes that are the same in every bundle, and the weight behind them."""

    literal_bytes: Count
    weight: str | None
    """A name for `upperson_adapter.weights.stored`; None at the end of the file."""


@dataclass(frozen=True, kw_only=True)
class GraphSection:
    """How a graph file is put together."""

    tower: str
    smoothed: bool
    pair_limit: Positive | None
    parts: tuple[GraphPart, ...]


@dataclass(frozen=True, kw_only=True)
class AdapterManifest:
    """The content of ``adapter.json``."""

    base: BaseBundle
    towers: dict[str, AdaptedTower]
    graphs: dict[str, GraphSection]
    """By file of the bundle."""
    copied: tuple[str, ...]
    """Files of the bundle that the base bundle has, too."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for names, expected in (
            (self.towers.keys(), set(TOWERS)),
            (self.base.graphs.keys(), set(TOWERS)),
        ):
            if names != expected:
                raise IntegrityError(
                    f"expected the towers {', '.join(TOWERS)}", code="tower_missing"
                )
        for name in (*self.graphs, *self.copied):
            check_relative_path(name)
        for section in self.graphs.values():
            if section.tower not in TOWERS:
                raise IntegrityError(f"no tower '{section.tower}'", code="tower_unknown")


@dataclass(frozen=True, kw_only=True)
class AdapterContent:
    """All that an adapter file holds, for `pack_adapter`."""

    manifest: AdapterManifest
    trained: bytes
    """In the format safetensors, as `smoothing`."""
    smoothing: bytes
    graphs: Mapping[str, bytes]
    files: Mapping[str, bytes]


def pack_adapter(content: AdapterContent) -> bytes:
    """Return the bytes of an adapter file; equal contents give equal bytes."""
    buffer = io.BytesIO()
    manifest = json.dumps(asdict(content.manifest), indent=1, allow_nan=False) + "\n"
    entries = {
        _MANIFEST: manifest.encode(),
        _TRAINED: content.trained,
        _SMOOTHING: content.smoothing,
        **{_GRAPHS + name: data for name, data in sorted(content.graphs.items())},
        **{_FILES + name: data for name, data in sorted(content.files.items())},
    }
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


class AdapterFile:
    """An opened adapter file; a context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file and read its manifests.

        Raises:
            InputError: There is no such file, or it is of a newer version.
            IntegrityError: It is no adapter file, or damaged.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(
                f"there is no adapter file {self.path}: expected one that  upperson export RUN "
                "--adapter-for BUNDLE  has written",
                code="no_adapter",
                path=str(self.path),
            )
        try:
            self._archive = zipfile.ZipFile(self.path)
            self._entries = {entry.orig_filename: entry for entry in self._archive.infolist()}
        except Exception as error:  # zipfile has several kinds for bad content.
            raise self._damaged(str(error)) from error
        if (
            len(self._entries) != len(self._archive.infolist())
            or len(self._entries) > _MOST_ENTRIES
        ):
            raise self._damaged(f"it has more than {_MOST_ENTRIES} entries, or one twice")
        update = "update with  pip install -U upperson-rt"
        try:
            content = parse_json(self._text(_MANIFEST), _MANIFEST)
            require_version(content, str(self.path), [SCHEMA_VERSION], update)
            self.manifest = read_fields(AdapterManifest, content, _MANIFEST)
            self.bundle: Manifest = parse_manifest(
                self._text(_FILES + MANIFEST_FILE), f"{self.path}, {MANIFEST_FILE}"
            )
            self._require_bundle()
        except InputError as error:
            if error.code == "version_unknown":
                raise
            raise self._damaged(str(error)) from error

    def __enter__(self) -> "AdapterFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    def file_names(self) -> list[str]:
        """Return the names of the files that go into the bundle as they are."""
        names = (name for name in self._entries if name.startswith(_FILES))
        return [name.removeprefix(_FILES) for name in names]

    def file(self, name: str) -> bytes:
        """Return a file of the bundle; its hash is checked where the bundle's manifest has one."""
        entry = named_files(self.bundle).get(name)
        most_bytes = _MOST_TEXT_BYTES
        if entry is not None:
            most_bytes = min(entry.size_bytes, _MOST_FILE_BYTES)
        data = self._read(_FILES + name, most_bytes)
        if entry is not None and hashlib.sha256(data).hexdigest() != entry.sha256:
            raise self._damaged(f"{name} is not the file that its {MANIFEST_FILE} names")
        return data

    def graph(self, name: str) -> bytes:
        """Return a graph without its large weights."""
        return self._read(_GRAPHS + name)

    def trained(self, tower: Tower) -> dict[str, NDArray[Any]]:
        """Return the trained tensors of a tower, by their names in it."""
        return self._tensors(_TRAINED, tower)

    def smoothing(self, tower: Tower) -> dict[str, NDArray[Any]]:
        """Return the smoothing factors [C] of a tower, by site."""
        return self._tensors(_SMOOTHING, tower)

    def _require_bundle(self) -> None:
        """Refuse a file that does not make each file of the bundle, once, or has more in it."""
        named = named_files(self.bundle)
        files = (_FILES + name for name in self.file_names())
        own = {_MANIFEST, _TRAINED, _SMOOTHING, *(_GRAPHS + name for name in self.manifest.graphs)}
        if unknown := sorted(self._entries.keys() - own.union(files)):
            raise self._damaged(f"nothing in it names its entry {safe_repr(unknown[0])}")
        made = [*self.file_names(), *self.manifest.graphs, *self.manifest.copied]
        if (
            len(set(made)) < len(made)
            or not named.keys() <= set(made) <= named.keys() | UNNAMED_FILES
        ):
            odd = sorted(named.keys() ^ set(made) - UNNAMED_FILES) or sorted(made)
            raise self._damaged(f"'{odd[0]}' is missing, twice there or not of a bundle")
        graphs = {entry.file(t).file: t for entry in self.bundle.variants.values() for t in TOWERS}
        if graphs != {name: section.tower for name, section in self.manifest.graphs.items()}:
            raise self._damaged("its graphs are not those of its variants")
        for section in self.manifest.graphs.values():
            weights = [part.weight for part in section.parts]
            if len(set(weights)) < len(weights):
                raise self._damaged("a graph has a weight twice")

    def _tensors(self, name: str, tower: str) -> dict[str, NDArray[Any]]:
        try:
            tensors = read_tensors(self._read(name))
        except IntegrityError:
            raise
        except Exception as error:  # Of json and numpy, for a header that is no header.
            raise self._damaged(f"{name}: {error}") from error
        start = f"{tower}."
        found = {key.removeprefix(start): v for key, v in tensors.items() if key.startswith(start)}
        for key, value in found.items():
            if not np.isfinite(value).all():
                raise IntegrityError(
                    f"{self.path}: the tensor '{start}{key}' has NaN or infinite values: the run "
                    "diverged, or the file was changed; get it again",
                    code="weight_not_finite",
                    tensor=start + key,
                )
        return found

    def _text(self, name: str) -> str:
        try:
            return self._read(name, _MOST_TEXT_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{name} is no text in UTF-8") from error

    def _read(self, name: str, most_bytes: int = _MOST_BYTES) -> bytes:
        entry = self._entries.get(name)
        if entry is None or entry.compress_type not in _METHODS:
            raise self._damaged(f"it lacks {name}, or has it packed by another method")
        if entry.file_size > most_bytes:
            raise self._damaged(
                f"{name} has {entry.file_size} bytes, expected {most_bytes} at most"
            )
        try:
            with self._archive.open(entry) as file:
                data = file.read(most_bytes + 1)
        except Exception as error:  # zipfile and zlib have several kinds for bad content.
            raise self._damaged(f"{name}: {error or type(error).__name__}") from error
        if len(data) != entry.file_size:
            raise self._damaged(f"{name} has another size than it says")
        return data

    def _damaged(self, problem: str) -> IntegrityError:
        return IntegrityError(
            f"{self.path} is not a complete adapter file: {problem}. Copy it again",
            code="adapter_damaged",
            path=str(self.path),
        )


def read_tensors(data: bytes) -> dict[str, NDArray[Any]]:
    """Read float16, float32 and int32 tensors in the format safetensors; raises ValueError."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError("its header is longer than the file")
    header = parse_json(data[8:start].decode("utf-8"), "the header")
    tensors = {}
    left = len(data) - start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        left -= last - first
        if left < 0 or not 0 <= first <= last <= len(data) - start:
            raise ValueError(f"the tensor '{name}' overlaps others, or ends after the file")
        values = np.frombuffer(
            memoryview(data)[start + first : start + last], _DTYPES[entry["dtype"]]
        )
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def pack_tensors(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Return float16, float32 or int32 tensors in the format safetensors."""
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, value in tensors.items():
        first, end = end, end + value.nbytes
        header[name] = {
            "dtype": codes[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    return len(text).to_bytes(8, "little") + text + data
