"""Write a bundle: fold, export, calibrate, climb the ladder, and only then put it in place."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir

from upperson_calibration.calibration_file import Calibration, Samples, write_calibration
from upperson_calibration.ranges import DEFAULT_ESTIMATOR, Estimator
from upperson_calibration.samples import CalibrationSet
from upperson_export.bundle_files import (
    CALIBRATION,
    BundleFiles,
    ModelIdentity,
    foreign_to_bundle,
)
from upperson_export.fold import TrainedModel, fold_image_tower, fold_text_tower
from upperson_export.forms import CalibrationTask, FormEmbeddings, StageProgress, TowerForms
from upperson_export.graphs import HalfSums, require_one_file
from upperson_export.ladder import MIN_OVERLAP, Ladder, RetrievalSplit
from upperson_export.lint import lint
from upperson_export.plain import PlainTower
from upperson_export.report import (
    CalibrationRecord,
    ExportReport,
    SplitSize,
    Stopwatch,
    VariantReport,
)
from upperson_export.variants import EXACT, VARIANTS, VariantName
from upperson_rt.bundle import Bundle
from upperson_rt.errors import IntegrityError
from upperson_rt.files import new_folder, sha256_of_file
from upperson_rt.signature import read_private_key, sign_folder
from upperson_rt.towers import TOWERS, Tower

__all__ = ["ExportOptions", "ModelIdentity", "export_bundle", "foreign_to_bundle"]

_WORK = ".building"

Rungs = Mapping[Tower, str]
"""The rung of each tower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What to export and what accuracy to insist on."""

    variants: tuple[VariantName, ...] = ("int8",)
    """Beside fp32, which is always written."""

    max_r1_drop: float = 0.5
    """Most points of R@1 that a variant may lose against fp32, where identities are known."""

    min_overlap: float = MIN_OVERLAP
    """Least percent of fp32's first ten pictures that a variant must keep, where they are not."""

    int8_only: bool = False
    """Refuse float towers in the int8 variants: AccuracyGateError instead."""

    estimator: Estimator | None = None
    """None: that of a calibration that is reused, else `DEFAULT_ESTIMATOR`."""

    sign: Path | None = None
    """File of the private key that signs the bundle; see `upperson_rt.signature`."""


