"""`bundle.json`: what a bundle holds, which model made it, and which space it embeds into."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, TypeAlias

from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.printable import safe_repr, shortened
from upperson_rt.strict import (
    Constraint,
    Count,
    Sha256,
    parse_json,
    read_fields,
    require_version,
    suggestion,
)
from upperson_rt.towers import Backend, Tower

SCHEMA_VERSION = 2
"""2: with `Manifest.scores`."""

SIGNATURE_FILE = "model.sig"
"""The file that a signed bundle has beside its manifest."""

NO_ADAPTER = "none"
"""In place of an adapter's hash: the base is as it was published."""

_BF16_MIN_COSINE = 0.998
_LONGEST_PATH, _LONGEST_NAME_BYTES = 1000, 255


def _whole(least: int, most: int) -> Constraint:
    return Constraint(lambda value: least <= value <= most, f"a whole number, {least} to {most}")


# Wide enough for any CLIP; what is allocated for a bundle follows from them.
_SidePx: TypeAlias = Annotated[int, _whole(1, 4096)]
_Tokens: TypeAlias = Annotated[int, _whole(3, 4096)]
_Dimensions: TypeAlias = Annotated[int, _whole(1, 65536)]
_IS_FINGERPRINT = Constraint(
    lambda value: re.fullmatch(r"sha256:[0-9a-f]{64}", value) is not None,
    "sha256: and 64 lower-case hex digits",
)
_Fingerprint: TypeAlias = Annotated[str, _IS_FINGERPRINT]
_IS_PERCENT = Constraint(lambda value: 0 <= value <= 100, "percent, 0 to 100")
_Percent: TypeAlias = Annotated[float, _IS_PERCENT]


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
    embed_dim: _Dimensions
    distilled_from: _Fingerprint | None = None
    """Fingerprint of the model whose text tower this is and whose pictures its smaller image tower
    learned to embed alike; None for a model that learned from captions."""


@dataclass(frozen=True, kw_only=True)
class ImageSection:
    """Input of the image tower: uint8 RGB [N, height_px, width_px, 3]."""

    height_px: _SidePx
    width_px: _SidePx
    resize: Literal["bilinear-antialias"]


@dataclass(frozen=True, kw_only=True)
class TextSection:
    """Input of the text tower: int32 [N, L] with L up to context_length."""

    context_length: _Tokens
    tokenizer: FileEntry


