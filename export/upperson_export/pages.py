"""The bundle's report for people: tables, a self-contained HTML page, and the model card."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from upperson_export.made_files import templates
from upperson_export.precision_search import MEASURES, SHORT_MEASURES, Accuracy, Compared, Measured
from upperson_export.report import CalibrationRecord, ExportReport
from upperson_export.variants import SIMULATED, VARIANTS
from upperson_rt.manifest import NO_ADAPTER, Manifest
from upperson_rt.printable import code_span
from upperson_rt.towers import TOWERS
from upperson_scores.fitting import FEWEST_PEOPLE

_METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")

Quote = Callable[[str], str]
"""Marks a name that comes from outside, such as a folder's."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """A heading and rows of text."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]

    @property
    def numbers(self) -> set[int]:
        """Columns of numbers, or dashes in their place."""
        return {
            place
            for place, cells in enumerate(zip(*self.body, strict=True))
            if all(cell[:1] in "+-0123456789" for cell in cells)
        }

    def filled(self) -> "TextTable":
        """Return the table without columns that are all dashes."""
        shown = [
            place for place, cells in enumerate(zip(*self.body, strict=True)) if set(cells) != {"-"}
        ]
        return TextTable(
            [self.head[place] for place in shown],
            [[row[place] for place in shown] for row in self.body],
        )


def report_html(report: ExportReport, manifest: Manifest) -> str:
    """Render the tables and the facts of the bundle as one HTML file."""
    page = templates().get_template("report.html.j2")
    return page.render(
        report=report,
        measured_on=_measured_on(report, str),
        accuracy=accuracy_table(report).filled(),
        changes=change_table(report).filled(),
        notes=_notes(report, str),
        candidates=candidate_table(report).filled(),
        linears=float_linear_table(report),
        facts=_facts(report, manifest, str),
    )


def model_card(report: ExportReport, manifest: Manifest) -> str:
    """Render the bundle's README.md."""
    card = templates().get_template("model_card.md.j2")
    return card.render(
        report=report,
        manifest=manifest,
        has_adapter=manifest.model.adapter_sha256 != NO_ADAPTER,
        measured_on=_measured_on(report, code_span),
        accuracy=accuracy_table(report).filled(),
        changes=change_table(report).filled(),
        notes=_notes(report, code_span),
        facts=_facts(report, manifest, code_span),
    )


def accuracy_table(report: ExportReport) -> TextTable:
    """Return one row a variant and backend: accuracy, candidates, size, time."""
    by_rankings = report.min_overlap is not None
    measures = ["top-10 overlap %"]
    if not by_rankings:
        measures = [f"{name} %" for name in (*_METRICS, *SHORT_MEASURES)]
    sizes = ["image", "text", "MiB", "ms/image", "ms/caption", "shipped"]
    head = ["variant", "on", *measures, *sizes]
    body = []
    for name, row in report.variants.items():
        measured = row.measured(VARIANTS[name].measured_on)
        for backend in dict.fromkeys([*measured, *row.times]):
            found, times = measured.get(backend), row.times.get(backend, {})
            types = found.float_types if found else {t: times[t].float_type for t in times}
            body.append(
                [
                    name,
                    _place(backend, types.values()),
                    *([_overlap(found)] if by_rankings else _metrics(found)),
                    *(row.candidates[tower] for tower in TOWERS),
                    f"{row.size_bytes / 2**20:.1f}" if row.shipped else "-",
                    *(f"{times[tower].ms_per_item:.1f}" if times else "-" for tower in TOWERS),
                    "yes" if row.shipped else "no",
                ]
            )
    return TextTable(head, body)


def change_table(report: ExportReport) -> TextTable:
    """Return one row a variant and backend: changes against float32 in points, with intervals."""
    body = [
        [name, _place(backend, found.float_types.values()), *_changes(found)]
        for name, row in report.variants.items()
        for backend, found in row.measured(VARIANTS[name].measured_on).items()
        if isinstance(found, Compared) and found.drops
    ]
    return TextTable(["variant", "on", *(f"{name} change (95 %)" for name in MEASURES)], body)


