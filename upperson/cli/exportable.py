"""Inputs of an export: a run or a base, a split to measure on and samples that set ranges."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from upperson.config import settings_from
from upperson.data.images import truncated_images
from upperson.data.records import Record, Split, read_dataset
from upperson.evaluate import pids_of
from upperson.model.base import load_base
from upperson.model.configs import base_config
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson.questions import (
    NOTHING,
    PARTS,
    SHORT_FORMS,
    attribute_columns,
    has_all,
    short_questions,
)
from upperson.run import ADAPTER, CONFIG, Run, load_run
from upperson_adapter.apply import apply_adapter
from upperson_adapter.package import AdapterFile
from upperson_calibration.calibration_file import Calibration, read_calibration
from upperson_calibration.samples import CalibrationSet, Captions, Pictures, choose_samples
from upperson_export.adapter import AdapterBase, round_trained, write_adapter
from upperson_export.bundle import ExportOptions, ModelIdentity, export_bundle
from upperson_export.candidates import StageProgress
from upperson_export.precision_search import RetrievalSplit, ShortQueries
from upperson_export.report import ExportReport
from upperson_phrases import parse_query
from upperson_rt.errors import InputError
from upperson_rt.files import put_in_place, scratch_folder, sha256_of_file
from upperson_rt.manifest import NO_ADAPTER
from upperson_rt.preprocess import iter_image_files
from upperson_rt.tokenizer import Tokenizer
from upperson_scores.fitting import LabelledFiles
from upperson_scores.labelled_queries import TRAITS
from upperson_scores.rankings import TOP_K
from upperson_synthetic import LOOKS, SyntheticSpec, describe, write_dataset
from upperson_synthetic.people import sample_people

_CHOOSING = "choosing calibration images"
_RENDERED_VIEWS = 2
_RENDERED_FOR_CAPTIONS = 128
"""Pictures rendered where only their captions are wanted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportData:
    """The data that an export measures accuracy on, and calibrates with."""

    root: Path | None = None
    """Folder of the data set; None: that of the run. For a base, rankings are compared then."""
    dataset: str = "jsonl"
    """Format of a base's data set; a run has its own."""
    gate: bool = True
    """Whether accuracy is measured."""
    calib_size: int
    """Pictures, and captions, that set ranges."""
    calib_data: Path | None = None
    """Folder of pictures that set ranges instead of the training split's. For a base without
    ``root``, others of them are ranked."""
    calibration: Path | None = None
    """Calibration file of an earlier export to take over."""


def export_run(
    run: Path, output: Path, options: ExportOptions, data: ExportData, progress: StageProgress
) -> ExportReport:
    """Load a run and its data set, export it, and return the report."""
    reused = calibration_to_reuse(data, options)
    progress("loading the run", 0, 1)
    loaded = load_run(run)
    progress("loading the run", 1, 1)
    return _export_loaded(run, loaded, output, options, data, progress, reused)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterOptions:
    """The adapter file of a run."""

    base: Path
    """The base bundle that the adapter belongs to."""
    site: str
    """Name of the site, for people; it becomes the model's name."""
    dtype: str = "float16"
    """Type of the trained tensors: float16 or float32."""


def export_adapter(
    run: Path,
    output: Path,
    adapter: AdapterOptions,
    options: ExportOptions,
    data: ExportData,
    progress: StageProgress,
) -> ExportReport:
    """Export a run onto a base bundle, and write what a box needs to make the same bundle.

    The file is written after a bundle was made from it that equals the exported one.

    Raises:
        InputError: There is another file at ``output``, or as for `export_bundle`.
        UsageError: ``adapter.base`` has an adapter already.
        IntegrityError: The run was trained over another base, or as for `export_bundle`.
    """
    if output.exists():
        AdapterFile(output).close()
    reused = calibration_to_reuse(data, options)
    onto = AdapterBase.open(adapter.base)
    progress("loading the run", 0, 1)
    loaded = load_run(run)
    round_trained(loaded.model, adapter.dtype)
    progress("loading the run", 1, 1)
    with scratch_folder(output) as scratch:
        bundle, packed = scratch / "bundle", scratch / output.name
        report = _export_loaded(
            run, loaded, bundle, replace(options, onto=onto), data, progress, reused, adapter.site
        )
        write_adapter(bundle, onto, loaded.model, adapter.dtype, packed)
        apply_adapter(packed, adapter.base, scratch / "applied", progress=progress)
        put_in_place(packed, output)
    return report


