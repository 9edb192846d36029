"""The score calibration of a bundle and a gallery, as a row of the diagnosis."""

from pathlib import Path

from upperson_rt.bundle import Bundle
from upperson_rt.checks import Check, fail_from_error, ok, warning
from upperson_rt.errors import UppersonError
from upperson_rt.gallery import Gallery
from upperson_rt.printable import safe_repr
from upperson_rt.score_calibration import calibration_in_use, site_calibration_file
from upperson_rt.search.features import is_stale
from upperson_rt.search.shift import FEWEST, Group, compare

_NAME = "score calibration"
_MOST_NAMED = 5
_FIX = "calibrate with  upperson-rt calibrate --annotations FILE"


def check_scores(bundle: Bundle, location: str | Path | None) -> Check:
    """Check that scores are calibrated, and by pictures like those of a gallery if one is given."""
    calibration, source = bundle.calibration, "the bundle"
    groups: list[Group] = []
    count = None
    try:
        if location is not None:
            fingerprint = bundle.manifest.fingerprint
            with Gallery.open(location, fingerprint) as gallery:
                calibration = calibration_in_use(gallery.location, calibration, fingerprint)
                site, count = site_calibration_file(gallery.location), gallery.count()
                if calibration is not None:
                    groups = compare(gallery, calibration.reference)
            if site is not None and site.exists():
                source = "the gallery"
    except UppersonError as error:
        return fail_from_error(_NAME, error)
    if calibration is None:
        found = "the bundle has none: verdicts are uncalibrated"
        return warning(_NAME, found, _FIX, source=None)
    facts = {
        "source": source.removeprefix("the "),
        "version": calibration.version,
        "created": calibration.created,
        "limit": calibration.reference.threshold,
        "groups": [vars(group) for group in groups],
    }
    found = f"of {source}, version {calibration.version}, made {calibration.created[:10]}"
    if is_stale(calibration, bundle.encoder().encode_texts):
        found += "; sentences are weighed by other rules since"
        return warning(_NAME, found, _FIX, **facts)
    unlike = [one for one in groups if one.distance > calibration.reference.threshold]
    if unlike:
        names = ", ".join(map(_shown, unlike[:_MOST_NAMED]))
        more = f" and {len(unlike) - _MOST_NAMED} more" if len(unlike) > _MOST_NAMED else ""
        limit = f"the limit is {calibration.reference.threshold:.3g}"
        found += f"; pictures unlike those it was made with, by distance: {names}{more}; {limit}"
        return warning(_NAME, found, _FIX, **facts)
    if count is not None and count < FEWEST:
        found += f"; a gallery needs {FEWEST} pictures for likelihoods"
    elif groups:
        found += "; the pictures of all cameras are like those it was made with"
    elif count is not None:
        found += "; no camera has enough pictures to be compared"
    return ok(_NAME, found, **facts)


def _shown(group: Group) -> str:
    camera = "no camera" if group.camera is None else safe_repr(group.camera)
    return f"{camera}{' at night' if group.is_night else ''} {group.distance:.3g}"
