"""``upperson export``."""

import math
from itertools import combinations
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson.cli.options import DATASET_HELP, require_extra
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import new_table, print_json, print_line, print_table, print_warning
from upperson_rt.errors import UsageError

if TYPE_CHECKING:
    from upperson_export.report import ExportReport


def export(
    context: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="Run folder that `upperson train` made; none with --base.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Export a CLIP as it was published, without a run (docs/training.md)."),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(help="With --base: its weights, a file or a tag of open_clip."),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(
            min=1, max=4096, help="With --base: height of the crops in pixels.", show_default="384"
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            min=1, max=4096, help="With --base: width of the crops in pixels.", show_default="128"
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", help="Bundle to write; an earlier one there is replaced."),
    ] = Path("bundle"),
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data set to measure on.",
            show_default="where the run was trained; with --base, rankings are compared",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help=f"With --base and --root: {DATASET_HELP}", show_default="jsonl"),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8/--no-int8", help="Also write an int8 variant, for processors.")
    ] = True,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Also write an fp16 variant, for GPUs.")
    ] = False,
    trt: Annotated[
        bool,
        typer.Option(
            "--trt",
            help="Also write the variants for TensorRT (fp16 and, unless --no-int8, int8-fp16), "
            "and build their engines where a GPU is.",
        ),
    ] = False,
    trt_flavor: Annotated[
        str,
        typer.Option(
            help="With --trt: standard, or rtx to build TensorRT-for-RTX engines as well, which "
            "needs no GPU; they go beside the bundle, into OUTPUT.rtx."
        ),
    ] = "standard",
    rtx_capability: Annotated[
        str,
        typer.Option(
            help="With --trt-flavor rtx: compute capability of the GPU that the engines are for."
        ),
    ] = "8.6",
    max_r1_drop: Annotated[
        float, typer.Option(help="Most points of R@1 that a variant may lose against fp32.")
    ] = 0.5,
    min_overlap: Annotated[
        float,
        typer.Option(
            min=0,
            max=100,
            help="Without captions: least percent of fp32's first ten pictures that a variant "
            "must keep.",
        ),
    ] = 90.0,
    precision: Annotated[
        str,
        typer.Option(
            help="auto lets a tower fall back to float; int8 ends with exit code 4 instead."
        ),
    ] = "auto",
    gate: Annotated[
        bool,
        typer.Option("--gate/--no-gate", help="Measure accuracy and insist on it, or do neither."),
    ] = True,
    calib_size: Annotated[
        int,
        typer.Option(
            min=1, help="Images and captions that set ranges; the first 8 become canaries."
        ),
    ] = 512,
    calib_data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images that set ranges; with --base alone, half of them are ranked.",
            show_default="training split; without captions or gate, rendered people",
        ),
    ] = None,
    estimator: Annotated[
        str | None,
        typer.Option(
            help="How ranges follow from what is seen: min-max, percentile-99.9, "
            "percentile-99.99, percentile-99.999, entropy or mse.",
            show_default="percentile-99.999, or that of --calibration",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="calibration.json of an earlier export of this run: what it holds is not "
            "measured again."
        ),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY",
            help="Sign the bundle with this private key (PEM); with `--trust` the runtime insists "
            "on it, by the public one.",
        ),
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(help="Also write a Triton model repository into this folder.")
    ] = None,
    deepstream: Annotated[
        Path | None, typer.Option(help="Also write nvinfer files for DeepStream into this folder.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fold a run, or a published CLIP, into ONNX files, measure every one, and write a bundle.

    Accuracy is measured on the run's test split (val, if it has none) through the runtime. A tower
    that loses too much in int8 is smoothed, then mixed with float, then float. With --base no run
    is needed; without --root nobody says who is on the pictures, so rankings of sentences that the
    exporter brings are compared with those of fp32. Options, packages and output folders are
    checked before any work.

    Example: `upperson export runs/jsonl/20260101_120000_run --output bundle --trt --int8`, or
    `upperson export --base ViT-B-16-quickgelu --pretrained openai --calib-data crops`
    """
    _require_one_source(
        run,
        base,
        {"--pretrained": pretrained, "--height": height, "--width": width, "--dataset": dataset},
    )
    if not math.isfinite(max_r1_drop):
        raise UsageError(f"--max-r1-drop must be a number of points, found {max_r1_drop}")
    if trt_flavor not in ("standard", "rtx"):
        raise UsageError(f"--trt-flavor must be standard or rtx, found '{trt_flavor}'")
    if precision not in ("auto", "int8"):
        raise UsageError(f"--precision must be auto or int8, found '{precision}'")
    from upperson_export.engines import rtx_folder

    rtx = trt and trt_flavor == "rtx"
    captions = base is None or root is not None
    _refuse_ignored(
        context, gate=gate, captions=captions, int8=int8, half=fp16 or trt, trt=trt, rtx=rtx
    )
    _refuse_nested(
        {
            "--output": output,
            "the engines' folder": rtx_folder(output) if rtx else None,
            "--triton": triton,
            "--deepstream": deepstream,
        }
    )
    require_extra("export", "export")
    from upperson.cli.exportable import export_base, export_run
    from upperson.cli.progress import Display
    from upperson_calibration.ranges import ESTIMATORS
    from upperson_export.bundle import ExportOptions, foreign_to_bundle
    from upperson_export.engines import build_engines, require_engines
    from upperson_export.serving import require_serving_place
    from upperson_export.variants import variants_asked
    from upperson_rt.files import require_place
    from upperson_rt.signature import read_private_key

    if estimator is not None and estimator not in ESTIMATORS:
        raise UsageError(f"--estimator must be one of {', '.join(ESTIMATORS)}, found '{estimator}'")
    if sign is not None:
        read_private_key(sign)  # Raises now rather than after minutes.
    require_place(output, foreign_to_bundle)
    if triton is not None:
        require_serving_place(triton, "triton")
    if deepstream is not None:
        require_serving_place(deepstream, "deepstream")
    capability = rtx_capability if rtx else None
    if trt:
        require_engines(output, capability)
    options = ExportOptions(
        variants=variants_asked(
            [name for name, given in (("int8", int8), ("fp16", fp16), ("trt", trt)) if given]
        ),
        max_r1_drop=max_r1_drop,
        min_overlap=min_overlap,
        int8_only=precision == "int8",
        estimator=estimator,
        sign=sign,
    )
    data: dict[str, Any] = {
        "root": root,
        "gate": gate,
        "calib_size": calib_size,
        "calib_data": calib_data,
        "calibration": calibration,
    }
    with Display() as display:
        if base is not None:
            size = (height, width)
            data["dataset"] = dataset or "jsonl"
            report = export_base(
                base, pretrained, size, output, options, **data, progress=display.update
            )
        else:
            assert run is not None  # Or the base would be given.
            report = export_run(run, output, options, **data, progress=display.update)
        engines = {}
        if trt:
            display.say(f"bundle '{output}' is complete")  # Whatever becomes of its engines.
            engines = build_engines(output, capability, note=display.say, progress=display.step)
    written = _serving(output, triton, deepstream)
    for name, row in report.variants.items():
        if not row.shipped:
            limit = f"--max-r1-drop {max_r1_drop}" if captions else f"--min-overlap {min_overlap}"
            print_warning(
                f"{name} is left out of the bundle: {row.left_out} ({limit}); "
                "calibrate with more images, or allow more"
            )
    if warning := report.too_few_queries():
        print_warning(warning)
    if as_json:
        print_json(
            {"bundle": str(output), **report.as_dict(), "engines": engines, "serving": written}
        )
        return
    _print_report(report)
    if report.min_overlap is not None and report.split is not None:
        print_line(
            f"no captions, so no accuracy: {report.split.captions} sentences of the exporter "
            f"ranked {report.split.images} pictures of {report.split.name} in every form"
        )
    for line in (*engines.values(), *written.values()):
        print_line(line)
    print_line(f"bundle '{output}'; next:  upperson-rt index -b {quote(str(output))} FOLDER")


def _print_report(report: "ExportReport") -> None:
    """Print accuracy, size and time of each variant, without columns that are empty."""
    from upperson_export.pages import accuracy_table

    found = accuracy_table(report).filled()
    table = new_table(*found.head, right=tuple(found.head[place] for place in found.numbers))
    for row in found.body:
        table.add_row(*row)
    print_table(table)


def _require_one_source(
    run: Path | None, base: str | None, of_base: dict[str, str | int | None]
) -> None:
    """Raise UsageError unless there is a run or a base, and options of a base only with one."""
    if run is None and base is None:
        raise UsageError(
            "RUN is missing: pass the run folder that `upperson train` made, or --base and "
            "--pretrained to export a CLIP without a run"
        )
    if base is None:
        for option, value in of_base.items():
            if value is not None:
                raise UsageError(f"{option} goes with --base: a run has its own, leave it out")
    elif run is not None:
        raise UsageError(f"a run ({run}) and --base exclude each other: leave one of them out")


def _refuse_ignored(
    context: typer.Context,
    *,
    gate: bool,
    captions: bool,
    int8: bool,
    half: bool,
    trt: bool,
    rtx: bool,
) -> None:
    """Refuse options that were given and would change nothing."""
    no_captions = "without captions: pass --root, or --min-overlap instead"
    for option, used, without in (
        ("--root", gate, "with --no-gate: leave one of them out"),
        ("--max-r1-drop", gate, "with --no-gate: leave one of them out"),
        ("--min-overlap", gate, "with --no-gate: leave one of them out"),
        ("--max-r1-drop", captions, no_captions),
        ("--dataset", captions, "without --root: pass the folder of the data set"),
        ("--min-overlap", not captions, "where there are captions: use --max-r1-drop"),
        ("--precision", gate, "with --no-gate: leave one of them out"),
        ("--precision", int8, "with --no-int8: leave one of them out"),
        ("--estimator", int8, "with --no-int8: leave one of them out"),
        ("--calibration", int8 or half, "on fp32 alone: leave out --no-int8, or add --fp16"),
        ("--trt-flavor", trt, "without --trt: add that, or leave it out"),
        ("--rtx-capability", rtx, "without --trt --trt-flavor rtx: add these, or leave it out"),
    ):
        source = context.get_parameter_source(option.removeprefix("--").replace("-", "_"))
        if not used and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{option} has no effect {without}")


def _refuse_nested(folders: dict[str, Path | None]) -> None:
    """Refuse folders of which one would be written into another, or over it."""
    named = [(name, path.resolve()) for name, path in folders.items() if path is not None]
    for (one, first), (other, second) in combinations(named, 2):
        if first.is_relative_to(second) or second.is_relative_to(first):
            raise UsageError(
                f"{one} {first} and {other} {second} are the same folder or lie in each other: "
                "name folders beside each other"
            )


def _serving(bundle: Path, triton: Path | None, deepstream: Path | None) -> dict[str, str]:
    if triton is None and deepstream is None:
        return {}
    from upperson_export.serving import write_deepstream, write_triton

    lines = {}
    if triton is not None:
        lines["triton"] = f"triton {write_triton(bundle, triton).folder}"
    if deepstream is not None:
        lines["deepstream"] = f"deepstream {write_deepstream(bundle, deepstream).folder}"
    return lines
