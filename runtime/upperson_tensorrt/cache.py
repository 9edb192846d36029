"""Engines on disk: a raw engine file, and a JSON file beside it that says what it is.

An engine fits one ONNX file, one range of shapes, one TensorRT and one kind of GPU; its name says
all of them, the JSON file repeats them exactly, with the name of the engine file and its hash. The
name of a file begins with what its engine is for and ends with its content: one that is built again
takes its place beside the old one, the JSON file changes from one to the other in one step, and
then the old one goes. Loading an engine runs code that is in it, so the folder belongs to the user
alone.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_rt.files import cache_folder, make_folder, remove_unfinished, write_atomically
from upperson_rt.locks import lock_or_wait
from upperson_rt.strict import Count, Positive, read_fields, read_json, require_version
from upperson_tensorrt.builder import Comparison, InputProfile
from upperson_tensorrt.cuda import Cuda

_SCHEMA_VERSION = 2
_HASH_DIGITS = 16
"""Of a hash in a file name."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where an engine runs: it fits no other TensorRT and no other kind of GPU."""

    gpu: str
    compute_capability: str
    multiprocessors: Positive
    platform: str
    """Such as ``linux-aarch64``."""
    tensorrt: str

    @classmethod
    def here(cls, trt: ModuleType, cuda: Cuda) -> "Target":
        """Return the target that this process runs on."""
        return cls(
            gpu=cuda.gpu.name,
            compute_capability=cuda.gpu.compute_capability,
            multiprocessors=cuda.gpu.multiprocessors,
            platform=f"{platform.system()}-{platform.machine()}".lower(),
            tensorrt=trt.__version__,
        )

    @property
    def label(self) -> str:
        """For file names."""
        capability = self.compute_capability.replace(".", "")
        label = (
            f"{self.gpu}-sm{capability}x{self.multiprocessors}-{self.platform}-trt{self.tensorrt}"
        )
        return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")

    def __str__(self) -> str:
        return (
            f"TensorRT {self.tensorrt} on {self.gpu} (compute capability "
            f"{self.compute_capability}, {self.multiprocessors} multiprocessors, {self.platform})"
        )


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What is known about an engine."""

    target: Target
    onnx_sha256: str
    profile: InputProfile
    workspace_mib: Positive
    variant: str
    """Which variant of its bundle it was built from; for people."""
    model: str
    sha256: str
    size_bytes: Count
    built: str
    """ISO 8601, UTC."""
    build_seconds: float
    versions: dict[str, str]
    """What took part, such as ``onnxruntime`` and ``driver``, by name."""
    min_cosine: float
    """Lowest cosine to ONNX Runtime that was allowed."""
    comparisons: tuple[Comparison, ...]
    """What was compared with ONNX Runtime before the engine was written."""

    def __post_init__(self) -> None:
        if not self.comparisons:
            raise InputError("comparisons: expected at least one, found none")

    @property
    def stem(self) -> str:
        """What the file names of the engine and of this record begin with."""
        tower = "image" if self.profile.name == "image" else "text"
        graph = self.onnx_sha256[:_HASH_DIGITS]
        return f"{tower}-{graph}-b{self.profile.label}-{self.target.label}"

    @property
    def name(self) -> str:
        """File name of the engine."""
        return f"{self.stem}-{self.sha256[:_HASH_DIGITS]}.engine"

    @property
    def json_name(self) -> str:
        """File name of this record."""
        return f"{self.stem}.engine.json"

    def to_json(self) -> str:
        """Return the text of the JSON file."""
        fields = {"schema_version": _SCHEMA_VERSION, "engine": self.name, **asdict(self)}
        return json.dumps(fields, indent=2, allow_nan=False) + "\n"


class EngineCache:
    """The engines in one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        """Use a folder, by default `cache_folder`; it is made when something is written."""
        self.folder = (cache_folder() if folder is None else folder) / "engines"

    @contextmanager
    def lock(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Let one process at a time build: builds side by side spoil each other's timings."""
        try:
            make_folder(self.folder, 0o700)
            handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise InputError(
                f"cannot write to {self.folder}: {error.strerror}; choose another --cache",
                code="cannot_write",
                path=str(self.folder),
            ) from error
        try:
            lock_or_wait(handle, on_wait)
            remove_unfinished(self.folder, "*")
            yield
        finally:
            os.close(handle)  # And with it the lock.

    def records(self) -> tuple[list[EngineRecord], list[str]]:
        """Return the records, latest first, and what is wrong with files that are none."""
        found, problems = [], []
        for path in sorted(self.folder.glob("*.engine.json")):
            result = _record_or_problem(path)
            if isinstance(result, EngineRecord):
                found.append(result)
            else:
                problems.append(result)
        return sorted(found, key=lambda record: record.built, reverse=True), problems

    def find(self, onnx_file: Path, onnx_sha256: str, target: Target) -> EngineRecord:
        """Return the record of the latest engine of an ONNX file for a target."""
        records, problems = self.records()
        of_file = [record for record in records if record.onnx_sha256 == onnx_sha256]
        for record in of_file:
            if record.target == target:
                return record
        if of_file:
            others = "; ".join(dict.fromkeys(str(record.target) for record in of_file))
            found = f"the engines of this file are for {others}"
        else:
            here = [f"{r.variant} of {r.model}" for r in records if r.target == target]
            found = f"engines there: {', '.join(dict.fromkeys(here)) or 'none for this device'}"
        raise BackendError(
            f"no engine for {onnx_file} with {target} in {self.folder} ({found}"
            f"{''.join(f'; {problem}' for problem in problems)}): run  upperson-rt compile "
            f"{onnx_file.parent}  with the --variant to run (and the same --cache or "
            "$UPPERSON_CACHE), or choose another --backend",
            code="no_engine",
            found=found,
        )

    def load(self, record: EngineRecord) -> bytes:
        """Return the engine of a record."""
        path = self.folder / record.name
        advice = "build it again with  upperson-rt compile"
        try:
            plan = path.read_bytes()
        except OSError as error:
            message = f"cannot read {path}: {error.strerror}; {advice}"
            raise IntegrityError(message, code="file_missing", path=str(path)) from error
        sha256 = hashlib.sha256(plan).hexdigest()
        if sha256 != record.sha256:
            raise IntegrityError(
                f"{path} has sha256 {sha256}, expected {record.sha256}: the file was changed or "
                f"damaged; {advice}",
                code="checksum_differs",
                path=str(path),
            )
        return plan

    def save(self, record: EngineRecord, plan: bytes) -> Path:
        """Write an engine and its record, and return the path of the engine."""
        path = self.folder / record.name
        write_atomically(path, plan)
        write_atomically(self.folder / record.json_name, record.to_json())
        for earlier in self.folder.glob(f"{record.stem}-{'?' * _HASH_DIGITS}.engine"):
            if earlier != path:
                earlier.unlink(missing_ok=True)
        return path

    def load_timing_cache(self, target: Target) -> bytes:
        """Return the kernel timings of earlier builds on this target; empty if there are none."""
        try:
            return self._timing_cache(target).read_bytes()
        except FileNotFoundError:
            return b""

    def save_timing_cache(self, target: Target, content: bytes) -> None:
        """Write the kernel timings of this target."""
        write_atomically(self._timing_cache(target), content)

    def _timing_cache(self, target: Target) -> Path:
        return self.folder / f"{target.label}.timing"


def _record_or_problem(path: Path) -> EngineRecord | str:
    where = os.fspath(path)
    try:
        content = read_json(path)
        require_version(content, where, (_SCHEMA_VERSION,), "compile again")
        fields = {key: content[key] for key in content if key not in ("schema_version", "engine")}
        record = read_fields(EngineRecord, fields, where)
    except InputError as error:
        return str(error)
    if (content.get("engine"), path.name) != (record.name, record.json_name):
        return f"{where}: engine: '{record.name}' is what the record describes: renamed files?"
    return record
