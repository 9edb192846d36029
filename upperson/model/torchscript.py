"""Tensors of a TorchScript archive, read as data: no code of the file is compiled or run.

OpenAI publishes its CLIPs as such archives. What torch 1.7 to 2.13 write:

    NAME/data.pkl       pickle of the module tree; its tensors refer to storages by key
    NAME/data/KEY       one storage, uncompressed
    NAME/byteorder      since torch 2.1; little endian where it is missing
    NAME/code, NAME/constants.pkl    the program: never opened here

``torch.load(weights_only=True)`` refuses these archives and ``torch.jit.load`` compiles their code.
Here the pickle may only describe: every name in it stands for something inert, made for this one
load. The descriptions are checked against the file before a tensor is made from them.
"""

import io
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

_OPCODES = {
    "PROTO", "STOP", "MARK", "GLOBAL", "NEWOBJ", "BUILD", "REDUCE", "BINPERSID",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "NONE",
    "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
}  # fmt: skip
"""Pickle operations that torch's own writer of modules uses."""

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}

MOST_DESCRIPTION_BYTES = 4 << 20
"""Of the pickle that describes the tensors: some twenty thousand of them. Unpickled, it takes up to
seventy times its size."""


class _Storage(NamedTuple):
    """Values of one record."""

    dtype: torch.dtype
    key: str
    length: int


class _View(NamedTuple):
    """A tensor as the pickle describes it; nothing of it has been checked."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _Module:
    """A module of the archive: attributes and nothing else."""


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive, which holds a program."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(_is_top(name, "constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return parameters, buffers and other tensor attributes by their dotted names, on the CPU.

    Shapes and dtypes are those of the file. A module that is reachable by several names is listed
    under the first.

    Raises:
        UnpicklingError: Not such an archive, damaged, or it refers to more than tensors.
            Damaged pickles and zip files may also raise what ``pickle`` and ``zipfile`` raise.
    """
    with zipfile.ZipFile(path) as archive:
        roots = [name for name in archive.namelist() if _is_top(name, "data.pkl")]
        if len(roots) != 1:
            raise UnpicklingError(f"expected one data.pkl, found {len(roots)}")
        records = _Records(archive, roots[0].removesuffix("data.pkl"), path.stat().st_size)
        if "byteorder" in records and records.read("byteorder") != sys.byteorder.encode():
            raise UnpicklingError(f"its numbers are not {sys.byteorder} endian, as this machine's")
        if archive.getinfo(roots[0]).file_size > MOST_DESCRIPTION_BYTES:
            raise UnpicklingError(
                f"its data.pkl takes more than {MOST_DESCRIPTION_BYTES >> 20} MiB"
            )
        module = _read_module_tree(records.read("data.pkl"))
        storages: dict[_Storage, Tensor] = {}
        state = {}
        for name, view in _named_views(module):
            if not isinstance(view.storage, _Storage):
                raise UnpicklingError(f"tensor '{name}' has no storage")
            if view.storage not in storages:
                storages[view.storage] = records.read_storage(view.storage)
            state[name] = _tensor(name, view, storages[view.storage])
    return state


class _Records:
    """Reads records of the archive, none larger than the file, all together no larger either."""

    def __init__(self, archive: zipfile.ZipFile, root: str, file_bytes: int) -> None:
        self._archive = archive
        self._root = root
        self._bytes_left = file_bytes

    def __contains__(self, name: str) -> bool:
        return self._root + name in self._archive.NameToInfo

    def read(self, name: str) -> bytes:
        if name not in self:
            raise UnpicklingError(f"record '{name}' is missing")
        info = self._archive.getinfo(self._root + name)
        # Entries of a hostile zip may overlap or unpack to any size.
        self._bytes_left -= info.file_size
        if info.compress_type != zipfile.ZIP_STORED or self._bytes_left < 0:
            raise UnpicklingError(f"record '{name}' is compressed or larger than the file")
        return self._archive.read(info)

    def read_storage(self, storage: _Storage) -> Tensor:
        content = bytearray(self.read(f"data/{storage.key}"))
        if len(content) != storage.length * storage.dtype.itemsize:
            raise UnpicklingError(
                f"record 'data/{storage.key}' has {len(content)} bytes, expected "
                f"{storage.length} numbers of {storage.dtype.itemsize}"
            )
        if not content:
            return torch.empty(0, dtype=storage.dtype)
        return torch.frombuffer(content, dtype=storage.dtype)


class _DescriptionUnpickler(pickle.Unpickler):
    """Gives a pickle only new or immutable objects.

    A hostile one can neither call anything else nor leave a change behind.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type("Module", (_Module,), {})
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # A new function each time: a pickle may change the attributes of what it is given.
            return lambda storage, offset, size, stride, *_: _View(storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # Types of lists and dictionaries beside the value.
            return lambda value, *_: value
        raise UnpicklingError(f"it refers to {module}.{name}, which is not a part of a tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, length = pid
        if not (
            kind == "storage"
            and isinstance(dtype, torch.dtype)
            and isinstance(key, str)
            and isinstance(length, int)
        ):
            raise UnpicklingError("it refers to something that is not a storage")
        return _Storage(dtype, key, length)


def _read_module_tree(content: bytes) -> _Module:
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            raise UnpicklingError(f"pickle code {opcode.name} is not one that describes modules")
        # The unpickler would allocate a table of any size.
        if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > len(content):
            raise UnpicklingError("the numbering in the pickle is damaged")
    module = _DescriptionUnpickler(io.BytesIO(content)).load()
    if not isinstance(module, _Module):
        raise UnpicklingError(f"expected a module, found {type(module).__name__}")
    return module


def _named_views(root: _Module) -> Iterator[tuple[str, _View]]:
    # Every module is visited once, however often a hostile tree refers to it.
    seen = {id(root)}
    waiting = [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        for name, value in vars(module).items():
            if isinstance(value, _View):
                yield f"{prefix}{name}", value
            elif isinstance(value, _Module) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value))


def _tensor(name: str, view: _View, values: Tensor) -> Tensor:
    size, stride, offset = view.size, view.stride, view.offset
    numbers = (*size, *stride, offset)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise UnpicklingError(f"tensor '{name}' has no valid shape: {size}, strides {stride}")
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if 0 not in size and end > len(values):
        raise UnpicklingError(f"tensor '{name}' reaches beyond its {len(values)} stored numbers")
    return torch.as_strided(values, size, stride, offset)


def _is_top(record: str, name: str) -> bool:
    """Match a record that lies directly in the archive's one folder."""
    return record.count("/") == 1 and record.endswith(f"/{name}")
