"""Write a bundle: fold, export, calibrate, climb the ladder, and only then put it in place."""

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from upperson_calibration.calibration_file import (
    Calibration,
    Samples,
    TowerCalibration,
    write_calibration,
)
from upperson_calibration.estimators import Estimator
from upperson_calibration.samples import CalibrationSet
from upperson_export.accuracy import RetrievalSplit
from upperson_export.candidates import INT8_RUNGS, TowerCandidates
from upperson_export.fold import TrainedModel, fold_image_tower, fold_text_tower
from upperson_export.ladder import Ladder
from upperson_export.latency import latencies
from upperson_export.lint import lint
from upperson_export.plain import PlainImageTower, PlainTextTower
from upperson_export.report import model_card, report_html
from upperson_export.variants import Variant
from upperson_rt import __version__
from upperson_rt.atomic import new_folder
from upperson_rt.backends import open_backend
from upperson_rt.bundle import MANIFEST_FILE, Bundle, read_manifest, sha256_of_file
from upperson_rt.canaries import Tower
from upperson_rt.encoder import Encoder, run_tower
from upperson_rt.errors import IntegrityError, UppersonError
from upperson_rt.manifest import (
    FileEntry,
    ImageSection,
    Manifest,
    ModelSection,
    TextSection,
    VariantEntry,
    space_fingerprint,
)

Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""

TOWERS: tuple[Tower, ...] = ("image", "text")

CALIBRATION = "calibration.json"

_FILES = {
    MANIFEST_FILE, "tokenizer.json", "canaries.npz", "report.json", "report.html", "README.md",
    CALIBRATION,
}  # fmt: skip

_WORK = ".building"

CANARIES = 8
CANARY_MIN_COSINE: dict[Variant, float] = {
    "fp32": 0.9999,
    "fp16": 0.999,
    "int8": 0.99,
    "int8-fp16": 0.99,
}
"""Golden embeddings come from this machine; low-precision kernels differ between processors."""

UNGATED_RUNG = "smoothed"
"""What is shipped where nothing can be measured: exact in float, and robust to outliers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What to export and what accuracy to insist on."""

    variants: tuple[Variant, ...] = ("int8",)
    """Beside fp32, which is always written."""

    max_r1_drop: float = 0.5
    """Most points of R@1 that a variant may lose against fp32."""

    int8_only: bool = False
    """Refuse float towers in the int8 variants: AccuracyGateError instead."""

    estimator: Estimator = "percentile-99.999"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Where the model's weights come from."""

    name: str
    base: str
    base_sha256: str
    adapter_sha256: str
    embed_dim: int


