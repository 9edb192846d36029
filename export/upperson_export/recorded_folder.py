"""A folder with a record of its files and their hashes, by which an earlier one is known again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upperson_rt import __version__
from upperson_rt.files import Foreign, all_names, sha256_of_file


def write_record(folder: Path, name: str, kind: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Write the record of a filled folder; return its files as sorted relative POSIX paths.

    Args:
        folder: The folder.
        name: File name of the record.
        kind: What the folder is.
        facts: What else the record says.
    """
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    record = {
        "format": kind,
        "generator": f"upperson {__version__}",
        **facts,
        "files": {file: sha256_of_file(files[file]) for file in sorted(files)},
    }
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / name).write_text(text, "utf-8")
    return tuple(sorted(files))


def foreign_to_record(name: str, kind: str) -> Foreign:
    """Return what tells the files that are not as a record of that kind says, new or changed."""

    def foreign(folder: Path) -> list[str]:
        try:
            record = json.loads((folder / name).read_text("utf-8"))
            written = dict(record["files"]) if record["format"] == kind else None
        except (OSError, ValueError, KeyError, TypeError):
            written = None  # Not a record of ours, so not a folder of ours.
        if written is None:
            return all_names(folder)
        found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        found.pop(name, None)
        return [
            file
            for file, path in found.items()
            if path.is_symlink() or written.get(file) != sha256_of_file(path)
        ]

    return foreign


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
