"""The bundle's report for people: model card in Markdown and a self-contained HTML page."""

from html import escape
from typing import Any

from upperson_rt.manifest import Manifest

_METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 60rem; margin: 3rem auto;
       padding: 0 1.5rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .45rem .7rem; border-bottom: 1px solid #dde3ea }
th:first-child, td:first-child { text-align: left }
th { font-weight: 600; color: #51606f } code { font-size: .9em }
.facts td { text-align: left }
"""


def accuracy_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return a heading and one row a variant: accuracy, paired drop, size and whether it ships."""
    rows = [["variant", *(f"{name} %" for name in _METRICS), "R@1 change (95 %)", "MiB", "shipped"]]
    for name, row in report["variants"].items():
        change = "-"
        if lost := row["r1_drop"]:
            change = (
                f"{0 - lost['points']:+.2f} ({0 - lost['high']:+.2f} to {0 - lost['low']:+.2f})"
            )
        rows.append(
            [
                name,
                *(f"{row['metrics'][metric]:.2f}" for metric in _METRICS),
                change,
                f"{row['size_bytes'] / 2**20:.1f}",
                "yes" if row["shipped"] else "no",
            ]
        )
    return rows


def report_html(report: dict[str, Any], manifest: Manifest) -> str:
    """Render the accuracy table and the facts of the bundle as one HTML file."""
    head, *body = accuracy_rows(report)
    table = "\n".join(
        [
            "<table><thead><tr>" + "".join(f"<th>{escape(cell)}" for cell in head) + "</thead>",
            *("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in body),
            "</table>",
        ]
    )
    facts = "".join(f"<tr><td>{escape(k)}<td>{escape(v)}" for k, v in _facts(report, manifest))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(report['model'])}"
        f"</title><style>{_STYLE}</style>"
        f"<h1>Bundle {escape(report['model'])}</h1>"
        f"<p>{escape(_measured_on(report))}</p><h2>Accuracy of the exported files</h2>{table}"
        f"<p>{escape(_gate(report))}</p><h2>Facts</h2><table class=facts>{facts}</table></html>\n"
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
        _gate(report),
        "",
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
    return (
        f"Measured through the runtime on {split['name']}: {split['captions']} captions, each "
        f"querying {split['images']} images."
    )


def _gate(report: dict[str, Any]) -> str:
    return (
        f"A variant ships if it loses at most {report['max_r1_drop']} points of R@1 against fp32 "
        "on the same queries; the interval is a paired bootstrap over queries."
    )


def _facts(report: dict[str, Any], manifest: Manifest) -> list[tuple[str, str]]:
    facts = [
        ("base", f"{manifest.model.base}, weights sha256 {manifest.model.base_sha256[:16]}"),
        ("adapter", f"sha256 {manifest.model.adapter_sha256[:16]}"),
        ("fingerprint", manifest.fingerprint),
        ("made", f"{manifest.created} by {manifest.generator}"),
    ]
    if calibration := report["calibration"]:
        facts.append(
            (
                "int8 calibration",
                f"{calibration['images']} images and {calibration['texts']} texts from "
                f"{calibration['source']}, sha256 {calibration['sha256'][:16]}",
            )
        )
    return facts