def _export_loaded(
    run: Path,
    loaded: Run,
    output: Path,
    options: ExportOptions,
    data: ExportData,
    progress: StageProgress,
    reused: Calibration | None,
    site: str | None = None,
) -> ExportReport:
    config, base, model = loaded
    student = config.student
    root = data.root or Path(config.root)
    with truncated_images(config.load_truncated):
        split, train, people = None, None, None
        if data.gate:
            with settings_from(run / CONFIG):
                split, splits = measured_split(config.dataset, root)
            train, people = splits["train"], labelled_files(splits, root)
        samples = calibration_samples(
            train,
            f"{root.resolve().name}, train",
            base.tokenizer(),
            folder=data.calib_data,
            height_px=config.height_px,
            width_px=config.width_px,
            count=data.calib_size,
            seed=config.seed,
            progress=partial(progress, _CHOOSING),
        )
        name = f"up-person-{base.name.removeprefix('upperson-')}"
        name += "" if student is None else f"-{student.size}"
        identity = ModelIdentity(
            name=name if site is None else site,
            base=base.name,
            base_sha256=base.sha256,
            adapter_sha256=sha256_of_file(run / ADAPTER),
            embed_dim=model.embed_dim,
            distilled_from=None if student is None else student.space,
        )
        return export_bundle(
            model,
            identity,
            base.tokenizer_json,
            samples,
            split,
            output,
            options,
            progress,
            reused,
            people,
        )


def calibration_to_reuse(data: ExportData, options: ExportOptions) -> Calibration | None:
    """Read a calibration to take over; raise now, before any work, what would be raised later."""
    if data.calib_data is not None:
        next(iter_image_files([data.calib_data]))
    if data.calibration is None:
        return None
    reused = read_calibration(data.calibration)
    reused.require_estimator(options.estimator)
    return reused


def measured_split(dataset: str, root: Path) -> tuple[RetrievalSplit, dict[Split, list[Record]]]:
    """Return what accuracy is measured on, test or else val, and all splits."""
    splits = read_dataset(dataset, root)
    name: Split = "test" if splits["test"] else "val"
    if not splits[name]:
        raise InputError(
            f"{root} has neither test nor val images: accuracy cannot be measured; pass "
            "another --root, or --no-gate to export without"
        )
    if len({record.pid for record in splits[name]}) < 2:
        raise InputError(
            f"{root} shows one person in its {name} split: every ranking would be "
            "right; pass another --root, or --no-gate to export without",
            code="split_of_one_person",
            path=root,
            split=name,
        )
    return retrieval_split(splits[name], f"{root.resolve().name}, {name}"), splits


def labelled_files(splits: Mapping[Split, Sequence[Record]], root: Path) -> LabelledFiles | None:
    """Return what scores are calibrated on, the split val; None if it is empty."""
    records = splits["val"]
    if not records:
        return None
    traits = None
    if all(set(TRAITS) <= (record.attributes or {}).keys() for record in records):
        columns = attribute_columns(records, TRAITS)
        traits = {name: np.where(values == NOTHING, "", values) for name, values in columns.items()}
    return LabelledFiles(
        source=f"{root.resolve().name}, val",
        files=[record.image for record in records],
        people_N=pids_of(records)[1],
        cameras_N=np.array([record.camera or "" for record in records], np.str_),
        captions=[record.captions for record in records],
        traits=traits,
    )


def retrieval_split(records: Sequence[Record], name: str) -> RetrievalSplit:
    """Flatten records: every caption queries all images, and so does every short query."""
    caption_pids, image_pids = pids_of(records)
    return RetrievalSplit(
        name=name,
        image_files=[record.image for record in records],
        image_pids=image_pids,
        captions=[caption for record in records for caption in record.captions],
        caption_pids=caption_pids,
        short=_short_queries(records),
    )


def _short_queries(records: Sequence[Record]) -> ShortQueries | None:
    """Return *woman in red coat* for all such people, if every record has these attributes."""
    if not all(PARTS.keys() <= (record.attributes or {}).keys() for record in records):
        return None
    columns = attribute_columns(records, PARTS)
    satisfied_G = np.full(len(records), -1)
    texts: list[str] = []
    for question in short_questions(columns, SHORT_FORMS["person"]):
        right_G = has_all(columns, question.wanted)
        if right_G.any():
            satisfied_G[right_G] = len(texts)
            texts.append(parse_query(question.text).wanted)
    return ShortQueries(texts, satisfied_G) if texts else None


def calibration_samples(
    train: Sequence[Record] | None,
    source: str,
    tokenizer: Tokenizer,
    *,
    folder: Path | None = None,
    count: int,
    **options: Any,
) -> CalibrationSet:
    """Choose pictures and captions of a training split, or of rendered people if it is None.

    ``source`` is what reports call the split. Pictures of a folder replace the split's, not the
    captions. For ``options`` see `choose_samples`.
    """
    with tempfile.TemporaryDirectory() as rendered:
        if train is None:
            source = "synthetic renderer"
            train = render_people(
                Path(rendered) / "people",
                count if folder is None else min(count, _RENDERED_FOR_CAPTIONS),
            )
        if folder is None:
            pictures = Pictures(
                files=[record.image for record in train],
                source=source,
                cameras=[record.camera for record in train],
            )
        else:
            pictures = Pictures(
                files=list(iter_image_files([folder])), source=f"folder {folder.resolve().name}"
            )
        texts = [caption for record in train for caption in record.captions]
        captions = Captions(texts=texts, source=source)
        return choose_samples(pictures, captions, tokenizer, count=count, **options)


