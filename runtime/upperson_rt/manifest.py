"""`bundle.json`: what a bundle holds, which model made it, and which space it embeds into."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.strict import StrictObject, suggestion
from upperson_rt.towers import Tower

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
RESIZE = "bilinear-antialias"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the bundle."""

    file: str
    """Relative POSIX path inside the bundle."""
    sha256: str
    """64 hexadecimal digits, lower case."""
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which weights the bundle was made from."""

    name: str
    """For people, such as ``up-person-cuhk-pedes``."""
    base: str
    """The CLIP model underneath, such as ``ViT-B-16``."""
    base_sha256: str
    adapter_sha256: str
    embed_dim: int


@dataclass(frozen=True, kw_only=True)
class ImageSection:
    """Input of the image tower: uint8 RGB [N, height_px, width_px, 3]."""

    height_px: int
    width_px: int
    resize: str = RESIZE


@dataclass(frozen=True, kw_only=True)
class TextSection:
    """Input of the text tower: int32 [N, L] with L up to context_length."""

    context_length: int
    tokenizer: FileEntry


@dataclass(frozen=True, kw_only=True)
class VariantEntry:
    """The two towers in one precision."""

    precision: str
    image: FileEntry
    text: FileEntry
    canary_min_cosine: float
    """Lowest cosine to the golden embeddings with which the variant still counts as intact."""
    metrics: dict[str, float] | None = None
    """Retrieval accuracy of these files in percent, such as ``{"R@1": 73.8}``."""
    calibration: dict[str, Any] | None = None
    """How the variant was calibrated; free JSON for people and reports."""

    def file(self, tower: Tower) -> FileEntry:
        """Return the graph of a tower."""
        return {"image": self.image, "text": self.text}[tower]


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


def check_relative_path(name: str, where: str) -> str:
    """Return the path if it is a plain relative POSIX path that stays inside its folder.

    Args:
        name: The path.
        where: Who names it, for the message.

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
            f"{where}: the path {name!r} leaves the bundle; only relative paths inside it are "
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
    if isinstance(source, str):
        try:
            source = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON: {error}") from error
    _check_schema_version(StrictObject(source, f"{where}:"))

    root = StrictObject(source, f"{where}:", Manifest.__dataclass_fields__)
    model = _model(root.object("model", ModelSection.__dataclass_fields__))
    image = _image(root.object("image", ImageSection.__dataclass_fields__))
    text_object = root.object("text", TextSection.__dataclass_fields__)
    text = TextSection(
        context_length=text_object.positive("context_length"),
        tokenizer=_file(text_object.object("tokenizer", FileEntry.__dataclass_fields__)),
    )
    variants = _variants(root.object("variants"))
    default_variant = root.text("default_variant")
    if default_variant not in variants:
        raise root.error(
            "default_variant", f"no such variant, {suggestion(default_variant, variants)}"
        )
    report = root.optional_object("report", FileEntry.__dataclass_fields__)
    manifest = Manifest(
        created=root.text("created"),
        generator=root.text("generator"),
        model=model,
        image=image,
        text=text,
        variants=variants,
        default_variant=default_variant,
        canaries=_file(root.object("canaries", FileEntry.__dataclass_fields__)),
        report=None if report is None else _file(report),
        fingerprint=root.text("fingerprint"),
    )
    expected = space_fingerprint(model, image, text)
    if manifest.fingerprint != expected:
        raise IntegrityError(
            f"{where}: fingerprint is {manifest.fingerprint}, but its model, image and text "
            f"sections give {expected}: the manifest was edited or damaged, copy the bundle again"
        )
    return manifest


def _check_schema_version(root: StrictObject) -> None:
    version = root.positive("schema_version")
    if version > SCHEMA_VERSION:
        raise root.error(
            "schema_version",
            f"this bundle has version {version}, this program reads up to {SCHEMA_VERSION}: "
            "update it with  pip install -U upperson-rt",
        )


def _model(section: StrictObject) -> ModelSection:
    return ModelSection(
        name=section.text("name"),
        base=section.text("base"),
        base_sha256=section.text("base_sha256"),
        adapter_sha256=section.text("adapter_sha256"),
        embed_dim=section.positive("embed_dim"),
    )


def _image(section: StrictObject) -> ImageSection:
    resize = section.text("resize")
    if resize != RESIZE:
        raise section.error("resize", f"expected '{RESIZE}', found '{resize}'")
    return ImageSection(
        height_px=section.positive("height_px"), width_px=section.positive("width_px")
    )


def _variants(section: StrictObject) -> dict[str, VariantEntry]:
    if not section.content:
        raise InputError(f"{section.path}: expected at least one variant, found none")
    return {
        name: _variant(section.object(name, VariantEntry.__dataclass_fields__))
        for name in section.content
    }


def _variant(section: StrictObject) -> VariantEntry:
    min_cosine = section.number("canary_min_cosine")
    if not 0.0 < min_cosine <= 1.0:
        raise section.error("canary_min_cosine", f"expected 0 to 1, found {min_cosine}")
    metrics = section.optional_object("metrics")
    calibration = section.optional_object("calibration")
    return VariantEntry(
        precision=section.text("precision"),
        image=_file(section.object("image", FileEntry.__dataclass_fields__)),
        text=_file(section.object("text", FileEntry.__dataclass_fields__)),
        canary_min_cosine=min_cosine,
        metrics=None if metrics is None else {key: metrics.number(key) for key in metrics.content},
        calibration=None if calibration is None else dict(calibration.content),
    )


def _file(section: StrictObject) -> FileEntry:
    sha256 = section.text("sha256")
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise section.error("sha256", f"expected 64 lower-case hex digits, found '{sha256}'")
    return FileEntry(
        file=check_relative_path(section.text("file"), section.path),
        sha256=sha256,
        size_bytes=section.count("size_bytes"),
    )
