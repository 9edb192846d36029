"""Write a bundle: fold, export, calibrate, search precisions, and only then put it in place."""

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from upperson_calibration.calibration_file import Calibration, Samples, write_calibration
from upperson_calibration.ranges import DEFAULT_ESTIMATOR, Estimator
from upperson_calibration.samples import CalibrationSet
from upperson_export.adapter import AdapterBase
from upperson_export.candidates import (
    CalibrationTask,
    CandidateEmbeddings,
    StageProgress,
    TowerCandidates,
)
from upperson_export.fold import TrainedModel, fold_image_tower, fold_text_tower
from upperson_export.graphs import Fp16Accumulation, require_one_file
from upperson_export.lint import lint
from upperson_export.pages import model_card, report_html
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
from upperson_rt import __version__
from upperson_rt.backends import open_backend
from upperson_rt.bundle import (
    CALIBRATION,
    MANIFEST_FILE,
    Bundle,
    require_replaceable,
    unowned_in_bundle,
)
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.files import new_folder, sha256_of_file
from upperson_rt.manifest import (
    FileEntry,
    ImageSection,
    Manifest,
    TextSection,
    VariantEntry,
    space_fingerprint,
)
from upperson_rt.manifest import ModelSection as ModelIdentity
from upperson_rt.score_calibration import (
    SCORES_FILE,
    ScoreCalibration,
    write_score_calibration,
)
from upperson_rt.towers import TOWERS, Tower, run_tower
from upperson_scores.fitting import (
    FEWEST_PEOPLE,
    LabelledFiles,
    calibrate,
)
from upperson_signature.signature import read_private_key, sign_folder

__all__ = ["ExportOptions", "ModelIdentity", "export_bundle"]

_WORK = ".building"

GOLDEN_SAMPLES = 8

_TOKENIZER, _CANARIES, _REPORT = "tokenizer.json", "canaries.npz", "report.json"

