"""``upperson parity``."""

from pathlib import Path
from typing import Annotated

import typer

from upperson.cli.options import require_extra
from upperson_rt.cli.options import Debug, Json, Threads, read_batch_sizes
from upperson_rt.cli.output import print_json
from upperson_rt.errors import InputError, IntegrityError, UsageError


def parity(
    target: Annotated[
        Path, typer.Argument(help="Run folder or bundle.", metavar="RUN|BUNDLE", show_default=False)
    ],
    run: Annotated[
        Path | None,
        typer.Option(
            help="With a bundle: the run it was exported from. Then torch is the reference.",
            show_default="fp32 on onnxruntime is the reference",
        ),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime, openvino or tensorrt, with commas between them; :DEVICE behind one "
            "puts it there, such as onnxruntime:cuda.",
            show_default="all that are installed",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between them.")] = "1,2,8,32",
    images: Annotated[
        Path | None,
        typer.Option(help="Image, or folder of images.", show_default="rendered people"),
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Images and captions to compare.")] = 35,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Largest difference of a component that fp32 may have.", show_default="1e-5"
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            help="Lowest cosine that the other variants may have.",
            show_default="the bundle's own floor",
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare embeddings between torch, variants, backends, batch sizes and text lengths.

    Every item is embedded alone and in batches of every size; texts also among others of any length
    and with padding; images also from file to embedding. Exit code 6 if something differs.

    Example: `upperson parity bundle --backends onnxruntime,openvino`
    """
    batch_sizes = read_batch_sizes(batch)
    if max_error is not None and not 0 < max_error < float("inf"):
        raise UsageError(f"--max-error must be above 0, found {max_error}")
    if min_cosine is not None and not 0 < min_cosine <= 1:
        raise UsageError(f"--min-cosine must be above 0 and at most 1, found {min_cosine}")
    require_extra("export", "parity")
    from upperson.cli.parity_check import ParityOptions, check_bundle, check_run
    from upperson.cli.progress import Display
    from upperson_rt.bundle import MANIFEST_FILE

    options = ParityOptions(
        backends=[] if backends is None else backends.split(","),
        batch_sizes=batch_sizes,
        images=images,
        count=count,
        max_error=max_error,
        min_cosine=min_cosine,
        threads=threads,
    )
    with Display() as display:
        if (target / MANIFEST_FILE).is_file():
            report = check_bundle(target, run, options, display.update)
        elif not target.is_dir():
            raise InputError(f"expected a run folder or a bundle at {target}, found no folder")
        elif run is not None:
            raise UsageError(f"--run goes with a bundle, and {target} is none: leave it out")
        else:
            report = check_run(target, options, display.update)
    if json:
        print_json({"target": str(target)} | report.as_dict())
    else:
        from upperson.cli.parity_table import print_report

        print_report(report)
    if not report.ok:
        raise IntegrityError(report.message())
