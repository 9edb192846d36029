"""``upperson import``."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from upperson.cli.options import Dataset, require_extra
from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import new_table, print_json, print_line, print_table, print_warning
from upperson_rt.errors import UsageError


@dataclass(frozen=True)
class Source(OptionGroup, panel="Training of the checkpoint"):
    """What the checkpoint was trained on."""

    dataset: Dataset = "jsonl"
    root: Path | None = option(
        None,
        "Folder of the data set that export measures on.",
        show_default="none: pass it to export",
    )
    base: str | None = option(
        None,
        "Architecture of CLIP by open_clip's name.",
        show_default="the one of OpenAI that fits",
    )
    height: int = option(384, "Image height in pixels.", min=1)
    width: int = option(128, "Image width in pixels.", min=1)


@grouped
def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="best.pth of the official code.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="New run folder.", show_default=False)],
    source: Source,
    report_to: Output,
) -> None:
    """Turn a checkpoint of the official UP-Person or IRRA code into a run.

    Only tensors are read; code in the file never runs. The run holds its own copy of CLIP, and
    import.json with the fate of every tensor.

    Example: `upperson import best.pth --output runs/official --dataset cuhk-pedes --root data`
    """
    require_extra("train", "importing")
    from upperson.data.records import DATASETS
    from upperson.official.importing import REPORT, import_checkpoint
    from upperson_rt.strict import suggestion

    dataset, root = source.dataset, source.root
    if dataset.lower() not in DATASETS:
        raise UsageError(
            f"--dataset '{dataset}' is unknown, {suggestion(dataset, DATASETS)}",
            code="dataset_unknown",
            dataset=dataset,
        )
    report = import_checkpoint(
        checkpoint,
        output,
        dataset=dataset,
        root=root,
        base=source.base,
        image_size=(source.height, source.width),
    )
    unknown = [key for key, reason in report["ignored"].items() if reason == "unknown"]
    if unknown:
        print_warning(
            f"{len(unknown)} unknown tensors are left out, first {unknown[0]}; "
            f"{output / REPORT} has all"
        )
    if report_to.as_json:
        print_json({"run": str(output), "report": str(output / REPORT)} | _summary(report))
        return
    table = new_table("", report["kind"])
    for name, text in _rows(report):
        table.add_row(name, text)
    print_table(table)
    folder, export_root = root or "DIR", "" if root else " --root DIR"
    print_line(
        f"run {output}; next:  upperson evaluate {output} --dataset {dataset} --root {folder}"
        f"  or  upperson export {output}{export_root}"
    )


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report with counts and reasons in place of its hundreds of names."""
    names = Counter(report["ignored"].values())
    return report | {"mapped": len(report["mapped"]), "ignored": dict(names)}


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    model = report["model"]
    height, width = report["image_size"]
    ignored = Counter(report["ignored"].values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in ignored.items())
    missing = ", ".join(f"{key} = {value}" for key, value in report["missing"].items())
    return [
        ("base", f"{report['base']}, {height}x{width}"),
        ("S-Prefix", _part(model["prefix_length"], "{} rows", model["prefix_blocks"])),
        ("LoRA", _part(model["lora_rank"], "rank {}", model["lora_blocks"])),
        ("L-Adapters", _part(model["adapter_reduction"], "width / {}", model["adapter_blocks"])),
        ("mapped", f"{len(report['mapped'])} tensors"),
        ("ignored", f"{sum(ignored.values())} tensors" + (f" ({reasons})" if reasons else "")),
        ("missing", missing or "none"),
    ]


def _part(size: int, template: str, blocks: str) -> str:
    if not size:
        return "none"
    return f"{template.format(size)}, {'all blocks' if blocks == 'all' else f'blocks {blocks}'}"
