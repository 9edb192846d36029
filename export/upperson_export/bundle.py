"""Write a bundle: fold, export, calibrate, climb the ladder, and only then put it in place."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx

from upperson_calibration.calibration_file import Calibration, Samples, write_calibration
from upperson_calibration.estimators import DEFAULT_ESTIMATOR, Estimator
from upperson_calibration.samples import CalibrationSet
from upperson_export.accuracy import RetrievalSplit
from upperson_export.bundle_files import (
    ModelIdentity,
    describe,
    finish,
    write_canaries,
    write_manifest,
)
from upperson_export.candidates import INT8_RUNGS, TowerCandidates
from upperson_export.embeddings import FormEmbeddings
from upperson_export.fold import TrainedModel, fold_image_tower, fold_text_tower
from upperson_export.ladder import Ladder, Measured, backend_of
from upperson_export.latency import Stopwatch
from upperson_export.lint import lint
from upperson_export.plain import PlainImageTower, PlainTextTower
from upperson_export.variants import Variant
from upperson_rt.bundle import MANIFEST_FILE, Bundle, read_manifest
from upperson_rt.errors import IntegrityError, UppersonError
from upperson_rt.files import all_names, new_folder, sha256_of_file
from upperson_rt.towers import TOWERS, Tower

__all__ = ["ExportOptions", "ModelIdentity", "export_bundle", "foreign_to_bundle"]

Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""

CALIBRATION = "calibration.json"

_NOT_IN_MANIFEST = {MANIFEST_FILE, CALIBRATION, "report.html", "README.md"}

_WORK = ".building"

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

    estimator: Estimator | None = None
    """None: that of a calibration that is reused, else `DEFAULT_ESTIMATOR`."""


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
        calibration: Sets ranges; its first samples become the canaries.
        split: Every form is measured on it, through the runtime. None switches the gate off, which
            manifest and report record.
        output: Folder to write; an older bundle there is replaced.
        options: What to export.
        progress: Told what goes on.
        reused: An earlier calibration of this model: what it holds is not measured again, and its
            samples are recorded in place of ``calibration``.

    Raises:
        UsageError: A reused calibration has another estimator than the options.
        InputError: NaN weights, ``output`` holds something that is not a bundle, or a reused
            calibration saw other samples and lacks what is needed.
        AccuracyGateError: No form that is allowed keeps the accuracy.
        IntegrityError: ONNX and torch disagree, a typed graph would be refused by TensorRT, a
            reused calibration is of another model, or a file does not work in the runtime.
    """
    estimator = options.estimator or DEFAULT_ESTIMATOR
    if reused is not None:
        estimator = reused.require_estimator(options.estimator)
    with new_folder(output, foreign_to_bundle) as folder:
        work = folder / _WORK
        work.mkdir()
        towers = _towers(model, calibration, work, estimator, progress, reused)
        if reused is not None:
            reused.for_graphs({t: sha256_of_file(towers[t].fp32) for t in TOWERS})
        (folder / "tokenizer.json").write_text(tokenizer_json, "utf-8")
        files: dict[Variant, dict[Tower, Path]] = {"fp32": {}}
        for tower in TOWERS:
            files["fp32"][tower] = _place(folder, towers[tower].fp32, tower, "fp32")
        write_canaries(folder, calibration, files)
        write_manifest(folder, describe(identity, model, folder, files))

        ladder = None
        rungs: dict[Variant, dict[Tower, str]] = {"fp32": dict.fromkeys(TOWERS, "fp32")}
        if split is not None:
            source = FormEmbeddings(folder, towers, split, progress)
            ladder = Ladder(
                split=split,
                source=source,
                max_r1_drop=options.max_r1_drop,
                int8_only=options.int8_only,
                also_on=("openvino",) if find_spec("openvino") is not None else (),
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
        calibrated = None
        if options.variants:
            calibrated = Calibration(
                samples=Samples.of(calibration) if reused is None else reused.samples,
                estimator=estimator,
                towers={str(tower): towers[tower].calibrator.found() for tower in TOWERS},
            )
            write_calibration(folder / CALIBRATION, calibrated)
        kept_float = {
            variant: {
                tower: [asdict(layer) for layer in towers[tower].kept_float(chosen[tower])]
                for tower in TOWERS
            }
            for variant, chosen in rungs.items()
        }
        shutil.rmtree(work)
        write_canaries(folder, calibration, files)
        progress("measuring latency", 0, 1)
        stopwatch = Stopwatch(calibration)
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
                    **_accuracy(ladder, variant, rungs[variant]),
                    "rungs": rungs[variant],
                    "kept_float": kept_float[variant],
                    "shipped": variant not in left_out,
                    "reason": left_out.get(variant),
                    "size_bytes": sum(
                        path.stat().st_size for path in files.get(variant, {}).values()
                    ),
                    "latency": stopwatch.measure(files[variant], variant)
                    if variant in files
                    else {},
                }
                for variant in rungs
            },
            "ladder": [] if ladder is None else [found.as_dict() for found in ladder.measured],
            "latency_conditions": stopwatch.conditions(),
            "calibration": calibrated
            and {
                **calibrated.samples.describe(),
                "estimator": estimator,
                "reused_file_sha256": reused and reused.sha256,
            },
        }
        progress("measuring latency", 1, 1)
        finish(folder, identity, model, files, report)
        for variant in files:
            Bundle.open(folder, variant).check_canaries()
    return report


def _towers(
    model: TrainedModel,
    calibration: CalibrationSet,
    work: Path,
    estimator: Estimator,
    progress: Report,
    reused: Calibration | None,
) -> dict[Tower, TowerCandidates]:
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
            estimator=estimator,
            reused=None if reused is None else reused.towers.get(tower),
            same_samples=reused is not None and reused.samples.same_as(calibration),
            progress=progress,
        )
        for tower in TOWERS
    }
    towers["image"].calibrator.know_other(towers["text"].calibrator)
    towers["text"].calibrator.know_other(towers["image"].calibrator)
    return towers


def foreign_to_bundle(folder: Path) -> set[str]:
    """Return the names in a folder that are of no bundle: all, if it is none."""
    names = set(all_names(folder))
    try:
        manifest = read_manifest(folder)
    except UppersonError:  # Not a bundle.
        return names
    entries = [manifest.text.tokenizer, manifest.canaries, manifest.report]
    for variant in manifest.variants.values():
        entries += [variant.image, variant.text]
    return names - _NOT_IN_MANIFEST - {entry.file for entry in entries if entry is not None}


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


def _accuracy(
    ladder: Ladder | None, variant: Variant, rungs: Mapping[Tower, str]
) -> dict[str, Any]:
    """Return what the chosen towers were measured to do together, on ONNX Runtime and elsewhere."""
    if ladder is None:
        return {"metrics": None, "r1_drop": None, "float_types": {}, "elsewhere": {}}
    if variant == "fp32":
        metrics = ladder.reference.mean().as_dict()
        types = dict.fromkeys(TOWERS, "f32")
        return {"metrics": metrics, "r1_drop": None, "float_types": types, "elsewhere": {}}
    chosen = " + ".join(rungs[tower] for tower in TOWERS)
    found = {
        row.backend: _kept(row)
        for row in ladder.measured
        if (row.variant, row.tower, row.rung) == (variant, "both", chosen)
    }
    return {**found.pop(backend_of(variant)), "elsewhere": found}


_KEPT = ("metrics", "r1_drop", "cosine", "top10_overlap", "float_types")


def _kept(measured: Measured) -> dict[str, Any]:
    row = measured.as_dict()
    return {name: row[name] for name in _KEPT}
