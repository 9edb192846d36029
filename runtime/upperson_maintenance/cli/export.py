"""`upperson-rt gallery export`."""

from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output, Place, Where
from upperson_rt.cli.output import print_line, print_notices, print_result
from upperson_rt.printable import count_of
from upperson_rt.search.notices import unknown_cameras


@grouped
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="New, or an earlier export, which is replaced.")
    ],
    *,
    place: Place,
    where: Where,
    output: Output,
) -> None:
    """Write vectors.npy, items.csv and gallery.json; with pyarrow installed also items.parquet.

    Example: `upperson-rt gallery export exported/ --camera gate`
    """
    from upperson_maintenance.export import export_gallery
    from upperson_rt.gallery import Gallery

    passing = where.as_filter()
    with Gallery.open(place.gallery) as store:
        print_notices(unknown_cameras(store, passing))
        done = export_gallery(store, folder, passing)
    names = [path.name for path in done.files]
    exported = f"exported {count_of(done.items, 'picture')} to {folder}: {', '.join(names)}"
    print_result(
        {"gallery": place.gallery, "items": done.items, "folder": str(folder), "files": names},
        output.as_json,
        lambda _: print_line(exported),
    )
