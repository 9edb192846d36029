"""``upperson evaluate``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson.cli.options import DATASET_HELP, require_extra, require_no_trust
from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.options import Output, TrustOption
from upperson_rt.cli.output import (
    PlainTable,
    backend_line,
    new_table,
    print_json,
    print_line,
    print_table,
)
from upperson_rt.errors import InputError, UsageError

if TYPE_CHECKING:
    from upperson.attributes import AttributeReport, Share
    from upperson.cli.progress import Display
    from upperson.data.records import Record
    from upperson.evaluate import Embeddings, Evaluation, LengthResult
    from upperson_phrases.evidence import EmbedTexts
    from upperson_rt.bundle import Bundle
    from upperson_rt.manifest import Manifest


@dataclass(frozen=True)
class Data(OptionGroup, panel="Data"):
    """The split that is measured on."""

    root: Path | None = option(
        None, "Folder of the data set; a bundle needs it.", show_default="the run's own"
    )
    dataset: str | None = option(None, DATASET_HELP, show_default="the run's own; jsonl")
    split: str = option("test", "train, val or test.")


@dataclass(frozen=True)
class Measurement(OptionGroup, panel="Measurement"):
    """What is measured, and on which device."""

    attributes: bool = option(
        False,
        "Which attributes are recognised, if the annotations have any: short questions, "
        "bags and hats, negations, swapped colours.",
    )
    by_length: bool = option(
        False, "Short and long questions: captions cut to their first thing, to two, and so on."
    )
    device: str = option("auto", "auto, cpu or cuda; a bundle's backend chooses for itself.")
    trust: TrustOption = None


@grouped
def evaluate(
    target: Annotated[
        Path, typer.Argument(help="Run folder or bundle.", metavar="RUN|BUNDLE", show_default=False)
    ],
    data: Data,
    measurement: Measurement,
    output: Output,
) -> None:
    """Measure retrieval of a run, or of every variant of a bundle, in both directions.

    From text to image every caption queries all images; from image to text every image queries all
    captions. A hit is right if it shows or describes the same person. With --attributes, it is
    right if the person has what the sentence says.

    Example: `upperson evaluate bundle --root people --split test`
    """
    require_extra("train", "evaluation")
    from upperson.attributes import measure_attributes
    from upperson.cli.progress import Display
    from upperson.config import settings_from
    from upperson.data.records import SPLITS
    from upperson.evaluate import both_directions, measure_by_length, read_split
    from upperson.questions import attribute_columns
    from upperson.run import CONFIG
    from upperson_rt.bundle import MANIFEST_FILE, read_manifest

    split, trust = data.split, measurement.trust
    attributes, by_length, as_json = measurement.attributes, measurement.by_length, output.as_json
    if split not in SPLITS:
        raise UsageError(
            f"--split must be one of {', '.join(SPLITS)}, found '{split}'",
            code="split_unknown",
            split=split,
        )
    if attributes and by_length:
        raise UsageError(
            "--attributes and --by-length are two measurements: choose one of them",
            code="options_exclude_each_other",
        )
    is_bundle = (target / MANIFEST_FILE).is_file()
    from_run = data.dataset is None and (target / CONFIG).is_file()
    dataset, root = _data_of(target, data.dataset, data.root)
    manifest = None
    if is_bundle:
        manifest = read_manifest(target, trust)  # Refuses what is not trusted before data are read.
    else:
        require_no_trust(trust, target)
    with settings_from(target / CONFIG) if from_run else nullcontext():
        records = read_split(dataset, root, split)
    if attributes:
        attribute_columns(records)  # Refuses what has none before anything is embedded.
    found: dict[str, Evaluation] = {}
    reports: dict[str, AttributeReport] = {}
    lengths: dict[str, dict[str, LengthResult]] = {}
    with Display() as display:
        if manifest is not None:
            towers = _bundle_towers(target, manifest, trust, records, display)
        else:
            towers = _run_towers(target, measurement.device, records, display)
        for name, (text_QE, image_GE), embed_texts in towers:
            if by_length:
                lengths[name] = measure_by_length(records, image_GE, embed_texts)
            elif attributes:
                reports[name] = measure_attributes(records, text_QE, image_GE, embed_texts)
            else:
                found[name] = both_directions(text_QE, image_GE, records)
    if as_json and by_length:
        print_json({name: _json_from_lengths(rows) for name, rows in lengths.items()})
        return
    if as_json:
        print_json({name: result.as_dict() for name, result in (found | reports).items()})
        return
    captions = sum(len(record.captions) for record in records)
    print_line(f"{dataset} in {root.name}, {split}: {captions} captions, {len(records)} images")
    if found:
        print_table(_table(found))
    for name, rows in lengths.items():
        _print_lengths(name, rows)
    for name, report in reports.items():
        _print_attributes(name, report)


def _bundle_towers(
    target: Path,
    manifest: "Manifest",
    trust: Path | None,
    records: "Sequence[Record]",
    display: "Display",
) -> "Iterator[tuple[str, Embeddings, EmbedTexts]]":
    """Embed a split with every variant of a bundle, one after the other."""
    from upperson_export.variants import is_half
    from upperson_rt.bundle import Bundle

    images = [record.image for record in records]
    captions = [caption for record in records for caption in record.captions]
    for variant, entry in manifest.variants.items():
        bundle = Bundle.open(target, variant, trust=trust)
        encoder = bundle.encoder()
        for line in _backend_lines(bundle):
            display.say(f"{variant}{line}")
        image_GE = encoder.encode_images(images, progress=partial(display.update, variant))
        yield variant, (encoder.encode_texts(captions), image_GE), encoder.encode_texts
        if is_half(entry.precision) and bundle.backend("image").device == "cpu":
            display.say(
                f"{variant}: floats computed in {_float_types(bundle)} here: no backend has "
                "float16 kernels for CPUs; the report of the export has it with float16's range "
                "and rounding"
            )


def _run_towers(
    target: Path, device: str, records: "Sequence[Record]", display: "Display"
) -> "Iterator[tuple[str, Embeddings, EmbedTexts]]":
    """Embed a split with a run."""
    from upperson.components import choose_device
    from upperson.data.images import truncated_images
    from upperson.evaluate import embed_records, embed_texts
    from upperson.run import load_run

    config, base, model = load_run(target)
    model = model.to(choose_device(device))
    tokenizer = base.tokenizer()
    progress = partial(display.update, "encoding")
    with truncated_images(config.load_truncated):
        embeds = embed_records(model, tokenizer, records, progress=progress)
    yield "run", embeds, partial(embed_texts, model, tokenizer)


def _backend_lines(bundle: "Bundle") -> list[str]:
    """Return what runs the towers: one line, or one a tower where they do not run alike."""
    image, text = backend_line(bundle, "image"), backend_line(bundle, "text")
    if image == text:
        return [f": {image}"]
    return [f", image tower: {image}", f", text tower: {text}"]


def _float_types(bundle: "Bundle") -> str:
    from upperson_export.graphs import float_type_of
    from upperson_rt.towers import TOWERS

    image, text = (float_type_of(bundle.backend(tower)) for tower in TOWERS)
    return image if image == text else f"{image} (images) and {text} (texts)"


def _data_of(target: Path, dataset: str | None, root: Path | None) -> tuple[str, Path]:
    """Fill in what was left out from the configuration of a run."""
    from upperson.config import read_config
    from upperson.run import CONFIG
    from upperson_rt.bundle import MANIFEST_FILE

    if (target / CONFIG).is_file():
        config = read_config(target / CONFIG)
        return dataset or config.dataset, root or Path(config.root)
    if not (target / MANIFEST_FILE).is_file():
        runs = sorted(path.parent.name for path in target.glob(f"*/{CONFIG}"))
        holds = ": pass a folder that  upperson train  or  upperson export  made"
        if runs:
            holds = f", but it holds {', '.join(runs)}: name one of them"
        elif not target.exists():
            holds = f" (there is no such folder){holds}"
        raise InputError(
            f"{target} is neither a run nor a bundle{holds}",
            code="neither_run_nor_bundle",
            path=target,
            runs=runs,
        )
    if root is None:
        raise UsageError("--root is missing: pass the folder of the data set", code="root_missing")
    return dataset or "jsonl", root


def _table(found: "dict[str, Evaluation]") -> PlainTable:
    names = tuple(next(iter(found.values())).text_to_image.as_dict())
    table = new_table("", "direction", *names, right=names)
    for name, evaluation in found.items():
        directions = evaluation.as_dict().items()
        for row, (direction, metrics) in enumerate(directions):
            table.add_row(
                "" if row else name,
                direction.replace("_to_", " -> "),
                *(f"{value:.2f}" for value in metrics.values()),
            )
    return table


def _json_from_lengths(rows: "Mapping[str, LengthResult]") -> dict[str, dict[str, float]]:
    return {
        length: {"questions": found.questions, **found.metrics.as_dict()}
        for length, found in rows.items()
    }


def _print_lengths(name: str, rows: "Mapping[str, LengthResult]") -> None:
    """Print text to image retrieval by the number of things in a question."""
    names = ("questions", *next(iter(rows.values())).metrics.as_dict())
    table = new_table(f"{name}: things", *names, right=names)
    for length, found in rows.items():
        values = [f"{value:.2f}" for value in found.metrics.as_dict().values()]
        table.add_row(length, str(found.questions), *values)
    print_table(table)


def _print_attributes(name: str, report: "AttributeReport") -> None:
    """Print which words one model understands, in percent."""

    def print_below(table: PlainTable) -> None:
        print_line("")
        print_table(table)

    numbers = ("first", "of ten", "at most", "chance")
    table = new_table(name, *numbers, right=numbers)
    for short in report.short.values():
        table.add_row(f'"{short.example}" ({short.present} of {short.asked} have a right picture)')
        _add_shares(table, short.parts)
    for title, things in (
        ('"a person with a ...": has it', report.with_thing),
        ('"a person without a ...": has it all the same', report.without_thing),
        ('"a person in a ... without a ...": has it all the same', report.clothed_without),
    ):
        if things:
            table.add_row(title)
        for attribute, shares in things.items():
            named = {f"{attribute}: {value}": share for value, share in shares.items()}
            _add_shares(table, named, wanted=things is report.with_thing)
    if report.clothed:
        table.add_row("the same questions, and without the excluded phrase")
        _add_shares(table, report.clothed)
    print_below(table)
    ranked = ("mAP", "chance", "AUROC")
    table = new_table("short questions", *ranked, right=ranked)
    for short in report.short.values():
        known = "" if short.presence_auroc is None else f"{short.presence_auroc:.1f}"
        table.add_row(f'  "{short.example}"', f"{short.map:.1f}", f"{short.map_chance:.1f}", known)
    print_below(table)
    weighed = ("phrases", "AUROC", "lowest")
    table = new_table("evidence of a phrase", *weighed, right=weighed)
    for truth in report.evidence.values():
        figures = (f"{truth.auroc:.1f}", f"{truth.least:.1f}")
        table.add_row(f'  such as "{truth.example}"', str(truth.phrases), *figures)
    print_below(table)
    shared = ("first", "chance", "R@1 lost", "said by", "if said", "chance if said")
    table = new_table("captions", *shared, right=shared)
    for attribute, share in report.captions.items():
        cells = [f"{value:.1f}" for value in (share.top1, share.chance, share.r1_lost)]
        if share.said_top1 is None or share.said_chance is None:
            said = ["", "", ""]
        else:
            said = [str(share.said), f"{share.said_top1:.1f}", f"{share.said_chance:.1f}"]
        table.add_row(f"  {attribute}", *cells, *said)
    print_below(table)
    print_line("", f"R@1 of the captions {report.r1:.2f}")
    if report.swapped is not None:
        print_line(
            f"true colours above exchanged ones {report.swapped.right:.1f} (chance 50.0), "
            f"{report.swapped.pictures} pictures"
        )
    print_line(
        "all in percent; docs/reference/training.md, Which words are understood, explains each row"
    )


def _add_shares(table: PlainTable, shares: "Mapping[str, Share]", *, wanted: bool = True) -> None:
    """Add a row for each; what is not wanted has no best to be compared with."""
    for name, share in shares.items():
        most = f"{share.at10_most:.1f}" if wanted else ""
        table.add_row(
            f"  {name}", f"{share.top1:.1f}", f"{share.at10:.1f}", most, f"{share.chance:.1f}"
        )