def candidate_table(report: ExportReport) -> TextTable:
    """Return one row for every candidate that was measured, in order."""
    head = [
        "variant", "towers", "candidate", "on", *(f"{name} change (95 %)" for name in MEASURES),
        "cosine min / 1 % / median", "top-10 overlap %", "accepted",
    ]  # fmt: skip
    return TextTable(head, [_measured(row) for row in report.measured])


def float_linear_table(report: ExportReport) -> TextTable:
    """Return one row for every Linear that an int8 variant leaves in float."""
    head = ["variant", "tower", "Linear", "order changed %", "top 10 changed %", "cosine lost"]
    body = [
        [
            variant,
            tower,
            layer.node,
            f"{layer.order_loss:.2f}",
            f"{layer.overlap_loss:.2f}",
            f"{layer.cosine_loss:.1e}",
        ]
        for variant, row in report.variants.items()
        for tower, layers in row.kept_float.items()
        for layer in layers
    ]
    return TextTable(head, body)


def _measured(row: Measured) -> list[str]:
    found = row.accuracy
    types = found.float_types.values() if found else ()
    return [
        row.variant,
        row.tower,
        row.candidate,
        _place(row.backend, types),
        *_changes(found),
        " / ".join(f"{value:.4f}" for value in found.cosine.values()) if found else "-",
        _overlap(found),
        f"no: {row.failure}" if row.failure else "yes" if row.accepted else "no",
    ]


def _place(backend: str, float_types: Iterable[str]) -> str:
    """Name a backend and the types that it computes floats in."""
    known = [] if backend == SIMULATED else list(dict.fromkeys(float_types))
    return ", ".join([backend, *([" + ".join(known)] if known else [])])


def _overlap(found: Accuracy | None) -> str:
    return f"{found.top10_overlap:.1f}" if isinstance(found, Compared) else "-"


def _metrics(found: Accuracy | None) -> list[str]:
    values = dict.fromkeys((*_METRICS, *SHORT_MEASURES), "-")
    for prefix, metrics in (("", found and found.metrics), ("short ", found and found.short)):
        if metrics:
            percent = {f"{prefix}{name}": f"{one:.2f}" for name, one in metrics.as_dict().items()}
            values |= {name: percent[name] for name in percent.keys() & values.keys()}
    return list(values.values())


def _changes(found: Accuracy | None) -> list[str]:
    drops = found.drops if isinstance(found, Compared) else {}
    # Subtracted from 0, so that no change has no sign of its own.
    return [
        f"{0 - lost.points:+.2f} ({0 - lost.high:+.2f} to {0 - lost.low:+.2f})" if lost else "-"
        for lost in map(drops.get, MEASURES)
    ]


def interval_note(report: ExportReport) -> str | None:
    """Return what intervals resample, if there are any."""
    if report.split is None or report.split.people is None:
        return None
    return (
        f"Changes are points against fp32. The paired bootstrap resamples {report.split.people} "
        "people, each with all their captions"
        + (
            f", and {report.split.short_queries} short queries, each with all their people."
            if report.split.short_queries
            else "."
        )
    )


def _measured_on(report: ExportReport, quote: Quote) -> str:
    split = report.split
    if split is None:
        return "Accuracy was not measured: the gate was switched off when this bundle was made."
    if report.min_overlap is not None:
        return (
            "Retrieval accuracy was not measured: the identities on the pictures are unknown. "
            f"Rankings were compared, through the runtime: {split.captions} sentences that the "
            f"exporter brings, each querying {split.images} images of {quote(split.name)}."
        )
    return (
        f"Measured through the runtime on {quote(split.name)}: {split.captions} captions, each "
        f"querying {split.images} images."
    )


