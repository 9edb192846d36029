"""The lock files of ``deploy/``, and the table of licences that follows from them."""

import re
from importlib.metadata import distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.command_line import ROOT
from tests.helpers.licences import expected_rows, licence_of, read_table
from tests.helpers.locks import (
    ALL,
    BUILD,
    EDGE,
    UNLOCKED,
    build_requirements,
    direct_requirements,
    read_lock,
)

EXTRAS = re.search(r"^EDGE := (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1]
LOCKS = {
    EDGE: direct_requirements(f"upperson-rt[{','.join(EXTRAS.split())}]"),
    ALL: direct_requirements("upperson[all]"),
    BUILD: build_requirements(),
}
ENVIRONMENTS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "platform_machine": machine,
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    for python in ("3.10", "3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
    for system in ("linux", "darwin")
]


def chosen(path, environment):
    """The release of each package that one environment gets."""
    pins = [pin for pin in read_lock(path) if pin.applies(environment)]
    versions = {pin.name: pin.version for pin in pins}
    assert len(versions) == len(pins), "two releases of one package"
    return versions


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_line_pins_one_release_by_hash(path):
    assert "://" not in path.read_text("utf-8")
    for pin in read_lock(path):
        (specifier,) = pin.requirement.specifier
        assert (specifier.operator, pin.requirement.url) == ("==", None), pin
        assert "+" not in pin.version, pin
        assert pin.hashes, pin
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in pin.hashes), pin


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_the_locks_are_of_todays_requirements(path):
    """If this fails after a change of a pyproject.toml, run ``make lock``."""
    for environment in ENVIRONMENTS:
        versions = chosen(path, environment)
        for requirement in LOCKS[path]:
            name = canonicalize_name(requirement.name)
            if name not in UNLOCKED:
                assert name in versions, f"{path.name} lacks {requirement}: run  make lock"
                assert requirement.specifier.contains(versions[name], prereleases=True), name


def test_the_edge_has_the_releases_of_the_whole():
    for environment in ENVIRONMENTS:
        assert chosen(EDGE, environment).items() <= chosen(ALL, environment).items()
        assert not UNLOCKED & chosen(ALL, environment).keys()


def test_what_the_locked_packages_need_is_locked():
    """Of those that are installed here in the locked release."""
    locked = chosen(ALL, {})
    same = [one for one in distributions() if named(one) in locked]
    same = [one for one in same if locked[named(one)] == one.version]
    for distribution in same:
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                name = canonicalize_name(requirement.name)
                assert name in locked.keys() | UNLOCKED, f"{named(distribution)}: {requirement}"


def named(distribution):
    return canonicalize_name(distribution.metadata["Name"])


def test_the_table_of_licences_is_of_the_locks():
    table = read_table()
    assert {name: tuple(cells[1:]) for name, cells in table.items()} == expected_rows()
    versions = {(pin.name, pin.version) for pin in read_lock(ALL)}
    for distribution in distributions():
        if (named(distribution), distribution.version) in versions:
            assert table[named(distribution)][0] == licence_of(distribution)
    assert all(cells[0] for cells in table.values())
