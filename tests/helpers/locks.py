"""The lock files of ``deploy/``, as the tests and the table of licences read them."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.command_line import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ALL = ROOT / "deploy" / "requirements-all.txt"
BUILD = ROOT / "deploy" / "requirements-build.txt"
EDGE = ROOT / "deploy" / "requirements-edge.txt"
PROJECTS = {"upperson": ROOT, "upperson-rt": ROOT / "runtime"}
"""The folder of each distribution's pyproject.toml."""
UNLOCKED = {"torch", "torchvision"}
"""Which build of these fits depends on the machine, so they stay ranges."""


@dataclass(frozen=True)
class Pin:
    """One release of one package, for the environments that its marker names."""

    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        return str(self.requirement.specifier).removeprefix("==")

    def applies(self, environment: dict[str, str]) -> bool:
        marker = self.requirement.marker
        return marker is None or marker.evaluate(environment)


def read_lock(path: Path) -> list[Pin]:
    """Read a requirements file with hashes; a line that is anything else is an error."""
    text = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
    pins = []
    for line in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = line.split(" --hash=")
        pins.append(Pin(Requirement(requirement), tuple(map(str.strip, hashes))))
    return pins


def read_toml(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))


def build_requirements() -> list[Requirement]:
    """What a wheel of ours is built with."""
    return list(map(Requirement, read_toml(ROOT)["build-system"]["requires"]))


def direct_requirements(requirement: str) -> list[Requirement]:
    """The packages of others that our distributions name, for one such as ``upperson[all]``."""
    todo, found, seen = [Requirement(requirement)], [], set()
    for one in todo:
        if one.name not in PROJECTS:
            found.append(one)
            continue
        project = read_toml(PROJECTS[one.name])["project"]
        tables = {"": project["dependencies"], **project["optional-dependencies"]}
        for extra in {"", *one.extras}:
            if (one.name, extra) not in seen:
                seen.add((one.name, extra))
                todo.extend(map(Requirement, tables[extra]))
    return found
