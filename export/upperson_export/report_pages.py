"""The bundle's report for people: model card in Markdown and a self-contained HTML page."""

from html import escape
from typing import Any

from upperson_export.report_rows import accuracy_rows, float_linear_rows, ladder_rows
from upperson_export.variants import VARIANTS
from upperson_rt.manifest import Manifest

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 84rem; margin: 3rem auto;
       padding: 0 1.5rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } p { max-width: 60rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem }
th, td { text-align: left; padding: .35rem .55rem; border-bottom: 1px solid #dde3ea;
         vertical-align: top }
th { font-weight: 600; color: #51606f; vertical-align: bottom }
.wide { overflow-x: auto } .wide td { white-space: nowrap } .wide td:last-child { min-width: 5rem;
        white-space: normal } .number { text-align: right } .no td { color: #7a8592 }
"""

_NUMBER = "+-0123456789"
"""What a number, or a dash in its place, begins with."""

_FLOAT_LINEARS = (
    "Int8 in one of these alone does the most harm to the rankings of a few samples. The cosine "
    "decides where no order changes."
)


def report_html(report: dict[str, Any], manifest: Manifest) -> str:
    """Render the tables and the facts of the bundle as one HTML file."""
    facts = "".join(f"<tr><td>{escape(k)}<td>{escape(v)}" for k, v in _facts(report, manifest))
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(report['model'])}"
        f"</title><style>{_STYLE}</style><h1>Bundle {escape(report['model'])}</h1>",
        _paragraph(_measured_on(report)),
        "<h2>Accuracy of the exported files</h2>",
        _html_table(accuracy_rows(report)),
        *map(_paragraph, _notes(report)),
    ]
    if report["ladder"]:
        parts += ["<h2>Every form that was measured</h2>", _html_table(ladder_rows(report))]
    if len(rows := float_linear_rows(report)) > 1:
        parts += ["<h2>Linears left in float</h2>", _paragraph(_FLOAT_LINEARS), _html_table(rows)]
    parts.append(f"<h2>Facts</h2><table>{facts}</table></html>\n")
    return "\n".join(parts)


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}"


def _html_table(rows: list[list[str]]) -> str:
    """Render rows; columns of numbers align to the right, rows that end with a no are grey."""
    head, *body = rows
    align = [
        " class=number" if all(cell[0] in _NUMBER for cell in column) else ""
        for column in zip(*body, strict=True)
    ]

    def cells(tag: str, row: list[str]) -> str:
        return "".join(
            f"<{tag}{kind}>{escape(cell)}" for kind, cell in zip(align, row, strict=True)
        )

    return "\n".join(
        [
            f"<div class=wide><table><thead><tr>{cells('th', head)}</thead>",
            *(
                f"<tr{' class=no' if row[-1].startswith('no') else ''}>{cells('td', row)}"
                for row in body
            ),
            "</table></div>",
        ]
    )


def model_card(report: dict[str, Any], manifest: Manifest) -> str:
    """Render the bundle's README.md."""
    head, *body = accuracy_rows(report)
    lines = [
        "---",
        "tags: [clip, onnx, text-based-person-retrieval]",
        f"base_model: {manifest.model.base}",
        "---",
        f"# {report['model']}",
        "",
        "UP-Person dual encoder (arXiv 2504.10084), folded into plain ONNX graphs.",
        "",
        _measured_on(report),
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in body),
        "",
        *(line for note in _notes(report) for line in (note, "")),
        "## Inputs and outputs",
        "",
        f"- image: `image` uint8 [N, {manifest.image.height_px}, {manifest.image.width_px}, 3] "
        "RGB, resized by antialiased bilinear, aspect not kept; output `image_embeds` float32 "
        f"[N, {manifest.model.embed_dim}], unit norm",
        f"- text: `input_ids` int32 [N, L], L up to {manifest.text.context_length}, zero-padded, "
        f"from `tokenizer.json`; output `text_embeds` float32 [N, {manifest.model.embed_dim}], "
        "unit norm",
        "",
        "## Facts",
        "",
        *(f"- {key}: {value}" for key, value in _facts(report, manifest)),
        "",
        "## Use",
        "",
        "Finds crops that match a description. It is no proof of identity: people look alike, and "
        "descriptions carry their author's bias. Watching people is regulated in most places.",
        "",
    ]
    return "\n".join(lines)


def _measured_on(report: dict[str, Any]) -> str:
    split = report["split"]
    if split is None:
        return "Accuracy was not measured: the gate was switched off when this bundle was made."
    return (
        f"Measured through the runtime on {split['name']}: {split['captions']} captions, each "
        f"querying {split['images']} images."
    )


def _notes(report: dict[str, Any]) -> list[str]:
    """Return what has to be known to read the accuracy table."""
    notes = [
        f"{variant} is not in the bundle: {row['reason']}."
        for variant, row in report["variants"].items()
        if not row["shipped"]
    ]
    if report["split"] is None:
        notes.append("Measure it before use:  upperson evaluate BUNDLE --root DIR")
    else:
        notes += [
            f"Every tower has the smallest form that loses at most {report['max_r1_drop']} points "
            "of R@1 against fp32 on the same queries, alone and with the other tower, on every "
            "backend named: plain int8, smoothed, mixed (a share of the Linears left in float), "
            "then float. The interval is a paired bootstrap over queries.",
            "Forms are chosen and measured on the same queries, so the accuracy of what ships is "
            "slightly optimistic;  upperson evaluate BUNDLE --root DIR --split val  measures it on "
            "other queries.",
        ]
        if warning := too_few_queries(report):
            notes.append(f"{warning[0].upper()}{warning[1:]}.")
    return [*notes, _times(report["latency_conditions"])]


def too_few_queries(report: dict[str, Any]) -> str | None:
    """Say that the split cannot tell what the gate asks, if one query is more than it allows."""
    if report["split"] is None:
        return None
    captions, allowed = report["split"]["captions"], report["max_r1_drop"]
    if 100 / captions <= allowed:
        return None
    return (
        f"one of the {captions} queries is {100 / captions:.2f} points of R@1, more than the "
        f"{allowed} allowed: forms pass or fail by chance; measure on more queries"
    )


def _times(conditions: dict[str, Any]) -> str:
    """Say what the times depend on."""
    machine, batch = conditions["machine"], conditions["batch"]
    versions = ", ".join(f"{name} {found}" for name, found in conditions["backends"].items())
    return (
        f"Times are a hint, not a benchmark: median of {conditions['repeats']} runs of "
        f"{batch['image']} images, and of {batch['text']} captions of up to "
        f"{conditions['caption_tokens']} tokens, on {machine['cpu']} with {conditions['threads']} "
        f"threads, {versions}."
    )


def _facts(report: dict[str, Any], manifest: Manifest) -> list[tuple[str, str]]:
    facts = [
        ("base", f"{manifest.model.base}, weights sha256 {manifest.model.base_sha256[:16]}"),
        ("adapter", f"sha256 {manifest.model.adapter_sha256[:16]}"),
        ("fingerprint", manifest.fingerprint),
        ("made", f"{manifest.created} by {manifest.generator}"),
    ]
    if calibration := report["calibration"]:
        facts.append(("calibration", _calibrated(report, calibration)))
    return facts


def _calibrated(report: dict[str, Any], calibration: dict[str, Any]) -> str:
    parts = [
        f"{calibration['images']} images from {calibration['image_source']} and "
        f"{calibration['texts']} texts from {calibration['text_source']}, "
        f"sha256 {calibration['sha256'][:16]}"
    ]
    if any(VARIANTS[variant].int8 for variant in report["variants"]):
        parts.append(f"{calibration['estimator']} ranges")
    if (reused := calibration["reused_file_sha256"]) is not None:
        parts.append(f"taken over from a calibration file, sha256 {reused[:16]}")
    return "; ".join(parts)
