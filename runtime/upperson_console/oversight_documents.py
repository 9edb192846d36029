"""Outlines for a data protection officer, filled in from the configuration of a site.

What the program cannot know stays a marked blank.
"""

import datetime
import re
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
from upperson_rt.printable import escape_for_display, local_time
from upperson_rt.strict import read_json

LANGUAGES = ("en", "de")
DOCUMENTS = ("dpia.md", "record-of-processing.md", "sign.md")
_GERMAN = {"export": "Export", "delete": "Löschen", "alert": "neuer Alarm"}
_MARKS = re.compile(r"([\\`*_\[\]<>|#~])")


def site_facts(
    oversight: Oversight, gallery: str | None, bundle: Path | None, token_file: Path | None
) -> dict[str, Any]:
    """Return what the configuration says; what is None stays a blank.

    Raises UppersonError if one of them cannot be read.
    """
    facts: dict[str, Any] = {
        "program": f"upperson-rt {__version__}",
        "date": datetime.date.today().isoformat(),
        "oversight": {**asdict(oversight), "asks_purpose": oversight.asks_purpose},
        "has_clips": False,
        "roles": None,
        "cameras_found": [],
        "model_found": None if bundle is None else _model(bundle),
    }
    if token_file is not None:
        accounts = [one for one in Accounts(token_file).entries() if not one.has_expired()]
        roles = [one.role for one in accounts]
        facts["roles"] = {role: roles.count(role) for role in ("viewer", "operator", "admin")}
        facts["roles"]["limited"] = sum(one.cameras is not None for one in accounts)
        facts["roles"]["expiring"] = sum(one.expires is not None for one in accounts)
    if gallery is not None:
        with Gallery.open(gallery) as opened:
            facts["cameras_found"] = [
                {"name": name, "pictures": info.pictures, "first": local_time(info.first_time)}
                for name, info in sorted(opened.by_camera().items())
            ]
            facts["has_clips"] = opened.crops_dir is not None and any(all_clips(opened.crops_dir))
    return facts


def _model(bundle: Path) -> dict[str, Any]:
    """Return what a bundle states; its ``split`` is None if the report names none."""
    manifest = read_manifest(bundle)
    report = {} if manifest.report is None else read_json(bundle / manifest.report.file)
    split = report.get("split") if isinstance(report, dict) else None
    has_split = isinstance(split, dict) and {"name", "people", "captions"} <= split.keys()
    return {
        **asdict(manifest.model),
        "variant": manifest.default_variant,
        "fingerprint": manifest.fingerprint,
        "metrics": manifest.variants[manifest.default_variant].metrics,
        "split": split if has_split else None,
    }


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
