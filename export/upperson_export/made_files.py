"""Files made from templates, in a folder with a record by which an earlier one is known again."""

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
    """A kind of folder that is written complete or not at all, and replaced if nobody touched it.

    Files that were changed or put beside the recorded ones, such as an engine, are somebody's.
    """

    kind: str
    """What the folder is, as the record says."""

    record: str
    """File name of the record."""

    def require_place(self, output: Path) -> None:
        """Refuse what `create` would refuse, before any work; see `files.require_place`."""
        require_place(output, self._foreign)

    def create(self, output: Path) -> AbstractContextManager[Path]:
        """Give a temporary folder to fill that takes the place of ``output`` in the end.

        Raises:
            InputError: ``output`` holds something else, or cannot be written to.
        """
        return new_folder(output, self._foreign)

    def write_record(self, folder: Path, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """Write the record of a filled folder with more facts of its content.

        Returns:
            Its files as sorted relative POSIX paths.
        """
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

    def _foreign(self, folder: Path) -> list[str]:
        """Return the files that are not as a record of this kind says, new or changed."""
        try:
            record = read_json(folder / self.record)
            written = dict(record["files"]) if record["format"] == self.kind else None
        except (InputError, ValueError, KeyError, TypeError):
            written = None  # Not a record of ours, so not a folder of ours.
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
#
# Whatever a template prints is printable (`upperson_rt.printable`).

_SHARED = Path(__file__).parent / "templates"


def templates(folder: Path = _SHARED) -> jinja2.Environment:
    """Return the templates of a folder; a name that is missing is an error.

    ``*.html.j2`` escape whatever they print, and may extend ``page.html.j2``, the common look.
    Other files print names from outside through the filters ``code``, a code span of Markdown, or
    ``quoted``, a string literal that Python and protobuf's text format both read back unchanged.
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
