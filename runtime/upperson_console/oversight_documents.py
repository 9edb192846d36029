"""Outlines for a data protection officer, filled in from the configuration of a site.

What the program cannot know stays a marked blank.
"""

import datetime
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from upperson_console.accounts import Accounts
from upperson_console.oversight import Oversight
from upperson_rt import __version__
from upperson_rt.bundle import read_manifest
from upperson_rt.errors import InputError
from upperson_rt.files import locked_folder, make_folder, write_atomically
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.clips import all_clips
from upperson_rt.printable import escape_for_display
from upperson_rt.score_calibration import calibration_in_use, read_score_calibration
from upperson_rt.strict import read_json

LANGUAGES = ("en", "de")
DOCUMENTS = ("dpia.md", "record-of-processing.md", "sign.md")
_GERMAN = {"export": "Export", "delete": "Löschen", "alert": "neuer Alarm"}
_MARKS = re.compile(r"([\\`*_\[\]<>|#~])")


def site_facts(
    oversight: Oversight,
    gallery: str | None = None,
    bundle: Path | None = None,
    token_file: Path | None = None,
    keep: Sequence[str] = (),
    blur: bool = False,
) -> dict[str, Any]:
    """Return what the configuration says; what is None stays a blank.

    Raises UppersonError if one of them cannot be read.
    """
    facts: dict[str, Any] = {
        "program": f"upperson-rt {__version__}",
        "date": datetime.date.today().isoformat(),
        "oversight": {**asdict(oversight), "asks_purpose": oversight.asks_purpose},
        "keep": list(keep),
        "blur": blur,
        "roles": {"known": token_file is not None, "wide": False},
        "cameras_found": [],
        "model_found": None if bundle is None else _model(bundle, gallery),
    }
    if token_file is not None:
        accounts = [one for one in Accounts(token_file).entries() if not one.has_expired()]
        roles = [one.role for one in accounts]
        facts["roles"] |= {role: roles.count(role) for role in ("viewer", "operator", "admin")}
        facts["roles"]["limited"] = sum(one.cameras is not None for one in accounts)
        facts["roles"]["expiring"] = sum(one.expires is not None for one in accounts)
    if gallery is not None:
        with Gallery.open(gallery) as opened:
            crops, cameras = getattr(opened, "crops_dir", None), opened.by_camera()
        facts["roles"]["wide"] = crops is not None and any(all_clips(crops))
        for name, info in sorted(cameras.items()):
            first = "-"
            if info.first_time is not None:
                at = datetime.datetime.fromtimestamp(info.first_time, datetime.timezone.utc)
                first = f"{at:%Y-%m-%d}"
            facts["cameras_found"].append({"name": name, "pictures": info.pictures, "first": first})
    return facts


def _model(bundle: Path, gallery: str | None) -> dict[str, Any]:
    manifest = read_manifest(bundle)
    scores = None
    if manifest.scores is not None:
        scores = read_score_calibration(bundle / manifest.scores.file, manifest.fingerprint)
    if gallery is not None:
        scores = calibration_in_use(gallery, scores, manifest.fingerprint)
    report = {} if manifest.report is None else read_json(bundle / manifest.report.file)
    held_out = {} if scores is None else scores.held_out
    variant = manifest.variants[manifest.default_variant]
    return {
        **asdict(manifest.model),
        "variant": manifest.default_variant,
        "fingerprint": manifest.fingerprint,
        "metrics": variant.metrics,
        "held_out": _with(held_out, "all", "queries", "error"),
        "split": _with(report, "split", "name", "people", "captions"),
    }


def _with(content: Any, key: str, *names: str) -> dict[str, Any] | None:
    """Return a part of free JSON that has all of these names; None if there is none."""
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, dict) and {*names} <= found.keys() else None


def write_documents(folder: Path, language: str, facts: dict[str, Any]) -> list[Path]:
    """Write the documents into a folder; return their paths.

    Raises InputError, before anything is written, if one of them is there.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("oversight_templates") / language),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["german"] = _GERMAN.__getitem__
    escaped = _escaped(facts)
    contents = {
        folder / name: environment.get_template(f"{name}.j2").render(escaped).encode("utf-8")
        for name in DOCUMENTS
    }
    make_folder(folder)
    with locked_folder(folder):
        for path in contents:
            if path.exists() or path.is_symlink():
                raise InputError(
                    f"{path} is there already and may have been edited: name another folder",
                    code="file_exists",
                    path=path,
                )
        for path, content in contents.items():
            write_atomically(path, content)
    return [*contents]


def _escaped(value: Any) -> Any:
    """Return values whose texts Markdown shows as they are, on one line."""
    if isinstance(value, str):
        return _MARKS.sub(r"\\\1", escape_for_display(value))
    if isinstance(value, dict):
        return {name: _escaped(one) for name, one in value.items()}
    return [_escaped(one) for one in value] if isinstance(value, list | tuple) else value