def _notes(report: ExportReport, quote: Quote) -> list[str]:
    """Return notes on the accuracy table."""
    notes = [
        f"{variant} is not in the bundle: {row.left_out}."
        for variant, row in report.variants.items()
        if not row.shipped
    ]
    if report.max_r1_drop is None:
        notes.append(f"Measure it before use: {quote('upperson evaluate BUNDLE --root DIR')}")
    if report.min_overlap is not None:
        notes.append(
            f"Every tower has the smallest candidate that keeps at least {report.min_overlap} % of "
            "fp32's first ten pictures, alone and with the other tower, on every backend named: "
            "plain int8, smoothed, mixed (a share of the Linears left in float), then float."
        )
    if report.max_r1_drop is not None:
        notes += [
            f"Every tower has the smallest candidate that loses at most {report.max_r1_drop} "
            "points of R@1 and of mAP against fp32 on the same queries, alone and with the other "
            "tower, on every backend named: plain int8, smoothed, mixed (a share of the Linears "
            "left in float), then float.",
            "Short queries are of the form 'woman in red coat'. They are few, so a candidate is "
            "refused for them only if its whole interval is beyond the same limit."
            if report.split and report.split.short_queries
            else "Short queries, such as 'woman in red coat', were not measured: not every picture "
            "has the attributes gender, upper and upper_colour.",
            *filter(None, [interval_note(report)]),
            "Candidates are chosen and measured on the same queries, so the accuracy of what ships "
            f"is slightly optimistic; {quote('upperson evaluate BUNDLE --root DIR --split val')} "
            "measures it on other queries.",
        ]
        if warning := report.too_few_queries():
            notes.append(f"{warning[0].upper()}{warning[1:]}.")
    notes += [
        f"{variant}: fp16 accumulation, which TensorRT may choose, leaves the {tower} tower a "
        f"cosine of {found.cosine:.6f} to accumulation in float32 in the worst case (needs "
        f"{found.min_cosine:.6f})"
        + (f"; {len(found.float_sums)} products got casts to float32." if found.float_sums else ".")
        for variant, row in report.variants.items()
        for tower, found in row.fp16_accumulation.items()
    ]
    times = report.conditions
    versions = ", ".join(f"{name} {version}" for name, version in times.backends.items())
    return [
        *notes,
        f"Times are a hint, not a benchmark: median of {times.repeats} runs of "
        f"{times.batch['image']} images, and of {times.batch['text']} captions of up to "
        f"{times.caption_tokens} tokens, on {quote(times.machine['cpu'])} with {times.threads} "
        f"threads, {versions}.",
    ]


def _facts(report: ExportReport, manifest: Manifest, quote: Quote) -> list[tuple[str, str]]:
    model = manifest.model
    adapter = f"sha256 {model.adapter_sha256[:16]}"
    if model.adapter_sha256 == NO_ADAPTER:
        adapter = "none: the base as it was published"
    facts = [
        ("base", f"{quote(model.base)}, weights sha256 {model.base_sha256[:16]}"),
        ("adapter", adapter),
        ("fingerprint", manifest.fingerprint),
        ("made", f"{manifest.created} by {manifest.generator}"),
    ]
    if report.calibration is not None:
        facts.append(("calibration", _calibrated(report, report.calibration, quote)))
    facts.append(("score calibration", scores_note(report, quote)))
    return facts


def scores_note(report: ExportReport, quote: Quote = str) -> str:
    """Say what scores were calibrated on, and how reliable likelihoods are."""
    if report.scores is None:
        if report.scores_unreliable:
            return "none; likelihoods would not be reliable on the people of the split val"
        return f"none; it needs captions of {FEWEST_PEOPLE} people or more in the split val"
    on, answers = report.scores.fitted_on, report.scores.held_out["all"]
    return (
        f"{on['people']} people from {quote(on['source'])}; on people left out AUROC "
        f"{answers['auroc']:.1f}, calibration error {answers['error']:.1f} points, nobody wrong "
        f"{answers['wrong_nobody']:.1f} % and caught {answers['caught_nobody']:.1f} %"
    )


def _calibrated(report: ExportReport, calibration: CalibrationRecord, quote: Quote) -> str:
    samples = calibration.samples
    images, texts = samples.images, samples.texts
    parts = [
        f"{len(images.sha256)} images from {quote(images.source)} and "
        f"{len(texts.sha256)} texts from {quote(texts.source)}, sha256 {samples.sha256[:16]}"
    ]
    if any(VARIANTS[variant].int8 for variant in report.variants):
        parts.append(f"{calibration.estimator} ranges")
    if (reused := calibration.reused_file_sha256) is not None:
        parts.append(f"taken over from a calibration file, sha256 {reused[:16]}")
    return "; ".join(parts)
