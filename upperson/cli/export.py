"""``upperson export``."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from upperson.cli.extras import require_extra
from upperson.cli.options import RunFolder
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import new_table, print_json, print_table, print_warning
from upperson_rt.errors import InputError, UsageError


def export(
    run: RunFolder,
    output: Annotated[Path, typer.Option("--output", help="Bundle to write.")] = Path("bundle"),
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of the data set.", show_default="where the run was trained"),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8/--no-int8", help="Also write an int8 variant.")
    ] = True,
    max_r1_drop: Annotated[
        float, typer.Option(help="Most points of R@1 that int8 may lose against fp32.")
    ] = 0.5,
    calib_size: Annotated[
        int, typer.Option(min=1, help="Training images and captions that set int8 ranges.")
    ] = 512,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fold a run into ONNX files, measure every one, and write a bundle.

    Accuracy is measured on the run's test split (val, if it has none) through the runtime.

    Example: `upperson export runs/jsonl/20260101_120000_run --output bundle`
    """
    if not math.isfinite(max_r1_drop):
        raise UsageError(f"--max-r1-drop must be a number of points, found {max_r1_drop}")
    require_extra("export", "export")
    from upperson.cli.progress import Display

    with Display() as display:
        report = export_run(
            run,
            output,
            root=root,
            int8=int8,
            max_r1_drop=max_r1_drop,
            calib_size=calib_size,
            progress=display.update,
        )
    for name, row in report["variants"].items():
        if not row["shipped"]:
            print_warning(
                f"{name} loses {row['r1_drop']['points']:.2f} points of R@1, more than "
                f"--max-r1-drop {max_r1_drop}: it is left out of the bundle"
            )
    if json:
        print_json({"bundle": str(output)} | report)
        return
    from upperson_export.report import accuracy_rows

    head, *rows = accuracy_rows(report)
    table = new_table(*head, right=tuple(head[1:]))
    for row in rows:
        table.add_row(*row)
    print_table(table)
    typer.echo(f"bundle {output}; next:  upperson-rt index -b {output} FOLDER")


def export_run(
    run: Path,
    output: Path,
    *,
    root: Path | None = None,
    int8: bool,
    max_r1_drop: float,
    calib_size: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Load a run and its data set and export it; return the report. Raises as its parts do."""
    from upperson.cli.retrieval_split import retrieval_split
    from upperson.data.records import Split, read_dataset
    from upperson.data.vocabulary import clip_tokenizer, clip_tokenizer_json
    from upperson.run import ADAPTER, load_run
    from upperson_calibration.samples import choose_samples
    from upperson_export.bundle import ExportOptions, ModelIdentity, export_bundle
    from upperson_rt.bundle import sha256_of_file

    config, base, model = load_run(run)
    root = root or Path(config.root)
    splits = read_dataset(config.dataset, root)
    measured_on: Split = "test" if splits["test"] else "val"
    if not splits[measured_on]:
        raise InputError(f"{root} has neither test nor val images: accuracy cannot be measured")
    calibration = choose_samples(
        [record.image for record in splits["train"]],
        [caption for record in splits["train"] for caption in record.captions],
        clip_tokenizer(model.text.context_length),
        height_px=config.height_px,
        width_px=config.width_px,
        count=calib_size,
        seed=config.seed,
        source=f"{root.name}, train",
    )
    return export_bundle(
        model,
        ModelIdentity(
            name=f"up-person-{base.name.removeprefix('upperson-')}",
            base=base.name,
            base_sha256=base.sha256,
            adapter_sha256=sha256_of_file(run / ADAPTER),
            embed_dim=model.embed_dim,
        ),
        clip_tokenizer_json(),
        calibration,
        retrieval_split(splits[measured_on], f"{root.name}, {measured_on}"),
        output,
        ExportOptions(int8=int8, max_r1_drop=max_r1_drop),
        progress,
    )
