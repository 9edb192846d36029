"""Packages of extensions, found as if they were installed, without touching the environment."""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.command_line import ROOT
from tests.helpers.locks import read_toml
from upperson_rt import extensions

EXAMPLES = ROOT / "docs" / "examples" / "extensions"


@contextmanager
def installed(
    folder: Path, entry_points: Mapping[str, Mapping[str, str]], *code: Path
) -> Iterator[None]:
    """Register entry points, by group and name, in a temporary folder; find code in others."""
    place = Path(tempfile.mkdtemp(dir=folder))
    info = place / f"{place.name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.stem}\nVersion: 0\n")
    lines = [
        line
        for group, points in entry_points.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    added = [str(place), *map(str, code)]
    sys.path[:0] = added
    extensions._entry_points.cache_clear()
    try:
        yield
    finally:
        for path in added:
            sys.path.remove(path)
        extensions._entry_points.cache_clear()


@contextmanager
def examples(folder: Path) -> Iterator[None]:
    """Have the package of docs/examples/extensions installed."""
    project = read_toml(EXAMPLES)["project"]
    with installed(folder, project["entry-points"], EXAMPLES):
        yield