def export_bundle(
    model: TrainedModel,
    identity: ModelIdentity,
    tokenizer_json: str,
    calibration: CalibrationSet,
    split: RetrievalSplit | None,
    output: Path,
    options: ExportOptions,
    progress: StageProgress,
    reused: Calibration | None = None,
) -> ExportReport:
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
        InputError: NaN weights, a tower of more than 2 GiB, a key that cannot sign, ``output``
            holds something that is not a bundle, or a reused calibration saw other samples and
            lacks what is needed.
        AccuracyGateError: No form that is allowed keeps the accuracy.
        IntegrityError: ONNX and torch disagree, a typed graph would be refused by TensorRT, a
            reused calibration is of another model, or a file does not work in the runtime.
    """
    estimator = options.estimator or DEFAULT_ESTIMATOR
    if reused is not None:
        estimator = reused.require_estimator(options.estimator)
    key = None if options.sign is None else read_private_key(options.sign)
    with new_folder(output, foreign_to_bundle) as folder:
        work = folder / _WORK
        work.mkdir()
        task = CalibrationTask(
            samples=calibration, estimator=estimator, reused=reused, progress=progress
        )
        towers = _towers(model, work, task)
        if reused is not None:
            reused.for_graphs({tower: sha256_of_file(towers[tower].fp32.file) for tower in TOWERS})
        files = BundleFiles(folder, identity, model, tokenizer_json, calibration)
        for tower in TOWERS:
            files.add(EXACT, tower, towers[tower].fp32.file, EXACT)
        files.write_draft()  # The ladder embeds with its tokenizer and sizes.
        ladder = _ladder(folder, towers, split, options, progress)
        chosen: dict[VariantName, Rungs] = {EXACT: dict.fromkeys(TOWERS, EXACT)}
        half_sums: dict[VariantName, dict[Tower, HalfSums]] = {}
        for variant in options.variants:
            ungated = dict.fromkeys(TOWERS, VARIANTS[variant].ungated_rung)
            chosen[variant] = ungated if ladder is None else ladder.climb(variant)
            if _left_out(variant, chosen[variant]) is None:
                half_sums[variant] = {
                    tower: sums
                    for tower, rung in chosen[variant].items()
                    if (sums := towers[tower].bear_half_sums(variant, rung)) is not None
                }
                _add(files, towers, variant, chosen[variant])
        record = _write_calibration(folder, towers, task) if options.variants else None
        kept_float = {
            variant: {tower: towers[tower].kept_float(rungs[tower]) for tower in TOWERS}
            for variant, rungs in chosen.items()
        }
        shutil.rmtree(work)
        files.write_canaries()
        progress("measuring latency", 0, 1)
        stopwatch = Stopwatch(calibration)
        variants = {}
        for variant, rungs in chosen.items():
            measured = {} if ladder is None else ladder.accuracy(variant, rungs)
            variants[variant] = VariantReport(
                rungs=rungs,
                accuracy=measured.pop(VARIANTS[variant].measured_on, None),
                elsewhere=measured,
                kept_float=kept_float[variant],
                half_sums=half_sums.get(variant, {}),
                left_out=_left_out(variant, rungs),
                size_bytes=files.size_bytes(variant),
                times=stopwatch.measure(files.graphs.get(variant, {}), variant),
            )
        progress("measuring latency", 1, 1)
        report = ExportReport(
            model=identity.name,
            split=None if split is None else SplitSize.of(split),
            max_r1_drop=options.max_r1_drop if split and split.has_identities else None,
            min_overlap=options.min_overlap if split and not split.has_identities else None,
            variants=variants,
            ladder=[] if ladder is None else ladder.measured,
            conditions=stopwatch.conditions(),
            calibration=record,
        )
        files.finish(report)
        for variant in files.graphs:
            Bundle.open(folder, variant, "onnxruntime").check_canaries()
        if key is not None:
            sign_folder(folder, key, identity.name)
    return report


def _towers(model: TrainedModel, work: Path, task: CalibrationTask) -> dict[Tower, TowerForms]:
    plain: dict[Tower, PlainTower] = {
        "image": fold_image_tower(model),
        "text": fold_text_tower(model),
    }
    for tower in TOWERS:
        require_one_file(plain[tower], tower)
    towers = {tower: TowerForms(tower, plain[tower], work, task) for tower in TOWERS}
    towers["image"].calibrator.know_other(towers["text"].calibrator)
    towers["text"].calibrator.know_other(towers["image"].calibrator)
    return towers


def _ladder(
    folder: Path,
    towers: Mapping[Tower, TowerForms],
    split: RetrievalSplit | None,
    options: ExportOptions,
    progress: StageProgress,
) -> Ladder | None:
    if split is None:
        return None
    return Ladder(
        split=split,
        source=FormEmbeddings(folder, towers, split, progress),
        max_r1_drop=options.max_r1_drop,
        min_overlap=options.min_overlap,
        int8_only=options.int8_only,
        also_on=("openvino",) if find_spec("openvino") is not None else (),
    )


def _write_calibration(
    folder: Path, towers: Mapping[Tower, TowerForms], task: CalibrationTask
) -> CalibrationRecord:
    """Keep what was found, to read and to use again; return what report and manifest say of it."""
    reused = task.reused
    samples = Samples.of(task.samples) if reused is None else reused.samples
    found = {str(tower): forms.calibrator.found() for tower, forms in towers.items()}
    write_calibration(
        folder / CALIBRATION,
        Calibration(samples=samples, estimator=task.estimator, towers=found),
    )
    return CalibrationRecord(
        samples=samples,
        estimator=task.estimator,
        reused_file_sha256=None if reused is None else reused.sha256,
    )


def _left_out(variant: VariantName, rungs: Rungs) -> str | None:
    """Say why a variant is not worth a place: it would be another one under its name."""
    if set(rungs.values()) & set(VARIANTS[variant].own_rungs):
        return None
    return f"no tower keeps its accuracy in {variant}"


def _add(
    files: BundleFiles,
    towers: Mapping[Tower, TowerForms],
    variant: VariantName,
    rungs: Rungs,
) -> None:
    """Build and place the graphs of a variant, if TensorRT would take them.

    Raises:
        IntegrityError: It would not; every bundle may be taken to a device.
    """
    for tower, rung in rungs.items():
        built = towers[tower].build(variant, rung)
        if findings := lint(ir.load(built)):
            first = findings[0]
            raise IntegrityError(
                f"{built.name} has {len(findings)} problems for TensorRT, first {first.rule} at "
                f"{first.node}: {first.message}: report the versions of torch, onnxscript and onnx"
            )
        files.add(variant, tower, built, VARIANTS[variant].at(rung).name)
