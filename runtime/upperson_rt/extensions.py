"""Extensions: what other packages add to the core, found by their entry points.

    [project.entry-points."upperson.stores"]
    memory = "my_package:MemoryGallery"

=======================  =========================================================================
``upperson.stores``      a `Gallery` class, by the scheme of its locations (``memory://...``)
``upperson.sources``     opens a camera source, by the scheme of its address
``upperson.detectors``   makes a detector, by its name or by the suffix of its file
``upperson.backends``    an `upperson_rt.backends.BackendPlugin`, by its name
``upperson.outputs``     gets each committed row, by its name; an `ingest.service.Output`
``upperson.matchers``    compares rows with standing queries, an `ingest.service.Matcher`
``upperson.deliveries``  delivers messages of the outbox, by the scheme of an address
``upperson.commands``    a command of ``upperson-rt``
``upperson.services``    what the core itself calls of the packages beside it, see `load_service`
=======================  =========================================================================

Nothing is imported before it is used.
"""

from functools import cache
from importlib import metadata
from typing import Any, Literal, TypeAlias, get_args

from upperson_rt.errors import BackendError, UppersonError, UsageError
from upperson_rt.printable import error_text, safe_repr

__all__ = ["Group", "extension_names", "load_extension", "load_service", "missing_files"]

Group: TypeAlias = Literal[
    "stores",
    "sources",
    "detectors",
    "backends",
    "outputs",
    "matchers",
    "deliveries",
    "commands",
    "services",
]
Service: TypeAlias = Literal[
    "autotuner",
    "erasure-log",
    "outbox",
    "photo-decoder",
    "query-log",
    "shard",
    "sheet",
    "signature",
]


def extension_names(group: Group) -> list[str]:
    """Return the names of the installed extensions of a group, sorted."""
    return sorted(_named(group))


def load_extension(group: Group, name: str) -> Any:
    """Import the extension of that name.

    Raises:
        UsageError: There is none, or two installed packages have that name.
        BackendError: It cannot be imported.
    """
    found, fields = _named(group).get(name, []), {"group": group, "name": name}
    shown = f"{safe_repr(name)} in upperson.{group}"
    if not found:
        known = ", ".join(extension_names(group)) or "none is installed"
        message = f"no extension {shown}: expected one of them ({known})"
        raise UsageError(message, code="extension_not_found", **fields)
    if len({point.value for point in found}) > 1:
        values = " and ".join(sorted(point.value for point in found))
        message = f"{values} are both installed as {shown}: uninstall one"
        raise UsageError(message, code="extension_twice", **fields)
    try:
        return found[0].load()
    except UppersonError:
        raise
    except Exception as error:  # Code of another package: it may raise anything.
        message = f"the extension {found[0].value} of upperson.{group} cannot be imported "
        message += f"({error_text(error)}): install what it needs, or uninstall it"
        raise BackendError(message, code="extension_broken", **fields) from error


def load_service(name: Service) -> Any:
    """Import what the core calls of another package of the same wheel.

    Raises:
        BackendError: The package is missing (``service_missing``) or cannot be imported.
        UsageError: Another package has that name, too.
    """
    if name not in _named("services"):
        raise missing_files(name)
    return load_extension("services", name)


def missing_files(name: str) -> BackendError:
    """Return the error for what belongs to this distribution and is not installed with it."""
    message = f"no {name} is found: files of this installation are missing, run  pip install "
    message += "--force-reinstall --no-deps upperson-rt"
    return BackendError(message, code="service_missing", name=name)


def _named(group: Group) -> dict[str, list[metadata.EntryPoint]]:
    return _entry_points().get(group, {})


@cache
def _entry_points() -> dict[Group, dict[str, list[metadata.EntryPoint]]]:
    """Read those of all groups, by group and name: that opens a file of each installed package."""
    points = metadata.entry_points()
    found: dict[Group, dict[str, list[metadata.EntryPoint]]] = {}
    for group in get_args(Group):
        named = found.setdefault(group, {})
        for point in points.select(group=f"upperson.{group}"):
            named.setdefault(point.name, []).append(point)
    return found
