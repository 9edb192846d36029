"""The folder a server format is written to: complete or not at all, and known again later."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from upperson_export.recorded_folder import foreign_to_record, write_record
from upperson_rt.bundle import Bundle
from upperson_rt.files import new_folder, require_place

Format = Literal["triton", "deepstream"]

RECORD = "serving.json"
"""Says where the folder comes from and which files are of it."""

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingFolder:
    """What was written."""

    format: Format
    folder: Path
    variant: str
    fingerprint: str
    files: tuple[str, ...]
    """Relative POSIX paths, sorted, without the record itself."""


def require_serving_place(output: Path, kind: Format) -> None:
    """Refuse what `serving_folder` would refuse, before any work; see `require_place`."""
    require_place(output, foreign_to_record(RECORD, kind))


def serving_folder(output: Path, kind: Format) -> AbstractContextManager[Path]:
    """Give a temporary folder to fill that takes the place of ``output`` in the end.

    An earlier result of the same format is replaced if nobody changed it or put a file beside it,
    such as an engine.

    Raises:
        InputError: ``output`` holds something else, or cannot be written to.
    """
    return new_folder(output, foreign_to_record(RECORD, kind))


def write_serving_record(folder: Path, output: Path, kind: Format, bundle: Bundle) -> ServingFolder:
    """Write the record of a filled folder, and return what it says."""
    manifest = bundle.manifest
    facts = {
        "model": manifest.model.name,
        "variant": bundle.variant,
        "precision": bundle.entry.precision,
        "fingerprint": manifest.fingerprint,
        "embed_dim": manifest.model.embed_dim,
    }
    return ServingFolder(
        format=kind,
        folder=output,
        variant=bundle.variant,
        fingerprint=manifest.fingerprint,
        files=write_record(folder, RECORD, kind, facts),
    )


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package; a name that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = quoted
    return environment.get_template(template).render(**values)


def quoted(text: str) -> str:
    """Return a string literal that Python and protobuf's text format both read back unchanged."""
    return json.dumps(text, ensure_ascii=False)