def render_people(folder: Path, count: int) -> list[Record]:
    """Render at least ``count`` pictures of people with captions into a folder."""
    people = -(-count // _RENDERED_VIEWS)
    spec = SyntheticSpec(
        look="street", train_ids=people, val_ids=0, test_ids=0, views=_RENDERED_VIEWS
    )
    return read_dataset("jsonl", write_dataset(folder, spec))["train"]


# --- A base without a run: a plain CLIP that finds people zero-shot
#
# Without captions of people its accuracy cannot be measured. What the export changes can be:
# sentences of the exporter rank the pictures in float32 and in each variant, and the rankings are
# compared.

_MAX_RANKED = 500
"""Pictures that sentences rank, and sentences that rank them."""

_RENDERED_TO_RANK = 200

_SEED = 1


def export_base(
    name: str,
    pretrained: str | None,
    image_size: tuple[int | None, int | None],
    output: Path,
    options: ExportOptions,
    data: ExportData,
    progress: StageProgress,
) -> ExportReport:
    """Export a base as it was published, and return the report.

    ``image_size`` is height and width of the crops in pixels; None: see `BaseConfig.crop_size`.
    """
    reused = calibration_to_reuse(data, options)
    progress("loading the base", 0, 1)
    own = base_config(name).crop_size
    height_px, width_px = (given or usual for given, usual in zip(image_size, own, strict=True))
    base = load_base(name, pretrained, (height_px, width_px))
    model = UPPerson(base.clip, PLAIN_CLIP, (height_px, width_px), base.statistics).eval()
    progress("loading the base", 1, 1)
    with tempfile.TemporaryDirectory() as rendered:
        split, samples, people = _split_and_samples(
            data,
            Path(rendered),
            base.tokenizer(),
            height_px=height_px,
            width_px=width_px,
            count=data.calib_size,
            seed=_SEED,
            progress=partial(progress, _CHOOSING),
        )
        identity = ModelIdentity(
            name=base.name,
            base=base.name,
            base_sha256=base.sha256,
            adapter_sha256=NO_ADAPTER,
            embed_dim=model.embed_dim,
        )
        return export_bundle(
            model,
            identity,
            base.tokenizer_json,
            samples,
            split,
            output,
            options,
            progress,
            reused,
            people,
        )


def _split_and_samples(
    data: ExportData, folder: Path, tokenizer: Tokenizer, **options: Any
) -> tuple[RetrievalSplit | None, CalibrationSet, LabelledFiles | None]:
    """Return what a base is measured on, and calibrated with; pictures are rendered if needed."""
    if data.gate and data.root is not None:
        split, splits = measured_split(data.dataset, data.root)
        source = f"{data.root.resolve().name}, train"
        samples = calibration_samples(
            splits["train"], source, tokenizer, folder=data.calib_data, **options
        )
        return split, samples, labelled_files(splits, data.root)
    if data.calib_data is None:
        count = data.calib_size + (_RENDERED_TO_RANK if data.gate else 0)
        files = [person.image for person in render_people(folder / "people", count)]
        source = "synthetic renderer"
    else:
        files = list(iter_image_files([data.calib_data]))
        source = f"folder {data.calib_data.resolve().name}"
    ranked = None
    if data.gate:
        ranked, files = _share_out(files, source)
    captions = Captions(
        texts=_sentences(data.calib_size, seed=_SEED), source="sentences of the exporter"
    )
    samples = choose_samples(Pictures(files=files, source=source), captions, tokenizer, **options)
    return ranked, samples, None


def _share_out(files: Sequence[Path], source: str) -> tuple[RetrievalSplit, list[Path]]:
    """Split pictures into those that are ranked, every other one up to a limit, and the rest."""
    every_other = files[1::2]
    places = np.linspace(0, len(every_other) - 1, min(len(every_other), _MAX_RANKED))
    ranked = [every_other[place] for place in places.astype(int)]
    if len(ranked) < 2 * TOP_K:
        raise InputError(
            f"rankings need {4 * TOP_K} pictures, half of which set ranges, found {len(files)} in "
            f"{source}: name a folder with more, or export with --no-gate",
            code="too_few_to_rank",
            expected=4 * TOP_K,
            found=len(files),
        )
    split = RetrievalSplit(
        name=source, image_files=ranked, captions=_sentences(_MAX_RANKED, seed=_SEED + 1)
    )
    taken = set(ranked)
    return split, [file for file in files if file not in taken]


def _sentences(count: int, seed: int) -> list[str]:
    """Describe people who are on none of the pictures, as witnesses of street cameras do."""
    rng = np.random.default_rng(seed)
    return [describe(person, LOOKS["street"], rng) for person in sample_people(count, rng)]
