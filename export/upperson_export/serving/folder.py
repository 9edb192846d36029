"""A server's folder: made from one variant of a bundle whose graphs keep their contract."""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from upperson_export.recorded_folder import RecordedFolder
from upperson_export.rendering import templates
from upperson_export.variants import VARIANTS
from upperson_rt.bundle import Bundle, read_manifest
from upperson_rt.errors import IntegrityError, UsageError
from upperson_rt.manifest import Manifest
from upperson_rt.towers import GRAPH_NAMES, Tower

Format = Literal["triton", "deepstream"]

RECORD = "serving.json"
"""Says where the folder comes from and which files are of it."""

_TEMPLATES = templates(Path(__file__).parent / "templates")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingFolder:
    """What was written."""

    format: Format
    folder: Path
    variant: str
    fingerprint: str
    files: tuple[str, ...]
    """Relative POSIX paths, sorted, without the record itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """Input and output of a tower, without the batch; -1 is a dynamic axis."""

    input_name: str
    input_type: int
    """A value of ``onnx.TensorProto.DataType``."""
    input_dims: tuple[int, ...]
    output_name: str
    output_dims: tuple[int, ...]
    """The output is always float32."""


def require_serving_place(output: Path, kind: Format) -> None:
    """Refuse a folder that could not be written or replaced, before any work."""
    RecordedFolder(kind, RECORD).require_place(output)


def serving_folder(output: Path, kind: Format) -> AbstractContextManager[Path]:
    """Give a temporary folder to fill; see `RecordedFolder.create`."""
    return RecordedFolder(kind, RECORD).create(output)


def write_serving_record(folder: Path, output: Path, kind: Format, bundle: Bundle) -> ServingFolder:
    """Write the record of a filled folder, and return what it says."""
    manifest = bundle.manifest
    facts = {
        "model": manifest.model.name,
        "variant": bundle.variant,
        "precision": bundle.entry.precision,
        "fingerprint": manifest.fingerprint,
        "embed_dim": manifest.model.embed_dim,
    }
    return ServingFolder(
        format=kind,
        folder=output,
        variant=bundle.variant,
        fingerprint=manifest.fingerprint,
        files=RecordedFolder(kind, RECORD).write_record(folder, facts),
    )


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package."""
    return _TEMPLATES.get_template(template).render(**values)


def open_variant(bundle: Path, variant: str | None, trust: Path | None = None) -> Bundle:
    """Open a bundle for serving; its hashes are checked.

    Args:
        bundle: The folder.
        variant: Which variant; None takes the last one there that is for servers.
        trust: Public key that must have signed the bundle; see `Bundle.open`.

    Raises:
        InputError: Not a bundle.
        UsageError: The variant is not there, or none was named and neither default is there.
        IntegrityError: A file is missing or differs from its hash, or the signature does not hold.
        BackendError: ``trust`` needs a package that is missing.
    """
    if variant is None:
        variants = read_manifest(bundle, trust).variants
        wanted = [row.name for row in list(VARIANTS.values())[::-1] if row.servers]
        variant = next((name for name in wanted if name in variants), None)
        if variant is None:
            raise UsageError(
                f"bundle {bundle} has neither of the variants {' and '.join(wanted)}: name "
                f"one of its own with  --variant  ({', '.join(variants)})"
            )
    opened = Bundle.open(bundle, variant, trust=trust)
    opened.check_files()
    return opened


def signature(manifest: Manifest, tower: Tower) -> Signature:
    """Return what the manifest says of a tower's input and output."""
    input_name, output_name = GRAPH_NAMES[tower]
    image = manifest.image
    return Signature(
        input_name=input_name,
        input_type=onnx.TensorProto.UINT8 if tower == "image" else onnx.TensorProto.INT32,
        input_dims=(image.height_px, image.width_px, 3) if tower == "image" else (-1,),
        output_name=output_name,
        output_dims=(manifest.model.embed_dim,),
    )


def tower_file(bundle: Bundle, tower: Tower) -> Path:
    """Return the tower's ONNX file."""
    return bundle.path / bundle.entry.file(tower).file


def load_tower(bundle: Bundle, tower: Tower) -> onnx.ModelProto:
    """Load a tower's graph.

    Raises:
        IntegrityError: Not an ONNX file, or its inputs and outputs are not the manifest's.
    """
    path = tower_file(bundle, tower)
    try:
        model = onnx.load(path)
    except Exception as error:  # Protobuf's DecodeError, which has no type stubs.
        raise IntegrityError(f"{path} is not an ONNX file: {error}; export it again") from error
    expected = signature(bundle.manifest, tower)
    wanted = [
        (expected.input_name, expected.input_type, (-1, *expected.input_dims)),
        (expected.output_name, onnx.TensorProto.FLOAT, (-1, *expected.output_dims)),
    ]
    found = [_described(value) for value in (*model.graph.input, *model.graph.output)]
    if found != wanted:
        raise IntegrityError(
            f"{path} has the inputs and outputs {_readable(found)}, but the manifest says "
            f"{_readable(wanted)}: export the bundle again"
        )
    return model


def file_name(name: str) -> str:
    """Return a manifest's name as part of a file name: letters, digits and ``._-`` only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _described(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int, ...]]:
    tensor = value.type.tensor_type
    dims = (dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return value.name, tensor.elem_type, tuple(dims)


def _readable(values: list[tuple[str, int, tuple[int, ...]]]) -> str:
    return ", ".join(
        f"{name} {onnx.TensorProto.DataType.Name(kind)} {list(dims)}" for name, kind, dims in values
    )
