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
``upperson.outboxes``    what is committed with rows of a kind of store, see `Gallery.outbox`
``upperson.parts``       chooses and indexes a part of the pictures, a `cli.index.Part`
``upperson.deliveries``  delivers messages of the outbox, by the scheme of an address
``upperson.commands``    a command of ``upperson-rt``
=======================  =========================================================================

Nothing is imported before it is used.
"""

from functools import cache
from importlib import metadata
from typing import Any, Literal, TypeAlias

from upperson_rt.errors import BackendError, UppersonError, UsageError
from upperson_rt.printable import error_text, safe_repr

__all__ = ["Group", "extension_names", "load_extension"]

Group: TypeAlias = Literal[
    "stores", "sources", "detectors", "backends", "outputs", "matchers", "outboxes", "parts",
    "deliveries", "commands",
]  # fmt: skip


def extension_names(group: Group) -> list[str]:
    """Return the names of the installed extensions of a group, sorted."""
    return sorted(_entry_points(group))


def load_extension(group: Group, name: str) -> Any:
    """Import the extension of that name.

    Raises:
        UsageError: There is none, or two installed packages have that name.
        BackendError: It cannot be imported.
    """
    found, fields = _entry_points(group).get(name, []), {"group": group, "name": name}
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


@cache
def _entry_points(group: Group) -> dict[str, list[metadata.EntryPoint]]:
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group=f"upperson.{group}"):
        found.setdefault(point.name, []).append(point)
    return found