# --- Graphs, manifest, golden samples, report and model card


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
        self._calibration = calibration
        (folder / _TOKENIZER).write_text(tokenizer_json, "utf-8")
        height_px, width_px = model.image_size
        self._image = ImageSection(
            height_px=height_px, width_px=width_px, resize="bilinear-antialias"
        )
        self._text = TextSection(
            context_length=model.text.context_length, tokenizer=self._entry(_TOKENIZER)
        )
        self.fingerprint = space_fingerprint(identity, self._image, self._text)

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

    def write_scores(
        self, people: LabelledFiles, progress: StageProgress
    ) -> ScoreCalibration | None:
        """Fit the score calibration in fp32, through the runtime; write it if it is reliable."""
        encoder = Bundle.open(self._folder, EXACT, "onnxruntime").encoder()
        stage = "calibrating scores"
        try:
            found = calibrate(encoder, people, lambda _, *done: progress(stage, *done))
        except InputError as error:
            if error.code != "calibration_unreliable":
                raise
            return None
        write_score_calibration(self._folder / SCORES_FILE, found)
        return found

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
        scores = self._folder / SCORES_FILE
        for_cpus = [name for name in self.graphs if VARIANTS[name].made_for == "cpu"]
        return Manifest(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            generator=f"upperson {__version__}",
            model=self._identity,
            image=self._image,
            text=self._text,
            variants={
                variant: self._variant(variant, paths, report)
                for variant, paths in self.graphs.items()
            },
            default_variant=for_cpus[0] if for_cpus else EXACT,
            canaries=self._entry(_CANARIES),
            scores=self._entry(SCORES_FILE) if scores.exists() else None,
            fingerprint=self.fingerprint,
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


# --- The export

Accepted = Mapping[Tower, str]
"""The accepted candidate of each tower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """The variants to export and the accuracy that they must keep."""

    variants: tuple[VariantName, ...] = ("int8",)
    """Beside fp32, which is always written."""
    max_r1_drop: float = 0.5
    """Maximum drop of each measure against fp32 in percentage points, where identities are
    known."""
    min_overlap: float = MIN_OVERLAP
    """Minimum overlap with fp32's first ten pictures in percent, where they are not."""
    int8_only: bool = False
    """Refuse float towers in the int8 variants: AccuracyGateError instead."""
    estimator: Estimator | None = None
    """None: that of a calibration that is reused, else `DEFAULT_ESTIMATOR`."""
    sign: Path | None = None
    """Private key (PEM) that signs the bundle."""
    onto: AdapterBase | None = None
    """The base bundle whose frozen weights the towers get, for an adapter file."""
    force: bool = False
    """Replace the bundle of another model, too."""


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
    people: LabelledFiles | None = None,
) -> ExportReport:
    """Export a model in evaluation mode into a bundle and return its report.

    The bundle appears at ``output`` complete or not at all; an older bundle of the same model there
    is replaced, that of another model only with ``options.force``. The first calibration samples
    become the golden samples. Every candidate is measured on the split, through the runtime;
    without one the gate is off, which manifest and report record. What an earlier, reused
    calibration of this model holds is not measured again, and its samples are recorded in place of
    the new ones. Scores are calibrated on ``people``, if there are enough.

    Raises:
        UsageError: A reused calibration has another estimator than the options.
        InputError: NaN weights, a tower of more than 2 GiB, a key that cannot sign, ``output``
            holds the bundle of another model or something that is not a bundle, or a reused
            calibration lacks what is needed and has other samples.
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
        files = BundleFiles(folder, identity, model, tokenizer_json, calibration)
        if not options.force:
            require_replaceable(output, lambda found: found.fingerprint == files.fingerprint)
        task = CalibrationTask(
            samples=calibration, estimator=estimator, reused=reused, progress=progress
        )
        towers = _towers(model, work, task, options.onto)
        if reused is not None:
            reused.for_graphs({tower: sha256_of_file(towers[tower].fp32.file) for tower in TOWERS})
        for tower in TOWERS:
            files.add(EXACT, tower, towers[tower].fp32.file, EXACT)
        files.write_draft()  # The search embeds with its tokenizer and sizes.
        search = _search(folder, towers, split, options, progress)
        accepted: dict[VariantName, Accepted] = {EXACT: dict.fromkeys(TOWERS, EXACT)}
        accumulation: dict[VariantName, dict[Tower, Fp16Accumulation]] = {}
        for variant in options.variants:
            ungated = dict.fromkeys(TOWERS, VARIANTS[variant].ungated_candidate)
            accepted[variant] = ungated if search is None else search.run(variant)
            if _is_own(variant, accepted[variant]):
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
        files.write_draft()  # With golden samples of all variants.
        scores, scores_unreliable = None, False
        if people is not None and len(np.unique(people.people_N)) >= FEWEST_PEOPLE:
            scores = files.write_scores(people, progress)
            scores_unreliable = scores is None
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
                left_out=_left_out(variant, chosen, search),
                size_bytes=files.size_bytes(variant),
                times=stopwatch.measure(files.graphs.get(variant, {}), variant),
            )
        progress("measuring latency", 1, 1)
        size = None
        if split is not None:
            size = SplitSize(
                name=split.name,
                images=len(split.image_files),
                captions=len(split.captions),
                people=None if split.image_pids is None else len(np.unique(split.image_pids)),
                short_queries=0 if split.short is None else len(split.short.texts),
            )
        report = ExportReport(
            model=identity.name,
            split=size,
            max_r1_drop=options.max_r1_drop if split and split.has_identities else None,
            min_overlap=options.min_overlap if split and not split.has_identities else None,
            variants=variants,
            measured=[] if search is None else search.measured,
            conditions=stopwatch.conditions(),
            calibration=record,
            scores=scores,
            scores_unreliable=scores_unreliable,
        )
        files.finish(report)
        for variant in files.graphs:
            Bundle.open(folder, variant, "onnxruntime").check_golden_samples()
        if key is not None:
            sign_folder(folder, key, identity.name)
    return report


def _towers(
    model: TrainedModel, work: Path, task: CalibrationTask, base: AdapterBase | None
) -> dict[Tower, TowerCandidates]:
    plain: dict[Tower, PlainTower] = {
        "image": fold_image_tower(model),
        "text": fold_text_tower(model),
    }
    for tower in TOWERS:
        require_one_file(plain[tower], tower)
        if base is not None:
            base.fold_onto(tower, plain[tower], getattr(model, tower))
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


def _is_own(variant: VariantName, accepted: Accepted) -> bool:
    """Return whether a variant is not just another one under its name."""
    return not set(accepted.values()).isdisjoint(VARIANTS[variant].own_candidates)


def _left_out(
    variant: VariantName, accepted: Accepted, search: PrecisionSearch | None
) -> str | None:
    """Return why a variant is left out, if it is."""
    if search is None or _is_own(variant, accepted):
        return None
    return f"no tower keeps its accuracy in {variant} ({search.refusals(variant)})"


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
