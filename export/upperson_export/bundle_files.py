"""What a bundle holds beside its graphs: manifest, canaries, report and model card."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from upperson_calibration.samples import CalibrationSet
from upperson_export.fold import TrainedModel
from upperson_export.report import model_card, report_html
from upperson_export.variants import Variant
from upperson_rt import __version__
from upperson_rt.backends import open_backend
from upperson_rt.bundle import MANIFEST_FILE
from upperson_rt.files import sha256_of_file
from upperson_rt.manifest import (
    FileEntry,
    ImageSection,
    Manifest,
    ModelSection,
    TextSection,
    VariantEntry,
    space_fingerprint,
)
from upperson_rt.towers import Tower, run_tower

Graphs = Mapping[Variant, Mapping[Tower, Path]]
"""The graph of each tower, by variant; two variants may share a file."""

CANARIES = 8
CANARY_MIN_COSINE: dict[Variant, float] = {
    "fp32": 0.9999,
    "fp16": 0.999,
    "int8": 0.99,
    "int8-fp16": 0.99,
}
"""Golden embeddings come from this machine; low-precision kernels differ between processors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Where the model's weights come from."""

    name: str
    base: str
    base_sha256: str
    adapter_sha256: str
    embed_dim: int


def write_canaries(folder: Path, calibration: CalibrationSet, files: Graphs) -> None:
    """Write the first calibration samples and what every graph makes of them here."""
    count = min(CANARIES, len(calibration.images), len(calibration.input_ids))
    inputs: dict[Tower, npt.NDArray[Any]] = {
        "image": calibration.images[:count],
        "text": calibration.input_ids[:count],
    }
    arrays = {"images": inputs["image"], "input_ids": inputs["text"]}
    for variant, paths in files.items():
        for tower, path in paths.items():
            backend = open_backend(path, "onnxruntime")
            arrays[f"{tower}_embeds.{variant}"] = run_tower(backend, tower, inputs[tower])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    (folder / "canaries.npz").write_bytes(buffer.getvalue())


def describe(
    identity: ModelIdentity,
    model: TrainedModel,
    folder: Path,
    files: Graphs,
    report: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of the files so far; accuracy and rungs come from the report."""
    height_px, width_px = model.image_size
    section = ModelSection(
        name=identity.name,
        base=identity.base,
        base_sha256=identity.base_sha256,
        adapter_sha256=identity.adapter_sha256,
        embed_dim=identity.embed_dim,
    )
    image = ImageSection(height_px=height_px, width_px=width_px, resize="bilinear-antialias")
    text = TextSection(
        context_length=model.text.context_length, tokenizer=_entry(folder, "tokenizer.json")
    )
    rows = {} if report is None else report["variants"]
    return Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        generator=f"upperson {__version__}",
        model=section,
        image=image,
        text=text,
        variants={
            variant: VariantEntry(
                precision=variant,
                image=_entry(folder, paths["image"].name),
                text=_entry(folder, paths["text"].name),
                canary_min_cosine=CANARY_MIN_COSINE[variant],
                metrics=rows[variant]["metrics"] if rows else None,
                calibration=_recorded(report, variant) if report is not None else None,
            )
            for variant, paths in files.items()
        },
        default_variant="int8" if "int8" in files else "fp32",
        canaries=_entry(folder, "canaries.npz"),
        fingerprint=space_fingerprint(section, image, text),
    )


def _recorded(report: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """Return what the manifest keeps of how a variant came about."""
    recorded: dict[str, Any] = {"rungs": report["variants"][variant]["rungs"]}
    if variant != "fp32":
        recorded |= report["calibration"]
    if not variant.startswith("int8"):
        recorded.pop("estimator", None)  # Float variants have no ranges.
    if report["split"] is None:
        recorded["gate"] = "off"
    return recorded


def finish(
    folder: Path,
    identity: ModelIdentity,
    model: TrainedModel,
    files: Graphs,
    report: dict[str, Any],
) -> None:
    """Write report, model card and the final manifest, which is what makes it a bundle."""
    manifest = describe(identity, model, folder, files, report)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, "utf-8")
    (folder / "report.html").write_text(report_html(report, manifest), "utf-8")
    (folder / "README.md").write_text(model_card(report, manifest), "utf-8")
    write_manifest(folder, replace(manifest, report=_entry(folder, "report.json")))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``bundle.json``."""
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8")


def _entry(folder: Path, name: str) -> FileEntry:
    path = folder / name
    return FileEntry(file=name, sha256=sha256_of_file(path), size_bytes=path.stat().st_size)
