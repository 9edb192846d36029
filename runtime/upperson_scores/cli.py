"""`upperson-rt calibrate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.opening import open_store
from upperson_rt.cli.options import Model, Output, Place
from upperson_rt.cli.output import new_table, print_line, print_result, print_table, show_progress
from upperson_rt.errors import InputError

if TYPE_CHECKING:
    from upperson_rt.encoder import Encoder
    from upperson_rt.score_calibration import ScoreCalibration
    from upperson_rt.search.shift import Group


@dataclass(frozen=True)
class Fit(OptionGroup, panel="Calibration"):
    """What is fitted, and on what."""

    annotations: Path | None = option(
        None,
        "Pictures of this site with captions, one JSON object a line (image, pid, caption, "
        "camera), of 20 people at least. Without: only compare the gallery with the calibration.",
        metavar="FILE.jsonl",
    )


@grouped
def calibrate(*, model: Model, place: Place, fit: Fit, output: Output) -> None:
    """Calibrate scores for a site, or show whether the calibration fits a gallery's pictures.

    The calibration is written into the gallery's folder and counts for every later search of it.
    The one before is kept as scores-VERSION.json.

    Example: `upperson-rt calibrate -g gallery --annotations crops/annotations.jsonl`
    """
    from upperson_rt.score_calibration import calibration_in_use, site_calibration_file
    from upperson_rt.search.shift import compare
    from upperson_scores.site_calibration import add_site_calibration

    with open_store(model, place.gallery, "text") as (bundle, _, gallery):
        encoder = bundle.encoder()
        file = site_calibration_file(gallery.location)
        if fit.annotations is None:
            calibration = calibration_in_use(
                gallery.location, encoder.calibration, encoder.fingerprint
            )
        else:
            if file is None:
                raise InputError(
                    f"the gallery {gallery.location} has no folder for a calibration: calibrate a "
                    "gallery in SQLite, or export with captions of this site",
                    code="gallery_has_no_folder",
                )
            calibration = add_site_calibration(file, _fitted(encoder, fit.annotations))
        if calibration is None:
            raise InputError(
                "neither the bundle nor the gallery has a score calibration: name captions of this "
                "site with  --annotations",
                code="no_score_calibration",
            )
        groups = compare(gallery, calibration.reference)
    found = _as_json(calibration, groups, file if file is not None and file.exists() else None)
    print_result(found, output.as_json, _print_report)


def _fitted(encoder: "Encoder", annotations: Path) -> "ScoreCalibration":
    from upperson_scores.annotations import read_annotations
    from upperson_scores.fitting import calibrate

    people = read_annotations(annotations)
    with show_progress() as progress:
        return calibrate(encoder, people, progress)


def _as_json(
    calibration: "ScoreCalibration", groups: "list[Group]", file: Path | None
) -> dict[str, Any]:
    limit = calibration.reference.threshold
    return {
        "file": None if file is None else str(file),
        "version": calibration.version,
        "created": calibration.created,
        "fitted_on": calibration.fitted_on,
        "held_out": calibration.held_out,
        "nobody_below": calibration.nobody_below,
        "limit": limit,
        "groups": [
            {
                "camera": group.camera,
                "at_night": group.is_night,
                "pictures": group.pictures,
                "distance": group.distance,
                "is_unlike": group.distance > limit,
            }
            for group in groups
        ],
    }


def _print_report(found: dict[str, Any]) -> None:
    on = found["fitted_on"]
    place = found["file"] or "of the bundle"
    print_line(
        f"score calibration {place}, version {found['version']}, of {found['created']}",
        f"fitted on {on.get('source')}: {on.get('people')} people, {on.get('queries')} queries",
    )
    figures = ("AUROC", "error", "wrong nobody", "caught")
    table = new_table("sentences", *figures, right=figures)
    for kind in ("all", "short", "two", "caption"):
        if (row := found["held_out"].get(kind)) is not None:
            shares = (row["auroc"], row["error"], row["wrong_nobody"], row["caught_nobody"])
            table.add_row(kind, *(f"{share:.1f}" for share in shares))
    print_table(table)
    for group in found["groups"]:
        name = group["camera"] or "pictures without a camera"
        what = "unlike: its scores are not calibrated" if group["is_unlike"] else "alike"
        night = " at night" if group["at_night"] else ""
        print_line(
            f"{name}{night}: {what} (distance {group['distance']:.2f}, limit {found['limit']:.2f})"
        )
    if not found["groups"]:
        print_line("no camera has 200 pictures yet: nothing to compare")
