"""The calibration of a site beside its gallery: a new one keeps those before."""

from dataclasses import replace
from pathlib import Path

from upperson_rt.errors import InputError
from upperson_rt.files import write_atomically
from upperson_rt.locks import locked_folder
from upperson_rt.score_calibration import (
    ScoreCalibration,
    read_score_calibration,
    write_score_calibration,
)


def add_site_calibration(path: Path, calibration: ScoreCalibration) -> ScoreCalibration:
    """Write the calibration of a site with the next version, and keep the one before beside it.

    Returns it with its version. One that is there and cannot be read is kept as ``-damaged``.
    """
    with locked_folder(path.parent):
        kept = [
            int(number)
            for one in path.parent.glob(f"{path.stem}-*{path.suffix}")
            if (number := one.stem.removeprefix(f"{path.stem}-")).isdecimal()
        ]
        last = max(kept, default=0)
        if path.exists():
            try:
                before = read_score_calibration(path, calibration.fingerprint).version
                last = max(last, before)
                name = f"{path.stem}-{before}{path.suffix}"
            except InputError:
                name = f"{path.stem}-damaged{path.suffix}"
            write_atomically(path.with_name(name), path.read_bytes())
        made = replace(calibration, version=last + 1)
        write_score_calibration(path, made)
        return made
