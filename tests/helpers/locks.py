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


def direct_requirements(folder: Path, *extras: str) -> list[Requirement]:
    """The dependencies that a project with these extras names itself."""
    project = read_toml(folder)["project"]
    found, todo = list(map(Requirement, project["dependencies"])), list(extras)
    for extra in todo:
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            if requirement.name == project["name"]:
                todo.extend(requirement.extras - set(todo))
            else:
                found.append(requirement)
    return found