@dataclass(frozen=True, kw_only=True)
class VariantEntry:
    """The two towers in one precision."""

    precision: str
    image: FileEntry
    text: FileEntry
    canary_min_cosine: Annotated[float, Constraint(lambda value: 0.9 <= value <= 1, "0.9 to 1")]
    """Lowest cosine to the golden embeddings with which the variant still counts as intact, where
    floats are computed as the variant says; see `min_golden_cosine`. A number near 0 would call any
    other model intact."""
    metrics: dict[str, _Percent] | None = None
    """Retrieval accuracy of these files in percent, such as ``{"R@1": 73.8}``."""
    calibration: dict[str, Any] | None = None
    """How the variant was calibrated; free JSON for people and reports."""

    def file(self, tower: Tower) -> FileEntry:
        """Return the graph of a tower."""
        return {"image": self.image, "text": self.text}[tower]

    def min_golden_cosine(self, backend: Backend) -> float:
        """Return the lowest cosine to the golden embeddings, lower for bfloat16."""
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
    scores: FileEntry | None = None
    """What turns scores into likelihoods, see `upperson_rt.score_calibration`."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not self.variants:
            raise InputError("variants: expected at least one variant", code="no_variant")
        if self.default_variant not in self.variants:
            near = suggestion(self.default_variant, self.variants)
            raise InputError(f"default_variant: no such variant, {near}", code="variant_unknown")
        self._check_files()
        expected = space_fingerprint(self.model, self.image, self.text)
        if self.fingerprint != expected:
            message = (
                f"fingerprint is {shortened(self.fingerprint)}, but the model, image and text "
                f"sections give {expected}: the manifest was edited or damaged, copy the bundle "
                "again"
            )
            raise IntegrityError(message, code="fingerprint_differs")

    def _check_files(self) -> None:
        """Refuse a file with two hashes or roles, and a variant with both towers of another."""
        roles = [("tokenizer", self.text.tokenizer), ("canaries", self.canaries)]
        roles += [] if self.report is None else [("report", self.report)]
        roles += [] if self.scores is None else [("score calibration", self.scores)]
        owners: dict[tuple[str, str], str] = {}
        for name, variant in self.variants.items():
            shown = shortened(name)
            if variant.precision != name:
                found = f"'{shown}', found {safe_repr(variant.precision)}"
                message = f"variants.{shown}: expected the precision {found}"
                raise IntegrityError(message, code="precision_differs", variant=shown)
            pair = (variant.image.sha256, variant.text.sha256)
            if (owner := owners.setdefault(pair, name)) != name:
                message = (
                    f"variants.{shown}: its files are those of {shortened(owner)}: one of them is "
                    "not what it is called; do not use this bundle unless you trust where it came "
                    "from"
                )
                raise IntegrityError(message, code="variant_copied", variant=shown)
            roles += [("image tower", variant.image), ("text tower", variant.text)]
        known: dict[str, tuple[str, FileEntry]] = {}
        for role, entry in roles:
            if known.setdefault(entry.file, (role, entry)) != (role, entry):
                message = (
                    f"the file {safe_repr(entry.file)} is named as {known[entry.file][0]} and again"
                    f" as {role} or with another hash, expected one role and one hash for each file"
                )
                raise IntegrityError(message, code="file_reused", path=shortened(entry.file))

    def to_json(self) -> str:
        """Return the text of `bundle.json`, which `parse_manifest` reads back unchanged."""
        fields = asdict(self)
        ordered = {"schema_version": fields.pop("schema_version"), **fields}
        return json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def space_fingerprint(model: ModelSection, image: ImageSection, text: TextSection) -> str:
    """Return the identity ``sha256:...`` of an embedding space.

    It covers the weights, the picture's size and resize, and the tokenizer, not names and ONNX
    files: all variants of a bundle, and a second export of the same run, may share a gallery. The
    fingerprint of a distilled model is its own, a slash and its teacher's; see `share_a_space`.
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
    own = "sha256:" + hashlib.sha256(canonical.encode("utf-8")).hexdigest()
    return own if model.distilled_from is None else f"{own}/{model.distilled_from}"


def share_a_space(one: str, other: str) -> bool:
    """Whether two fingerprints are of teacher and student, or of students of one teacher."""
    return one.rpartition("/")[2] == other.rpartition("/")[2]


def check_relative_path(name: str) -> str:
    """Return the path if it is a plain relative POSIX path that stays inside its folder."""
    path = PurePosixPath(name)
    if (
        not path.parts
        or ".." in path.parts
        or str(path) != name
        or name.startswith("/")
        or "\\" in name
        or "\0" in name
        or PureWindowsPath(name).drive
        or len(name) > _LONGEST_PATH
        or any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME_BYTES for part in path.parts)
    ):
        message = (
            f"the path {safe_repr(name)} leaves the bundle or is not spelled plainly; only "
            "relative paths inside it, no longer than disks take, are allowed. Do not use this "
            "bundle unless you trust where it came from"
        )
        raise IntegrityError(message, code="path_outside")
    return name


def parse_manifest(source: str | Mapping[str, Any], where: str = "bundle.json") -> Manifest:
    """Read a manifest strictly."""
    content: Any = None
    try:
        content = parse_json(source, where) if isinstance(source, str) else source
        update = "update it with  pip install -U upperson-rt"
        require_version(content, where, range(1, SCHEMA_VERSION + 1), update)
        return read_fields(Manifest, content, where)
    except InputError as error:
        version = content.get("schema_version") if isinstance(content, Mapping) else None
        if type(version) is int and version > SCHEMA_VERSION:
            raise  # Nothing is wrong with it.
        raise IntegrityError(
            f"{error}; copy the bundle again, or export it again", code=error.code, **error.fields
        ) from error
