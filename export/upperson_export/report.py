"""The bundle's report for people: model card in Markdown and a self-contained HTML page."""

from html import escape
from typing import Any

from upperson_export.ladder import backend_of
from upperson_rt.manifest import Manifest

_METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 84rem; margin: 3rem auto;
       padding: 0 1.5rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .45rem .7rem; border-bottom: 1px solid #dde3ea }
th:first-child, td:first-child { text-align: left }
th { font-weight: 600; color: #51606f } code { font-size: .9em }
.facts td { text-align: left } .wide { overflow-x: auto } td, th { white-space: nowrap }
.facts td { white-space: normal }
"""


def accuracy_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return a heading and one row a variant and backend: accuracy, change, form, size, time."""
    head = ["variant", "on", *(f"{name} %" for name in _METRICS), "R@1 change (95 %)"]
    rows = [[*head, "image", "text", "MiB", "ms/image", "shipped"]]
    for name, row in report["variants"].items():
        measured = {backend_of(name): row, **row["elsewhere"]}
        for backend in dict.fromkeys([*measured, *row["latency"]]):
            found = measured.get(backend, {"metrics": None, "r1_drop": None})
            metrics, times = found["metrics"] or {}, row["latency"].get(backend)
            rows.append(
                [
                    name,
                    backend,
                    *(f"{metrics[metric]:.2f}" if metrics else "-" for metric in _METRICS),
                    _change(found["r1_drop"]),
                    row["rungs"]["image"],
                    row["rungs"]["text"],
                    f"{row['size_bytes'] / 2**20:.1f}" if row["shipped"] else "-",
                    f"{times['image']:.1f}" if times else "-",
                    "yes" if row["shipped"] else "no",
                ]
            )
    return rows


def ladder_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return a heading and one row for every form that was measured, in order."""
    rows = [
        [
            "variant", "towers", "form", "on", *(f"{name} %" for name in _METRICS),
            "R@1 change (95 %)", "cosine min / 1 % / median", "same top 10 %", "accepted",
        ]
    ]  # fmt: skip
    rows += [
        [
            row["variant"],
            row["tower"],
            row["rung"],
            row["backend"],
            *_measurements(row),
        ]
        for row in report["ladder"]
    ]
    return rows


def _measurements(row: dict[str, Any]) -> list[str]:
    if row["failure"] is not None:
        return [*("-" for _ in _METRICS), "-", "-", "-", f"no: {row['failure']}"]
    return [
        *(f"{row['metrics'][metric]:.2f}" for metric in _METRICS),
        _change(row["r1_drop"]),
        " / ".join(f"{value:.4f}" for value in row["cosine"].values()),
        f"{row['top10_overlap']:.1f}",
        "yes" if row["accepted"] else "no",
    ]


def _change(lost: dict[str, float] | None) -> str:
    if lost is None:
        return "-"
    # Subtracted from 0, so that no change has no sign of its own.
    low, high = 0 - lost["high"], 0 - lost["low"]
    return f"{0 - lost['points']:+.2f} ({low:+.2f} to {high:+.2f})"


def report_html(report: dict[str, Any], manifest: Manifest) -> str:
    """Render the accuracy table and the facts of the bundle as one HTML file."""
    table = _html_table(accuracy_rows(report))
    ladder = ""
    if report["ladder"]:
        ladder = f"<h2>Every form that was measured</h2>{_html_table(ladder_rows(report))}"
    facts = "".join(f"<tr><td>{escape(k)}<td>{escape(v)}" for k, v in _facts(report, manifest))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(report['model'])}"
        f"</title><style>{_STYLE}</style>"
        f"<h1>Bundle {escape(report['model'])}</h1>"
        f"<p>{escape(_measured_on(report))}</p><h2>Accuracy of the exported files</h2>{table}"
        f"<p>{escape(_gate(report))}</p>{ladder}"
        f"<h2>Facts</h2><table class=facts>{facts}</table></html>\n"
    )


def _html_table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(
        [
            "<div class=wide><table><thead><tr>",
            *(f"<th>{escape(cell)}" for cell in head),
            "</thead>",
            *("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in body),
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
    if split is None:
        return "Accuracy was not measured: the gate was switched off when this bundle was made."
    return (
        f"Measured through the runtime on {split['name']}: {split['captions']} captions, each "
        f"querying {split['images']} images."
    )


def _gate(report: dict[str, Any]) -> str:
    if report["split"] is None:
        return "Measure it before use:  upperson evaluate BUNDLE --root DIR"
    return (
        f"Every tower has the smallest form that loses at most {report['max_r1_drop']} points of "
        "R@1 against fp32 on the same queries, alone and with the other tower, on every backend "
        "named: plain int8, "
        "smoothed, mixed (a share of the Linears left in float), then float. The interval is a "
        "paired bootstrap over queries."
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
                f"{calibration['source']}, {calibration['estimator']} ranges, "
                f"sha256 {calibration['sha256'][:16]}",
            )
        )
    return facts
