"""The table of licences in ``docs/reference/licences.md``.

``python -m tests.helpers.licences``, a part of ``make lock``, makes it anew. Licences are what the
metadata of each package says. A package that is not installed here (for another Python or system)
is fetched into a temporary folder, and read there.
"""

import subprocess
import sys
from importlib.metadata import Distribution, distributions
from tempfile import TemporaryDirectory

from packaging.utils import canonicalize_name

from tests.helpers.command_line import ROOT
from tests.helpers.locks import ALL, EDGE, UNLOCKED, direct_requirements, read_lock

PAGE = ROOT / "docs/reference/licences.md"
HEADING = "## Table\n\n"
COLUMNS = "| package | licence | edge | direct |\n|---|---|---|---|\n"


def expected_rows() -> dict[str, tuple[str, str]]:
    """For each package of the lock files, if the edge has it, and if our project names it."""
    edge = {pin.name for pin in read_lock(EDGE)}
    direct = {canonicalize_name(r.name) for r in direct_requirements("upperson[all]")}
    names = sorted({pin.name for pin in read_lock(ALL)} | UNLOCKED)
    return {name: tuple("yes" if name in x else "" for x in (edge, direct)) for name in names}


def read_table() -> dict[str, list[str]]:
    """The committed table: the other cells by package."""
    lines = PAGE.read_text("utf-8").partition(HEADING + COLUMNS)[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: cells for name, *cells in rows}


def licence_of(distribution: Distribution) -> str:
    """The licence of a package in its metadata's words, or ``""`` if it names none."""
    metadata = distribution.metadata
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier", [])
        if line.startswith("License :: ") and not line.endswith("OSI Approved")
    ]
    stated = str(metadata.get("License", "")).rpartition(" :: ")[2].strip()
    short = stated if 0 < len(stated) < 80 and "\n" not in stated else ""
    return metadata.get("License-Expression") or short or " and ".join(classifiers)


def installed_licences(*folders: str) -> dict[str, str]:
    found = distributions(path=list(folders)) if folders else distributions()
    return {canonicalize_name(one.metadata["Name"]): licence_of(one) for one in found}


def fetched_licences(names: list[str]) -> dict[str, str]:
    """The licence of each of these packages, from a wheel of the package index."""
    with TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        anywhere = ["--ignore-requires-python", "--only-binary", ":all:"]
        subprocess.run([*pip, *anywhere, *names], check=True)
        return installed_licences(folder)


def main() -> None:
    rows, licences = expected_rows(), installed_licences()
    if absent := [name for name in rows if name not in licences]:
        licences |= fetched_licences(absent)
    if unknown := [name for name in rows if not licences[name]]:
        sys.exit(f"error: no licence in the metadata of {', '.join(unknown)}: read their files")
    table = "".join(f"| {n} | {licences[n]} | {' | '.join(cells)} |\n" for n, cells in rows.items())
    page = PAGE.read_text("utf-8").partition(HEADING)[0]
    PAGE.write_text(page + HEADING + COLUMNS + table, "utf-8")


if __name__ == "__main__":
    main()