def export_bundle(
    model: TrainedModel,
    identity: ModelIdentity,
    tokenizer_json: str,
    calibration: CalibrationSet,
    split: RetrievalSplit | None,
    output: Path,
    options: ExportOptions,
    progress: Report,
    reused: Calibration | None = None,
) -> dict[str, Any]:
    """Export a model into a bundle and return its report.

    The bundle appears at ``output`` complete or not at all.

    Args:
        model: A trained dual encoder in evaluation mode.
        identity: Recorded in the manifest; decides the fingerprint.
        tokenizer_json: Content of ``tokenizer.json``.
        calibration: Sets int8 ranges; its first samples become the canaries.
        split: Every form is measured on it, through the runtime. None switches the gate off, which
            manifest and report record.
        output: Folder to write; an older bundle there is replaced.
        options: What to export.
        progress: Told what goes on.
        reused: An earlier calibration of this model: its smoothing and damage are taken over.

    Raises:
        InputError: NaN weights, or ``output`` holds something that is not a bundle.
        AccuracyGateError: No form that is allowed keeps the accuracy.
        IntegrityError: ONNX and torch disagree, a typed graph would be refused by TensorRT, a
            reused calibration is of another model, or a file does not work in the runtime.
    """
    with new_folder(output, is_earlier=_is_bundle) as folder:
        work = folder / _WORK
        work.mkdir()
        towers = _towers(model, calibration, work, options, progress, reused)
        if reused is not None:
            reused.for_graphs({t: sha256_of_file(towers[t].fp32) for t in TOWERS})
        (folder / "tokenizer.json").write_text(tokenizer_json, "utf-8")
        files: dict[Variant, dict[Tower, Path]] = {"fp32": {}}
        for tower in TOWERS:
            files["fp32"][tower] = _place(folder, towers[tower].fp32, tower, "fp32")
        _write_canaries(folder, calibration, files)
        manifest = _manifest(identity, model, folder, files)
        _write_manifest(folder, manifest)

        ladder = None
        rungs: dict[Variant, dict[Tower, str]] = {"fp32": dict.fromkeys(TOWERS, "fp32")}
        if split is not None:
            source = _Embeddings(folder, towers, split, progress)
            ladder = Ladder(
                split=split,
                source=source,
                max_r1_drop=options.max_r1_drop,
                int8_only=options.int8_only,
            )
        for variant in options.variants:
            if ladder is not None:
                rungs[variant] = ladder.climb(variant)
            else:
                ungated = UNGATED_RUNG if variant.startswith("int8") else variant
                rungs[variant] = dict.fromkeys(TOWERS, ungated)
        left_out: dict[Variant, str] = {
            variant: f"no tower keeps its accuracy in {variant}"
            for variant, chosen in rungs.items()
            if variant != "fp32" and not set(chosen.values()) & {*INT8_RUNGS, variant}
        }
        for variant, chosen in rungs.items():
            if variant == "fp32" or variant in left_out:
                continue
            files[variant] = {}
            for tower in TOWERS:
                built = towers[tower].build(variant, chosen[tower])
                _require_clean(built)
                float_rung = chosen[tower] if chosen[tower] in ("fp32", "fp16") else None
                if float_rung is not None and float_rung != variant and float_rung in files:
                    files[variant][tower] = files[float_rung][tower]
                else:
                    files[variant][tower] = _place(folder, built, tower, float_rung or variant)
        calibrated = any(variant.startswith("int8") for variant in rungs)
        if calibrated:
            found = {str(tower): towers[tower].calibration() for tower in TOWERS}
            write_calibration(
                folder / CALIBRATION, Calibration(samples=Samples.of(calibration), towers=found)
            )
        kept_float = {
            variant: {tower: towers[tower].kept_float(chosen[tower]) for tower in TOWERS}
            for variant, chosen in rungs.items()
        }
        shutil.rmtree(work)
        _write_canaries(folder, calibration, files)
        progress("measuring latency", 0, 1)
        report = {
            "model": identity.name,
            "split": split
            and {
                "name": split.name,
                "images": len(split.image_files),
                "captions": len(split.captions),
            },
            "max_r1_drop": options.max_r1_drop if split is not None else None,
            "variants": {
                variant: {
                    **_accuracy(ladder, variant),
                    "rungs": rungs[variant],
                    "kept_float": kept_float[variant],
                    "shipped": variant not in left_out,
                    "reason": left_out.get(variant),
                    "size_bytes": sum(
                        (folder / path.name).stat().st_size
                        for path in files.get(variant, {}).values()
                    ),
                    "latency": latencies(files[variant], variant, calibration)
                    if variant in files
                    else {},
                }
                for variant in rungs
            },
            "ladder": [] if ladder is None else [found.as_dict() for found in ladder.measured],
            "calibration": calibration.describe() | {"estimator": options.estimator}
            if calibrated
            else None,
        }
        progress("measuring latency", 1, 1)
        _finish(folder, identity, model, files, report)
        for variant in files:
            Bundle.open(folder, variant).check_canaries()
    return report


class _Embeddings:
    """Embeddings of the split for any form, from the built file and through the runtime."""

    def __init__(
        self,
        folder: Path,
        towers: Mapping[Tower, TowerCandidates],
        split: RetrievalSplit,
        progress: Report,
    ) -> None:
        self._exact = Bundle.open(folder, "fp32")
        self._towers = towers
        self._split = split
        self._progress = progress
        self._known: dict[tuple[Tower, Path], npt.NDArray[np.float32]] = {}

    def __call__(self, tower: Tower, variant: Variant, rung: str) -> npt.NDArray[np.float32]:
        path = self._towers[tower].build(variant, rung)
        if (tower, path) not in self._known:
            backend = open_backend(path, "onnxruntime")
            encoder = Encoder(
                self._exact.manifest, variant, self._exact.tokenizer, lambda _: backend
            )
            work = f"measuring the {tower} tower, {variant} {rung}"
            if tower == "image":
                embeds = encoder.encode_images(
                    list(self._split.image_files),
                    progress=lambda done, total: self._progress(work, done, total),
                )
            else:
                self._progress(work, 0, 1)
                embeds = encoder.encode_texts(list(self._split.captions))
                self._progress(work, 1, 1)
            self._known[tower, path] = embeds
        return self._known[tower, path]


