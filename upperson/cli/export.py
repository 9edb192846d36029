"""``upperson export``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson.cli.options import DATASET_HELP, require_extra
from upperson_rt.cli.groups import OptionGroup, advanced, grouped, option
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import new_table, print_json, print_line, print_table, print_warning
from upperson_rt.errors import UsageError

if TYPE_CHECKING:
    from upperson_export.bundle import ExportOptions
    from upperson_export.report import ExportReport


@dataclass(frozen=True)
class Base(OptionGroup, panel="A base without a run"):
    """The published CLIP that takes the place of a run."""

    base: str | None = option(
        None, "Export a CLIP as it was published, without a run (docs/how-to/export.md)."
    )
    pretrained: str | None = option(None, "With --base: its weights, a file or a tag of open_clip.")
    height: int | None = advanced(
        None, "With --base: height of the crops in pixels.", min=1, max=4096, show_default="384"
    )
    width: int | None = advanced(
        None, "With --base: width of the crops in pixels.", min=1, max=4096, show_default="128"
    )
    dataset: str | None = advanced(
        None, f"With --base and --root: {DATASET_HELP}", show_default="jsonl"
    )


@dataclass(frozen=True)
class Variants(OptionGroup, panel="Precision variants"):
    """The precision variants that are written beside fp32."""

    int8: bool = option(True, "Also write an int8 variant, for CPUs.")
    fp16: bool = option(False, "Also write an fp16 variant, for GPUs.")
    trt: bool = option(
        False,
        "Also write the variants for TensorRT (fp16 and, unless --no-int8, int8-fp16), "
        "and build their engines if this machine has a GPU.",
    )
    trt_flavor: str = advanced(
        "standard",
        "With --trt: standard, or rtx to build TensorRT-for-RTX engines as well, which "
        "needs no GPU; they go beside the bundle, into OUTPUT.rtx.",
    )
    rtx_capability: str = advanced(
        "8.6", "With --trt-flavor rtx: compute capability of the GPU that the engines are for."
    )

    @property
    def rtx(self) -> bool:
        """Whether engines of TensorRT for RTX are built."""
        return self.trt and self.trt_flavor == "rtx"

    def names(self) -> list[str]:
        """Return the options that are on, for `variants_for`."""
        return [name for name in ("int8", "fp16", "trt") if getattr(self, name)]


@dataclass(frozen=True)
class Gate(OptionGroup, panel="Accuracy gate"):
    """The accuracy that variants must keep."""

    root: Path | None = option(
        None,
        "Folder of the data set to measure on.",
        show_default="where the run was trained; with --base, rankings are compared",
    )
    max_r1_drop: float = option(
        0.5,
        "Maximum drop of R@1, of mAP and, where attributes are known, of both for short queries "
        "against fp32, in percentage points.",
    )
    gate: bool = option(True, "Measure accuracy and insist on it, or do neither.")
    min_overlap: float = advanced(
        90.0,
        "Without captions: minimum overlap of the top 10 with that of fp32, in percent.",
        min=0,
        max=100,
    )
    precision: str = advanced(
        "auto", "auto lets a tower fall back to float; int8 ends with exit code 4 instead."
    )


@dataclass(frozen=True)
class Calibrated(OptionGroup, panel="Calibration"):
    """The samples and the estimator that set activation ranges."""

    calib_data: Path | None = option(
        None,
        "Folder of images that set ranges; with --base alone, half of them are ranked.",
        show_default="training split; without captions or gate, rendered people",
    )
    calib_size: int = advanced(
        512, "Images and captions that set ranges; the first 8 become the golden samples.", min=1
    )
    estimator: str | None = advanced(
        None,
        "Estimator for activation ranges: min-max, percentile-99.9, percentile-99.99, "
        "percentile-99.999, entropy or mse.",
        show_default="percentile-99.999, or that of --calibration",
    )
    calibration: Path | None = advanced(
        None,
        "calibration.json of an earlier export of this run: what it holds is not measured again.",
    )


@dataclass(frozen=True)
class Adapter(OptionGroup, panel="An adapter file instead of a bundle"):
    """The adapter file of a run, for boxes that have the base bundle."""

    adapter_for: Path | None = option(
        None,
        "Write an adapter file for this base bundle, made with --base; `upperson-rt apply` makes "
        "the site's bundle of both.",
        metavar="BUNDLE",
    )
    site: str | None = advanced(
        None, "With --adapter-for: name of the site.", show_default="name of the output file"
    )
    adapter_type: str = advanced(
        "float16", "With --adapter-for: type of the trained tensors in the file, or float32."
    )


@dataclass(frozen=True)
class Written(OptionGroup, panel="Output"):
    """The bundle, and what is written beside it."""

    output: Path = option(
        Path("bundle"),
        "Bundle or adapter file to write; an earlier adapter, or bundle of the same model, is "
        "replaced.",
    )
    force: bool = option(False, "Also replace the bundle of another model.")
    sign: Path | None = advanced(
        None,
        "Sign the bundle with this private key (PEM); with `--trust` the runtime insists "
        "on it, by the public one.",
        metavar="KEY",
    )
    triton: Path | None = advanced(None, "Also write a Triton model repository into this folder.")
    deepstream: Path | None = advanced(
        None, "Also write nvinfer files for DeepStream into this folder."
    )


@grouped
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
    *,
    base: Base,
    variants: Variants,
    gate: Gate,
    calibrated: Calibrated,
    adapter: Adapter,
    written: Written,
    printed: Output,
) -> None:
    """Fold a run, or a published CLIP, into ONNX files, measure every one, and write a bundle.

    Accuracy is measured on the run's test split (val, if it has none) through the runtime. A tower
    that loses too much in int8 is smoothed, then mixed with float, then float. With --base no run
    is needed; without --root there are no captions of the pictures, so rankings of sentences that
    the exporter brings are compared with those of fp32. Options, packages and output folders are
    checked before any work.

    Example: `upperson export runs/jsonl/20260101_120000_run --output bundle --trt --int8`, or
    `upperson export --base ViT-B-16-quickgelu --pretrained openai --calib-data crops`, or
    `upperson export RUN --adapter-for base --output platform.adapter`
    """
    captions = base.base is None or gate.root is not None
    _require_one_source(run, base)
    _require_known(gate, variants)
    _require_adapter(context, adapter, base, variants, written)
    _refuse_ignored(context, variants, gate=gate.gate, captions=captions)
    require_extra("export", "export")
    _refuse_nested(written, variants)
    from upperson.cli.exportable import (
        AdapterOptions,
        ExportData,
        export_adapter,
        export_base,
        export_run,
    )
    from upperson.cli.progress import Display
    from upperson_export.engines import build_engines

    options = _export_options(variants, gate, calibrated, written)
    if adapter.adapter_for is None:
        _require_places(written, variants)
    data = ExportData(
        root=gate.root,
        dataset=base.dataset or "jsonl",
        gate=gate.gate,
        calib_size=calibrated.calib_size,
        calib_data=calibrated.calib_data,
        calibration=calibrated.calibration,
    )
    with Display() as display:
        if run is not None and adapter.adapter_for is not None:
            wanted = AdapterOptions(
                base=adapter.adapter_for,
                site=adapter.site or written.output.stem,
                dtype=adapter.adapter_type,
            )
            report = export_adapter(run, written.output, wanted, options, data, display.update)
        elif run is not None:
            report = export_run(run, written.output, options, data, display.update)
        else:
            assert base.base is not None  # `_require_one_source` has made sure.
            size = (base.height, base.width)
            report = export_base(
                base.base, base.pretrained, size, written.output, options, data, display.update
            )
        engines = {}
        if variants.trt and adapter.adapter_for is None:
            display.say(f"bundle '{written.output}' is complete")  # Engines may still fail.
            engines = build_engines(
                written.output,
                variants.rtx_capability if variants.rtx else None,
                note=display.say,
                progress=display.step,
            )
    serving = _write_serving(written)
    _warn(report)
    if printed.as_json:
        print_json(
            {
                "adapter" if adapter.adapter_for else "bundle": str(written.output),
                **report.as_dict(),
                "engines": engines,
                "serving": serving,
            }
        )
        return
    _print_report(report)
    for line in (*engines.values(), *serving.values()):
        print_line(line)
    folder = quote(str(written.output))
    if adapter.adapter_for is not None:
        onto = quote(str(adapter.adapter_for))
        size_mb = written.output.stat().st_size / 1e6
        print_line(
            f"adapter '{written.output}', {size_mb:.1f} MB; on the box:  upperson-rt apply "
            f"{folder} -b {onto} -o bundle"
        )
        return
    print_line(f"bundle '{written.output}'; next:  upperson-rt index -b {folder} FOLDER")


def _require_one_source(run: Path | None, base: Base) -> None:
    """Raise UsageError unless there is a run or a base, and options of a base only with one."""
    if run is None and base.base is None:
        raise UsageError(
            "RUN is missing: pass the run folder that `upperson train` made, or --base and "
            "--pretrained to export a CLIP without a run",
            code="run_missing",
        )
    if base.base is not None and run is not None:
        raise UsageError(
            f"a run ({run}) and --base exclude each other: leave one of them out",
            code="run_and_base",
        )
    for name in ("pretrained", "height", "width", "dataset"):
        if base.base is None and getattr(base, name) is not None:
            raise UsageError(
                f"--{name} goes with --base: a run has its own, leave it out",
                code="option_needs_base",
                option=f"--{name}",
            )


def _require_adapter(
    context: typer.Context, adapter: Adapter, base: Base, variants: Variants, written: Written
) -> None:
    """Refuse options that do not go with an adapter file, or only with one."""
    if adapter.adapter_for is None:
        for name in ("site", "adapter_type"):
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                shown = "--" + name.replace("_", "-")
                raise UsageError(
                    f"{shown} goes with --adapter-for: add that, or leave it out",
                    code="option_needs_adapter",
                    option=shown,
                )
        return
    _require_one_of("--adapter-type", adapter.adapter_type, ["float16", "float32"])
    if base.base is not None:
        raise UsageError(
            "--base has no trained parts, and --adapter-for exports those of a run: leave one out",
            code="base_and_adapter",
        )
    for name, given in (
        ("--triton", written.triton),
        ("--deepstream", written.deepstream),
        ("--trt-flavor rtx", variants.rtx or None),
    ):
        if given is not None:
            raise UsageError(
                f"{name} needs a bundle: apply the adapter first, or leave it out",
                code="option_needs_bundle",
                option=name,
            )


def _require_known(gate: Gate, variants: Variants) -> None:
    if not math.isfinite(gate.max_r1_drop):
        raise UsageError(
            f"--max-r1-drop must be a number of points, found {gate.max_r1_drop}",
            code="option_not_finite",
            option="--max-r1-drop",
        )
    _require_one_of("--trt-flavor", variants.trt_flavor, ["standard", "rtx"])
    _require_one_of("--precision", gate.precision, ["auto", "int8"])


def _require_one_of(option: str, found: str, expected: Sequence[str]) -> None:
    if found not in expected:
        raise UsageError(
            f"{option} must be one of {', '.join(expected)}, found '{found}'",
            code="option_unknown",
            option=option,
            found=found,
        )


def _refuse_ignored(
    context: typer.Context, variants: Variants, *, gate: bool, captions: bool
) -> None:
    """Refuse options that were given and would change nothing."""
    int8, half = variants.int8, variants.fp16 or variants.trt
    no_captions = "without captions: pass --root, or --min-overlap instead"
    for name, used, without in (
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
        ("--trt-flavor", variants.trt, "without --trt: add that, or leave it out"),
        (
            "--rtx-capability",
            variants.rtx,
            "without --trt --trt-flavor rtx: add these, or leave it out",
        ),
    ):
        source = context.get_parameter_source(name.removeprefix("--").replace("-", "_"))
        if not used and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{name} has no effect {without}", code="option_ignored", option=name)


def _refuse_nested(written: Written, variants: Variants) -> None:
    """Refuse folders of which one would be written into another, or over it."""
    from upperson_export.engines import rtx_folder

    folders = {
        "--output": written.output,
        "the engines' folder": rtx_folder(written.output) if variants.rtx else None,
        "--triton": written.triton,
        "--deepstream": written.deepstream,
    }
    named = [(name, path.resolve()) for name, path in folders.items() if path is not None]
    for (one, first), (other, second) in combinations(named, 2):
        if first.is_relative_to(second) or second.is_relative_to(first):
            raise UsageError(
                f"{one} {first} and {other} {second} are the same folder or lie in each other: "
                "name folders beside each other",
                code="folders_nested",
                one=one,
                other=other,
            )


def _export_options(
    variants: Variants, gate: Gate, calibrated: Calibrated, written: Written
) -> "ExportOptions":
    from upperson_calibration.ranges import ESTIMATORS
    from upperson_export.bundle import ExportOptions
    from upperson_export.variants import variants_for
    from upperson_signature.signature import read_private_key

    estimator: Any = calibrated.estimator
    if estimator is not None:
        _require_one_of("--estimator", estimator, ESTIMATORS)
    if written.sign is not None:
        read_private_key(written.sign)  # Raises now rather than after minutes.
    return ExportOptions(
        variants=variants_for(variants.names()),
        max_r1_drop=gate.max_r1_drop,
        min_overlap=gate.min_overlap,
        int8_only=gate.precision == "int8",
        estimator=estimator,
        sign=written.sign,
        force=written.force,
    )


def _require_places(written: Written, variants: Variants) -> None:
    """Raise now if something could not be written in the end."""
    from upperson_export.engines import require_engines
    from upperson_export.serving import require_serving_place
    from upperson_rt.bundle import unowned_in_bundle
    from upperson_rt.files import require_place

    require_place(written.output, unowned_in_bundle)
    if written.triton is not None:
        require_serving_place(written.triton, "triton")
    if written.deepstream is not None:
        require_serving_place(written.deepstream, "deepstream")
    if variants.trt:
        require_engines(written.output, variants.rtx_capability if variants.rtx else None)


def _write_serving(written: Written) -> dict[str, str]:
    """Write what servers need; return a line for each folder."""
    from upperson_export.serving import write_deepstream, write_triton

    lines = {}
    if written.triton is not None:
        lines["triton"] = f"triton {write_triton(written.output, written.triton).folder}"
    if written.deepstream is not None:
        folder = write_deepstream(written.output, written.deepstream).folder
        lines["deepstream"] = f"deepstream {folder}"
    return lines


def _warn(report: "ExportReport") -> None:
    limit = f"--max-r1-drop {report.max_r1_drop}"
    if report.min_overlap is not None:
        limit = f"--min-overlap {report.min_overlap}"
    for name, row in report.variants.items():
        if not row.shipped:
            print_warning(
                f"{name} is left out of the bundle: {row.left_out} ({limit}); "
                "calibrate with more images, or allow more"
            )
    if warning := report.too_few_queries():
        print_warning(warning)


def _print_report(report: "ExportReport") -> None:
    """Print accuracy, size and time of each variant, without columns that are empty."""
    from upperson_export.pages import accuracy_table, change_table, interval_note, scores_note

    for found in (accuracy_table(report).filled(), change_table(report).filled()):
        if found.body:
            table = new_table(*found.head, right=tuple(found.head[i] for i in found.numbers))
            for row in found.body:
                table.add_row(*row)
            print_table(table)
    if note := interval_note(report):
        print_line(note)
    print_line(f"score calibration: {scores_note(report)}")
    if report.min_overlap is not None and report.split is not None:
        print_line(
            f"no captions, so no accuracy: {report.split.captions} sentences of the exporter "
            f"ranked {report.split.images} pictures of {report.split.name} in every variant"
        )
