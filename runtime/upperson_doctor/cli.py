"""`upperson-rt doctor`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.options import (
    Backend,
    Detection,
    Output,
    default_bundle,
    default_gallery,
    require_sheet,
)
from upperson_rt.cli.output import new_table, print_note, print_result, print_table

if TYPE_CHECKING:
    from upperson_rt.checks import Check


_CONSOLE_LOG = Path("console/query.log")
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Checked(OptionGroup, panel="Model and gallery"):
    """What is checked besides the installation."""

    bundle: Path | None = option(
        None,
        "Bundle to check.",
        "--bundle",
        "-b",
        envvar="UPPERSON_BUNDLE",
        show_default="./bundle, if it is there",
    )
    gallery: str | None = option(
        None,
        "Gallery to check.",
        "--gallery",
        "-g",
        envvar="UPPERSON_GALLERY",
        metavar="FOLDER|ADDRESS",
        show_default="./gallery, if it is there",
    )
    query_log: Path | None = option(
        None,
        "Query log whose lines are verified.",
        envvar="UPPERSON_QUERY_LOG",
        metavar="FILE",
        show_default="console/query.log if it is there",
    )

    def found(self) -> tuple[Path | None, str | None, Path | None]:
        """Return bundle, gallery and log, by default those of the working folder."""
        from upperson_log.chain import head_of

        bundle, gallery, log = self.bundle, self.gallery, self.query_log
        if bundle is None and default_bundle.exists():
            bundle = default_bundle
        if gallery is None and Path(default_gallery).exists():
            gallery = default_gallery
        if log is None and (head_of(_CONSOLE_LOG).exists() or _CONSOLE_LOG.exists()):
            log = _CONSOLE_LOG
        return bundle, gallery, log


@dataclass(frozen=True)
class Trial(Detection):
    """A detector to try, and on what."""

    image: Path | None = option(
        None,
        "Picture that the detector is tried on.",
        metavar="FILE",
        show_default="three drawn figures, which not every detector takes for people",
    )
    sheet: Path | None = option(
        None,
        "Draw the boxes it finds into a picture: red, or grey if too small to be stored; thin "
        "green ones are the figures'.",
        metavar="FILE.png",
    )

    def checks(self) -> "list[Check]":
        """Try the detector, if one is named."""
        if self.detector is None:
            return []
        from upperson_doctor.try_detector import check_detector

        return check_detector(
            self.detector,
            self.detector_layout,
            self.detector_class,
            self.detector_score,
            self.image,
            self.sheet,
            self.detector_input,
        )


@grouped
def doctor(*, checked: Checked, backend: Backend, trial: Trial, output: Output) -> None:
    """Check the installation, the bundle and the gallery, and say how to fix what is wrong.

    With --detector, also its layout, input, class and backend, and what it finds in a picture.

    Example: `upperson-rt doctor --detector yolox.onnx --image street.jpg --sheet boxes.png`
    """
    trial.require_no_options()
    if trial.sheet is not None:
        require_sheet(trial.sheet)
    from upperson_doctor.diagnosis import diagnose

    bundle, gallery, query_log = checked.found()
    for name, given in {"bundle": bundle, "gallery": gallery}.items():
        if given is None:
            print_note(f"no {name} here to check: name one with  --{name} FOLDER")
    checks = diagnose(
        bundle,
        gallery,
        backend.variant,
        backend.backend,
        backend.device,
        backend.trust,
        query_log,
    )
    checks += trial.checks()
    failed = [check for check in checks if check.status == "fail"]
    rows = [asdict(check) for check in checks]
    for row in rows:
        del row["exit_code"]
    result = {"ok": not failed, "checks": rows}
    print_result(result, output.as_json, lambda _: _print_checks(checks))
    if failed:
        raise typer.Exit(failed[0].exit_code)


def _print_checks(checks: "list[Check]") -> None:
    table = new_table("check", "status", "found")
    for check in checks:
        detail = f"{check.detail} -> {check.fix}" if check.fix else check.detail
        table.add_row(check.name, (check.status, _STYLES[check.status]), detail)
    print_table(table)