def _towers(
    model: TrainedModel,
    calibration: CalibrationSet,
    work: Path,
    options: ExportOptions,
    progress: Report,
    reused: Calibration | None,
) -> dict[Tower, TowerCandidates]:
    known: Mapping[str, TowerCalibration] = {} if reused is None else reused.towers
    inputs: dict[Tower, npt.NDArray[Any]] = {
        "image": calibration.images,
        "text": calibration.input_ids,
    }
    plain: dict[Tower, PlainImageTower | PlainTextTower] = {
        "image": fold_image_tower(model),
        "text": fold_text_tower(model),
    }
    towers: dict[Tower, TowerCandidates] = {
        tower: TowerCandidates(
            tower,
            plain[tower],
            inputs[tower],
            work,
            estimator=options.estimator,
            reused=known.get(tower),
            progress=progress,
        )
        for tower in TOWERS
    }
    towers["image"].know_other(towers["text"])
    towers["text"].know_other(towers["image"])
    return towers


def _is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle and holds no file that is not of one."""
    try:
        read_manifest(folder)
    except UppersonError:
        return False
    return all(path.suffix == ".onnx" or path.name in _FILES for path in folder.iterdir())


def _place(folder: Path, built: Path, tower: Tower, name: str) -> Path:
    """Copy a built file to its place in the bundle; the work folder may need it again."""
    target = folder / f"{tower}.{name}.onnx"
    shutil.copyfile(built, target)
    return target


def _require_clean(path: Path) -> None:
    """Refuse a graph that TensorRT would refuse; every bundle may be taken to a device."""
    if findings := lint(onnx.load(path)):
        first = findings[0]
        raise IntegrityError(
            f"{path.name} has {len(findings)} problems for TensorRT, first {first.rule} at "
            f"{first.node}: {first.message}: report the versions of torch, onnxscript and onnx"
        )


def _write_canaries(
    folder: Path,
    calibration: CalibrationSet,
    files: Mapping[Variant, Mapping[Tower, Path]],
) -> None:
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


def _accuracy(ladder: Ladder | None, variant: Variant) -> dict[str, Any]:
    """Return a variant's metrics and R@1 drop: of both towers, as last measured."""
    if ladder is None:
        return {"metrics": None, "r1_drop": None}
    if variant == "fp32":
        return {"metrics": ladder.reference.mean().as_dict(), "r1_drop": None}
    last = [found for found in ladder.measured if (found.variant, found.tower) == (variant, "both")]
    row = last[-1].as_dict()
    return {name: row[name] for name in ("metrics", "r1_drop", "cosine", "top10_overlap")}


def _manifest(
    identity: ModelIdentity,
    model: TrainedModel,
    folder: Path,
    files: Mapping[Variant, Mapping[Tower, Path]],
    report: Mapping[str, Any] | None = None,
) -> Manifest:
    height_px, width_px = model.image_size
    section = ModelSection(
        name=identity.name,
        base=identity.base,
        base_sha256=identity.base_sha256,
        adapter_sha256=identity.adapter_sha256,
        embed_dim=identity.embed_dim,
    )
    image = ImageSection(height_px=height_px, width_px=width_px)
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
    if variant.startswith("int8"):
        recorded |= report["calibration"]
    if report["split"] is None:
        recorded["gate"] = "off"
    return recorded


def _finish(
    folder: Path,
    identity: ModelIdentity,
    model: TrainedModel,
    files: Mapping[Variant, Mapping[Tower, Path]],
    report: dict[str, Any],
) -> None:
    """Write report, model card and the final manifest, which is what makes it a bundle."""
    manifest = _manifest(identity, model, folder, files, report)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, "utf-8")
    (folder / "report.html").write_text(report_html(report, manifest), "utf-8")
    (folder / "README.md").write_text(model_card(report, manifest), "utf-8")
    _write_manifest(folder, replace(manifest, report=_entry(folder, "report.json")))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8")


def _entry(folder: Path, name: str) -> FileEntry:
    path = folder / name
    return FileEntry(file=name, sha256=sha256_of_file(path), size_bytes=path.stat().st_size)
