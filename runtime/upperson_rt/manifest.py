"""`bundle.json`: what a bundle holds, which model made it, and which space it embeds into."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.strict import (
    Constraint,
    Count,
    Positive,
    Sha256,
    parse_json,
    read_fields,
    require_version,
    suggestion,
)
from upperson_rt.towers import Backend, Tower

__all__ = [
    "SCHEMA_VERSION",
    "FileEntry",
    "ImageSection",
    "Manifest",
    "ModelSection",
    "TextSection",
    "VariantEntry",
    "check_relative_path",
    "parse_manifest",
    "space_fingerprint",
]

SCHEMA_VERSION = 1

_BF16_MIN_COSINE = 0.998


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the bundle."""

    file: str
    """Relative POSIX path inside the bundle."""
    sha256: Sha256
    size_bytes: Count

    def __post_init__(self) -> None:
        check_relative_path(self.file)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which weights the bundle was made from."""

    name: str
    """For people, such as ``up-person-cuhk-pedes``."""
    base: str
    """The CLIP model underneath, such as ``ViT-B-16``."""
    base_sha256: str
    adapter_sha256: str
    embed_dim: Positive


@dataclass(frozen=True, kw_only=True)
class ImageSection:
    """Input of the image tower: uint8 RGB [N, height_px, width_px, 3]."""

    height_px: Positive
    width_px: Positive
    resize: Literal["bilinear-antialias"]


@dataclass(frozen=True, kw_only=True)
class TextSection:
    """Input of the text tower: int32 [N, L] with L up to context_length."""

    context_length: Positive
    tokenizer: FileEntry


@dataclass(frozen=True, kw_only=True)
class VariantEntry:
    """The two towers in one precision."""

    precision: str
    image: FileEntry
    text: FileEntry
    canary_min_cosine: Annotated[float, Constraint(lambda value: 0 < value <= 1, "0 to 1")]
    """Lowest cosine to the golden embeddings with which the variant still counts as intact, where
    floats are computed as the variant says; see `canary_floor`."""
    metrics: dict[str, float] | None = None
    """Retrieval accuracy of these files in percent, such as ``{"R@1": 73.8}``."""
    calibration: dict[str, Any] | None = None
    """How the variant was calibrated; free JSON for people and reports."""

    def file(self, tower: Tower) -> FileEntry:
        """Return the graph of a tower."""
        return {"image": self.image, "text": self.text}[tower]

    def canary_floor(self, backend: Backend) -> float:
        """Return the lowest cosine to the golden embeddings that a backend may give.

        One that takes bfloat16, of 8 bits, where the file says float32 may be further away.
        """
        in_bf16 = getattr(backend, "float_type", None) == "bf16"
        return min(self.canary_min_cosine, _BF16_MIN_COSINE) if in_bf16 else self.canary_min_cosine


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `bundle.json`, checked."""

    created: str
    """ISO 8601, UTC."""
    generator: str
    """Program and version that wrote the bundle, such as ``upperson 0.1.0``."""
    model: ModelSection
    image: ImageSection
    text: TextSection
    variants: dict[str, VariantEntry]
    default_variant: str
    canaries: FileEntry
    fingerprint: str
    """`space_fingerprint` of the sections above."""
    report: FileEntry | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not self.variants:
            raise InputError("variants: expected at least one variant, found none")
        if self.default_variant not in self.variants:
            near = suggestion(self.default_variant, self.variants)
            raise InputError(f"default_variant: no such variant, {near}")
        expected = space_fingerprint(self.model, self.image, self.text)
        if self.fingerprint != expected:
            raise IntegrityError(
                f"fingerprint is {self.fingerprint}, but the model, image and text sections give "
                f"{expected}: the manifest was edited or damaged, copy the bundle again"
            )

    def to_json(self) -> str:
        """Return the text of `bundle.json`, which `parse_manifest` reads back unchanged."""
        fields = asdict(self)
        ordered = {"schema_version": fields.pop("schema_version"), **fields}
        return json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def space_fingerprint(model: ModelSection, image: ImageSection, text: TextSection) -> str:
    """Return the identity ``sha256:...`` of an embedding space.

    It covers what decides where a picture or sentence lands: the weights, the picture's size and
    resize, and the tokenizer. It leaves out names and the ONNX files: all variants of a bundle,
    and a second export of the same run, share one space and may share a gallery.
    """
    identity = {
        "base": model.base,
        "base_sha256": model.base_sha256,
        "adapter_sha256": model.adapter_sha256,
        "embed_dim": model.embed_dim,
        "height_px": image.height_px,
        "width_px": image.width_px,
        "resize": image.resize,
        "context_length": text.context_length,
        "tokenizer_sha256": text.tokenizer.sha256,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def check_relative_path(name: str) -> str:
    """Return the path if it is a plain relative POSIX path that stays inside its folder.

    Raises:
        IntegrityError: It is absolute, or has ``..``, a backslash, a drive or a null character.
    """
    parts = PurePosixPath(name).parts
    if (
        not parts
        or ".." in parts
        or name.startswith("/")
        or "\\" in name
        or "\0" in name
        or PureWindowsPath(name).drive
    ):
        raise IntegrityError(
            f"the path {name!r} leaves the bundle; only relative paths inside it are "
            "allowed. Do not use this bundle unless you trust where it came from"
        )
    return name


def parse_manifest(source: str | Mapping[str, Any], where: str = "bundle.json") -> Manifest:
    """Read a manifest strictly.

    Args:
        source: The text of `bundle.json`, or the parsed object.
        where: What to call it in messages.

    Raises:
        InputError: Not JSON, a newer schema, an unknown or missing key, a wrong type.
        IntegrityError: A path leaves the bundle, or the fingerprint does not match.
    """
    content = parse_json(source, where) if isinstance(source, str) else source
    update = "update it with  pip install -U upperson-rt"
    require_version(content, where, range(1, SCHEMA_VERSION + 1), update)
    return read_fields(Manifest, content, where)
