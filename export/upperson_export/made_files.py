"""Folders with a record of their files, and the templates that files are made from."""

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from upperson_rt import __version__
from upperson_rt.errors import InputError
from upperson_rt.files import all_names, new_folder, require_place, sha256_of_file
from upperson_rt.printable import code_span, show_text
from upperson_rt.strict import read_json


@dataclass(frozen=True, slots=True)
class RecordedFolder:
    """A kind of folder that is written complete or not at all, and replaced only if unchanged.

    A file that was changed or added, such as an engine, is unowned: the folder then stays.
    """

    kind: str
    """Format of the folder, as the record has it."""
    record: str

    def require_place(self, output: Path) -> None:
        """Refuse what `create` would refuse, before any work; see `files.require_place`."""
        require_place(output, self._unowned)

    def create(self, output: Path) -> AbstractContextManager[Path]:
        """Return a temporary folder to fill, which replaces ``output`` in the end."""
        return new_folder(output, self._unowned)

    def write_record(self, folder: Path, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """Write the record of a filled folder; return its files as sorted relative POSIX paths."""
        files = _files(folder)
        record = {
            "format": self.kind,
            "generator": f"upperson {__version__}",
            **facts,
            "files": {name: sha256_of_file(files[name]) for name in sorted(files)},
        }
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / self.record).write_text(text, "utf-8")
        return tuple(sorted(files))

    def _unowned(self, folder: Path) -> list[str]:
        """Return the files that are new or changed since the record of this kind was written."""
        try:
            record = read_json(folder / self.record)
            written = dict(record["files"]) if record["format"] == self.kind else None
        except (InputError, ValueError, KeyError, TypeError):
            written = None  # Another record, so another folder.
        if written is None:
            return all_names(folder)
        return [
            name
            for name, path in _files(folder).items()
            if name != self.record
            and (path.is_symlink() or written.get(name) != sha256_of_file(path))
        ]


def _files(folder: Path) -> dict[str, Path]:
    """Return files and links by relative POSIX path."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


# --- Files from templates: HTML escapes all that it prints, Markdown prints outside names as code

_SHARED = Path(__file__).parent / "templates"


def templates(folder: Path = _SHARED) -> jinja2.Environment:
    """Return the templates of a folder; a missing name is an error.

    All values are printable (`upperson_rt.printable`). ``*.html.j2`` escape them, and may extend
    ``page.html.j2``. Other files print names from outside through the filters ``code``, a code span
    of Markdown, or ``quoted``, a string literal of Python and of protobuf's text format.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _SHARED]),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        finalize=show_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code_span
    environment.filters["quoted"] = _quoted
    return environment


def _quoted(text: str) -> str:
    # What `show_text` would write as \x85 is one byte to protobuf, and \u0085 a character to both.
    literal = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", literal)
