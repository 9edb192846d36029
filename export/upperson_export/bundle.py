"""Write a bundle: fold, export, calibrate, search precisions, and only then put it in place."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir

from upperson_calibration.calibration_file import Calibration, Samples, write_calibration
from upperson_calibration.ranges import DEFAULT_ESTIMATOR, Estimator
from upperson_calibration.samples import CalibrationSet
from upperson_export.bundle_files import CALIBRATION, BundleFiles, ModelIdentity, unowned_in_bundle
from upperson_export.candidates import (
    CalibrationTask,
    CandidateEmbeddings,
    StageProgress,
    TowerCandidates,
)
from upperson_export.fold import TrainedModel, fold_image_tower, fold_text_tower
from upperson_export.graphs import Fp16Accumulation, require_one_file
from upperson_export.lint import lint
from upperson_export.plain import PlainTower
from upperson_export.precision_search import MIN_OVERLAP, PrecisionSearch, RetrievalSplit
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

__all__ = ["ExportOptions", "ModelIdentity", "export_bundle", "unowned_in_bundle"]

_WORK = ".building"

Accepted = Mapping[Tower, str]
"""The accepted candidate of each tower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """The variants to export and the accuracy that they must keep."""

    variants: tuple[VariantName, ...] = ("int8",)
    """Beside fp32, which is always written."""

    max_r1_drop: float = 0.5
    """Maximum R@1 drop against fp32 in percentage points, where identities are known."""

    min_overlap: float = MIN_OVERLAP
    """Minimum overlap with fp32's first ten pictures in percent, where they are not."""

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
        calibration: Sets ranges; its first samples become the golden samples.
        split: Every candidate is measured on it, through the runtime. None switches the gate off,
            which manifest and report record.
        output: Folder to write; an older bundle there is replaced.
        options: What to export.
        progress: Called with (stage, done, total).
        reused: An earlier calibration of this model: what it holds is not measured again, and its
            samples are recorded in place of ``calibration``.

    Raises:
        UsageError: A reused calibration has another estimator than the options.
        InputError: NaN weights, a tower of more than 2 GiB, a key that cannot sign, ``output``
            holds something that is not a bundle, or a reused calibration lacks what is needed and
            has other samples.
        AccuracyGateError: No candidate that is allowed keeps the accuracy.
        IntegrityError: ONNX and torch disagree, a typed graph would be refused by TensorRT, a
            reused calibration is of another model, or a file does not work in the runtime.
    """
    estimator = options.estimator or DEFAULT_ESTIMATOR
    if reused is not None:
        estimator = reused.require_estimator(options.estimator)
    key = None if options.sign is None else read_private_key(options.sign)
    with new_folder(output, unowned_in_bundle) as folder:
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
        files.write_draft()  # The search embeds with its tokenizer and sizes.
        search = _search(folder, towers, split, options, progress)
        accepted: dict[VariantName, Accepted] = {EXACT: dict.fromkeys(TOWERS, EXACT)}
        accumulation: dict[VariantName, dict[Tower, Fp16Accumulation]] = {}
        for variant in options.variants:
            ungated = dict.fromkeys(TOWERS, VARIANTS[variant].ungated_candidate)
            accepted[variant] = ungated if search is None else search.run(variant)
            if _left_out(variant, accepted[variant]) is None:
                accumulation[variant] = {
                    tower: found
                    for tower, candidate in accepted[variant].items()
                    if (found := towers[tower].make_overflow_safe(variant, candidate)) is not None
                }
                _add(files, towers, variant, accepted[variant])
        record = _write_calibration(folder, towers, task) if options.variants else None
        kept_float = {
            variant: {tower: towers[tower].kept_float(chosen[tower]) for tower in TOWERS}
            for variant, chosen in accepted.items()
        }
        shutil.rmtree(work)
        files.write_golden_samples()
        progress("measuring latency", 0, 1)
        stopwatch = Stopwatch(calibration)
        variants = {}
        for variant, chosen in accepted.items():
            measured = {} if search is None else search.accuracy(variant, chosen)
            variants[variant] = VariantReport(
                candidates=chosen,
                accuracy=measured.pop(VARIANTS[variant].measured_on, None),
                elsewhere=measured,
                kept_float=kept_float[variant],
                fp16_accumulation=accumulation.get(variant, {}),
                left_out=_left_out(variant, chosen),
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
            measured=[] if search is None else search.measured,
            conditions=stopwatch.conditions(),
            calibration=record,
        )
        files.finish(report)
        for variant in files.graphs:
            Bundle.open(folder, variant, "onnxruntime").check_golden_samples()
        if key is not None:
            sign_folder(folder, key, identity.name)
    return report


def _towers(model: TrainedModel, work: Path, task: CalibrationTask) -> dict[Tower, TowerCandidates]:
    plain: dict[Tower, PlainTower] = {
        "image": fold_image_tower(model),
        "text": fold_text_tower(model),
    }
    for tower in TOWERS:
        require_one_file(plain[tower], tower)
    towers = {tower: TowerCandidates(tower, plain[tower], work, task) for tower in TOWERS}
    towers["image"].calibrator.set_other(towers["text"].calibrator)
    towers["text"].calibrator.set_other(towers["image"].calibrator)
    return towers


def _search(
    folder: Path,
    towers: Mapping[Tower, TowerCandidates],
    split: RetrievalSplit | None,
    options: ExportOptions,
    progress: StageProgress,
) -> PrecisionSearch | None:
    if split is None:
        return None
    return PrecisionSearch(
        split=split,
        source=CandidateEmbeddings(folder, towers, split, progress),
        max_r1_drop=options.max_r1_drop,
        min_overlap=options.min_overlap,
        int8_only=options.int8_only,
        also_on=("openvino",) if find_spec("openvino") is not None else (),
    )


def _write_calibration(
    folder: Path, towers: Mapping[Tower, TowerCandidates], task: CalibrationTask
) -> CalibrationRecord:
    """Write the calibration file; return its record for report and manifest."""
    reused = task.reused
    samples = Samples.of(task.samples) if reused is None else reused.samples
    found = {str(tower): candidates.calibrator.found() for tower, candidates in towers.items()}
    write_calibration(
        folder / CALIBRATION, Calibration(samples=samples, estimator=task.estimator, towers=found)
    )
    return CalibrationRecord(
        samples=samples,
        estimator=task.estimator,
        reused_file_sha256=None if reused is None else reused.sha256,
    )


def _left_out(variant: VariantName, accepted: Accepted) -> str | None:
    """Return why a variant is left out, if it would be another one under its name."""
    if set(accepted.values()) & set(VARIANTS[variant].own_candidates):
        return None
    return f"no tower keeps its accuracy in {variant}"


def _add(
    files: BundleFiles,
    towers: Mapping[Tower, TowerCandidates],
    variant: VariantName,
    accepted: Accepted,
) -> None:
    """Build and place the graphs of a variant."""
    for tower, candidate in accepted.items():
        built = towers[tower].build(variant, candidate)
        if findings := lint(ir.load(built)):
            first = findings[0]
            raise IntegrityError(
                f"{built.name} has {len(findings)} problems for TensorRT, first {first.rule} at "
                f"{first.node}: {first.message}: report the versions of torch, onnxscript and onnx"
            )
        files.add(variant, tower, built, VARIANTS[variant].variant_of(candidate).name)
