"""`upperson-rt gallery erase-proof`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.options import Output, Place, Where
from upperson_rt.cli.output import new_table, print_note, print_result, print_table
from upperson_rt.errors import IntegrityError, UsageError
from upperson_rt.printable import count_of

_UNPROVEN = (
    "not proven: photographs indexed where they lie, other copies, the disk below the file "
    "system, the memory of running programs; query logs and delivered alerts keep their lines"
)


@dataclass(frozen=True)
class Erased(OptionGroup, panel="Erasure"):
    """What was erased, and where else to look."""

    erasure: str | None = option(
        None, "Id of an erasure, from erasures.log in the gallery.", metavar="ID"
    )
    backup: list[Path] | None = option(
        None, "Also look into copies of the gallery in this folder. Repeatable.", metavar="FOLDER"
    )


@grouped
def erase_proof(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY...", help="Keys that were erased; for files their paths."),
    ] = None,
    *,
    where: Where,
    erased: Erased,
    place: Place,
    output: Output,
) -> None:
    """Look for deleted pictures in each place that had them; exit code 6 if something is left.

    Without a key, a filter or an id it looks for everything that was ever deleted. The result goes
    into the chained log erasures.log of the gallery. `upperson-rt log verify` checks that log.

    Example: `upperson-rt gallery erase-proof --until 2026-11-01 --backup /mnt/backup`
    """
    from upperson_maintenance.erase_proof import Selection, prove_erasure
    from upperson_rt.gallery.sqlite import SqliteGallery

    passing, both = where.as_filter(), set(keys or ())
    both |= {str(Path(key).absolute()) for key in both}
    selection = Selection(keys=sorted(both), where=passing, erasure=erased.erasure)
    if "://" in place.gallery:
        raise UsageError(
            f"erasures are proven of galleries in folders, not of {place.gallery}",
            code="gallery_not_a_folder",
            gallery=place.gallery,
        )
    with SqliteGallery.open(place.gallery) as store:
        assert isinstance(store, SqliteGallery)
        places = prove_erasure(store, selection, erased.backup or ())
    left = sum(one.left for one in places)
    result = {"gallery": place.gallery, "left": left, "places": [one._asdict() for one in places]}
    print_result(result, output.as_json, _print_places)
    if left:
        raise IntegrityError(
            f"{count_of(left, 'trace')} of what was erased "
            f"{'is' if left == 1 else 'are'} left in gallery '{place.gallery}' or its copies",
            code="erased_left",
            left=left,
        )


def _print_places(result: dict[str, Any]) -> None:
    table = new_table("place", "looked for", "of", "left", "", right=("of", "left"))
    for one in result["places"]:
        numbers = str(one["looked_at"]), str(one["left"])
        table.add_row(
            one["name"], one["looked_for"], *numbers, one["advice"] if one["left"] else ""
        )
    print_table(table)
    print_note(_UNPROVEN)
