"""The files of a bundle: graphs, manifest, golden samples, report and model card."""

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from upperson_calibration.samples import CalibrationSet
from upperson_export.fold import TrainedModel
from upperson_export.pages import model_card, report_html
from upperson_export.report import ExportReport
from upperson_export.variants import EXACT, VARIANTS, VariantName
from upperson_rt import __version__
from upperson_rt.backends import open_backend
from upperson_rt.bundle import MANIFEST_FILE, read_manifest
from upperson_rt.errors import UppersonError
from upperson_rt.files import all_names, sha256_of_file
from upperson_rt.manifest import (
    FileEntry,
    ImageSection,
    Manifest,
    ModelSection,
    TextSection,
    VariantEntry,
    space_fingerprint,
)
from upperson_rt.signature import SIGNATURE_FILE
from upperson_rt.towers import Tower, run_tower

CALIBRATION = "calibration.json"

GOLDEN_SAMPLES = 8

_TOKENIZER, _CANARIES, _REPORT = "tokenizer.json", "canaries.npz", "report.json"
_NOT_IN_MANIFEST = {MANIFEST_FILE, CALIBRATION, "report.html", "README.md", SIGNATURE_FILE}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Origin of the model's weights."""

    name: str
    base: str
    base_sha256: str
    adapter_sha256: str
    """`upperson_rt.manifest.NO_ADAPTER` for a base alone."""

    embed_dim: int
    distilled_from: str | None = None
    """Fingerprint of the teacher, if the image tower was distilled."""


class BundleFiles:
    """Writes a bundle into an empty folder."""

    def __init__(
        self,
        folder: Path,
        identity: ModelIdentity,
        model: TrainedModel,
        tokenizer_json: str,
        calibration: CalibrationSet,
    ) -> None:
        self.graphs: dict[VariantName, dict[Tower, Path]] = {}
        """The graph of each tower, by variant; two variants may share a file."""
        self._folder = folder
        self._identity = identity
        self._model = model
        self._calibration = calibration
        (folder / _TOKENIZER).write_text(tokenizer_json, "utf-8")

    def add(self, variant: VariantName, tower: Tower, built: Path, made: VariantName) -> None:
        """Copy a tower's graph to its place, unless another variant has brought it."""
        target = self._folder / f"{tower}.{made}.onnx"
        if not target.exists():
            shutil.copyfile(built, target)
        self.graphs.setdefault(variant, {})[tower] = target

    def size_bytes(self, variant: VariantName) -> int:
        """Return the size of a variant's graphs, 0 if it has none."""
        return sum(path.stat().st_size for path in self.graphs.get(variant, {}).values())

    def write_draft(self) -> None:
        """Make the graphs so far a bundle that the runtime opens."""
        self.write_golden_samples()
        self._write_manifest(self._describe(None))

    def write_golden_samples(self) -> None:
        """Write the first calibration samples and the embeddings of every graph on this machine."""
        samples = self._calibration
        count = min(GOLDEN_SAMPLES, len(samples.images), len(samples.input_ids))
        inputs: dict[Tower, npt.NDArray[Any]] = {
            "image": samples.images[:count],
            "text": samples.input_ids[:count],
        }
        arrays = {"images": inputs["image"], "input_ids": inputs["text"]}
        for variant, paths in self.graphs.items():
            for tower, path in paths.items():
                backend = open_backend(path, "onnxruntime")
                arrays[f"{tower}_embeds.{variant}"] = run_tower(backend, tower, inputs[tower])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        (self._folder / _CANARIES).write_bytes(buffer.getvalue())

    def finish(self, report: ExportReport) -> None:
        """Write report, model card and, last, the final manifest."""
        manifest = self._describe(report)
        text = json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n"
        (self._folder / _REPORT).write_text(text, "utf-8")
        (self._folder / "report.html").write_text(report_html(report, manifest), "utf-8")
        (self._folder / "README.md").write_text(model_card(report, manifest), "utf-8")
        self._write_manifest(replace(manifest, report=self._entry(_REPORT)))

    def _describe(self, report: ExportReport | None) -> Manifest:
        """Return the manifest of the files so far; accuracy and candidates come from the report."""
        height_px, width_px = self._model.image_size
        identity = self._identity
        model = ModelSection(
            name=identity.name,
            base=identity.base,
            base_sha256=identity.base_sha256,
            adapter_sha256=identity.adapter_sha256,
            embed_dim=identity.embed_dim,
            distilled_from=identity.distilled_from,
        )
        image = ImageSection(height_px=height_px, width_px=width_px, resize="bilinear-antialias")
        text = TextSection(
            context_length=self._model.text.context_length, tokenizer=self._entry(_TOKENIZER)
        )
        for_cpus = [name for name in self.graphs if VARIANTS[name].made_for == "cpu"]
        return Manifest(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            generator=f"upperson {__version__}",
            model=model,
            image=image,
            text=text,
            variants={
                variant: self._variant(variant, paths, report)
                for variant, paths in self.graphs.items()
            },
            default_variant=for_cpus[0] if for_cpus else EXACT,
            canaries=self._entry(_CANARIES),
            fingerprint=space_fingerprint(model, image, text),
        )

    def _variant(
        self, variant: VariantName, paths: Mapping[Tower, Path], report: ExportReport | None
    ) -> VariantEntry:
        accuracy = None if report is None else report.variants[variant].accuracy
        return VariantEntry(
            precision=variant,
            image=self._entry(paths["image"].name),
            text=self._entry(paths["text"].name),
            canary_min_cosine=VARIANTS[variant].canary_min_cosine,
            metrics=accuracy.metrics.as_dict() if accuracy and accuracy.metrics else None,
            calibration=None if report is None else _recorded(report, variant),
        )

    def _write_manifest(self, manifest: Manifest) -> None:
        (self._folder / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8")

    def _entry(self, name: str) -> FileEntry:
        path = self._folder / name
        return FileEntry(file=name, sha256=sha256_of_file(path), size_bytes=path.stat().st_size)


def _recorded(report: ExportReport, variant: VariantName) -> dict[str, Any]:
    """Return the manifest's record of how a variant was made."""
    recorded: dict[str, Any] = {"rungs": dict(report.variants[variant].candidates)}
    if variant != EXACT and report.calibration is not None:
        recorded |= report.calibration.as_dict()
    if not VARIANTS[variant].int8:
        recorded.pop("estimator", None)  # Float variants have no ranges.
    if report.split is None:
        recorded["gate"] = "off"
    elif report.min_overlap is not None:
        recorded["gate"] = "rankings"
    return recorded


def unowned_in_bundle(folder: Path) -> set[str]:
    """Return the names in a folder that do not belong to its bundle; all, if it has none."""
    names = set(all_names(folder))
    try:
        manifest = read_manifest(folder)
    except UppersonError:  # Not a bundle.
        return names
    entries = [manifest.text.tokenizer, manifest.canaries, manifest.report]
    for variant in manifest.variants.values():
        entries += [variant.image, variant.text]
    return names - _NOT_IN_MANIFEST - {entry.file for entry in entries if entry is not None}
