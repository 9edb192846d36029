"""`upperson-rt doctor`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.options import (
    BackendOption,
    Debug,
    DetectorClass,
    DetectorLayout,
    DetectorScore,
    DeviceOption,
    Json,
    OptionalBundleOption,
    OptionalGalleryOption,
    TrustOption,
    VariantOption,
    default_bundle,
    default_gallery,
    require_no_detector_options,
    require_sheet,
)
from upperson_rt.cli.output import new_table, print_json, print_note, print_table

__all__ = ["doctor"]

_CONSOLE_LOG = Path("console/query.log")
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    bundle: OptionalBundleOption = None,
    trust: TrustOption = None,
    gallery: OptionalGalleryOption = None,
    query_log: Annotated[
        Path | None,
        typer.Option(
            "--query-log",
            envvar="UPPERSON_QUERY_LOG",
            metavar="FILE",
            help="Query log whose lines are verified.",
            show_default="console/query.log if it is there",
        ),
    ] = None,
    variant: VariantOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    detector: Annotated[
        str | None,
        typer.Option(
            "--detector",
            help="Detector to try, as for `watch`, such as FILE.onnx: its layout, input, class and "
            "backend, and what it finds in a picture.",
        ),
    ] = None,
    detector_layout: DetectorLayout = None,
    detector_class: DetectorClass = None,
    detector_score: DetectorScore = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            help="Picture that the detector looks at.",
            show_default="three drawn figures, which not every detector takes for people",
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            "--sheet",
            metavar="FILE.png",
            help="Draw the boxes it finds into a picture, red; thin green ones are the figures'.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check the installation, the bundle and the gallery, and say how to fix what is wrong.

    Example: `upperson-rt doctor --detector yolox.onnx --picture street.jpg --sheet boxes.png`
    """
    if detector is None:
        require_no_detector_options(
            {
                "--detector-layout": detector_layout,
                "--detector-class": detector_class,
                "--detector-score": detector_score,
                "--picture": picture,
                "--sheet": sheet,
            }
        )
    if sheet is not None:
        require_sheet(sheet)
    from upperson_rt.doctor import diagnose
    from upperson_rt.log_chain import head_of

    if bundle is None and default_bundle.exists():
        bundle = default_bundle
    if gallery is None and Path(default_gallery).exists():
        gallery = default_gallery
    if query_log is None and (head_of(_CONSOLE_LOG).exists() or _CONSOLE_LOG.exists()):
        query_log = _CONSOLE_LOG
    for name, given in {"bundle": bundle, "gallery": gallery}.items():
        if given is None:
            print_note(f"no {name} here to check: name one with  --{name} FOLDER")
    checks = diagnose(bundle, gallery, variant, backend, device, trust, query_log)
    if detector is not None:
        from upperson_rt.ingest.try_detector import check_detector

        checks += check_detector(
            detector, detector_layout, detector_class, detector_score, picture, sheet
        )
    failed = [check for check in checks if check.status == "fail"]
    if as_json:
        rows = [asdict(check) for check in checks]
        for row in rows:
            del row["exit_code"]
        print_json({"ok": not failed, "checks": rows})
    else:
        table = new_table("check", "", "found")
        for check in checks:
            detail = f"{check.detail} -> {check.fix}" if check.fix else check.detail
            table.add_row(check.name, (check.status, _STYLES[check.status]), detail)
        print_table(table)
    if failed:
        raise typer.Exit(failed[0].exit_code)
