"""The folder a server format is written to: complete or not at all, and known again later."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jinja2

from upperson_rt import __version__
from upperson_rt.atomic import new_folder
from upperson_rt.bundle import Bundle, sha256_of_file

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


@contextmanager
def serving_folder(output: Path, kind: Format) -> Iterator[Path]:
    """Give a temporary folder to fill that takes the place of ``output`` in the end.

    An earlier result of the same format is replaced if nobody changed it or put a file beside it,
    such as an engine.

    Raises:
        InputError: ``output`` holds something else, or cannot be written to.
    """
    with new_folder(output, is_earlier=partial(_is_untouched, kind=kind)) as folder:
        yield folder


def write_record(folder: Path, output: Path, kind: Format, bundle: Bundle) -> ServingFolder:
    """Write the record of a filled folder, and return what it says."""
    written = (path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in written}
    manifest = bundle.manifest
    record = {
        "format": kind,
        "generator": f"upperson {__version__}",
        "model": manifest.model.name,
        "variant": bundle.variant,
        "precision": bundle.entry.precision,
        "fingerprint": manifest.fingerprint,
        "embed_dim": manifest.model.embed_dim,
        "files": {name: sha256_of_file(files[name]) for name in sorted(files)},
    }
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / RECORD).write_text(text, "utf-8")
    return ServingFolder(
        format=kind,
        folder=output,
        variant=bundle.variant,
        fingerprint=manifest.fingerprint,
        files=tuple(sorted(files)),
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


def _is_untouched(folder: Path, kind: Format) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        written = dict(record["files"]) if record["format"] == kind else None
    except (OSError, ValueError, KeyError, TypeError):
        return False  # Not a record of ours, so not a folder of ours.
    paths = [path for path in folder.rglob("*") if path != folder / RECORD]
    if any(path.is_symlink() for path in paths):
        return False
    found = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    return written == {name: sha256_of_file(path) for name, path in found.items()}
