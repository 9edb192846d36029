"""`upperson-rt gallery backup` and `upperson-rt gallery restore`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output, Place
from upperson_rt.cli.output import print_line, print_note, print_result, print_warning
from upperson_rt.errors import UsageError
from upperson_rt.printable import count_of, local_time


@grouped
def backup(
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="A new folder, or an earlier backup.")
    ],
    *,
    place: Place,
    output: Output,
) -> None:
    """Copy a gallery that may be in use, or bring an earlier copy of it up to date.

    The copy is a gallery of its own, without the search index. An update copies new rows, crops,
    frames and clips; those that were deleted from the gallery are deleted from the copy. If it is
    interrupted, the earlier copy stays usable. Run it from a timer. Photographs that were indexed
    where they lie are not copied: only their rows are.

    Example: `upperson-rt gallery backup -g gallery /mnt/disk/gallery-backup`
    """
    from upperson_maintenance.backup import back_up

    done = back_up(_folder(place.gallery), destination)
    manifest = done.manifest
    if missing := manifest.missing_crops:
        print_warning(
            f"{count_of(len(missing), 'crop')} that pictures name are missing in the gallery, such "
            f"as {missing[0]}: see  upperson-rt gallery verify"
        )
    if done.pictures_without_crop:
        without = count_of(done.pictures_without_crop, "picture")
        print_note(f"{without} without a saved crop: their files are not part of this backup")
    result = {
        "gallery": place.gallery,
        "destination": str(destination),
        "pictures": manifest.pictures,
        "crops": manifest.crops,
        "missing_crops": len(missing),
        **{name: value for name, value in asdict(done).items() if name != "manifest"},
    }
    print_result(result, output.as_json, _print_backed_up)


@grouped
def restore(
    backup: Annotated[
        Path, typer.Argument(metavar="BACKUP", help="A folder that `gallery backup` has written.")
    ],
    *,
    place: Place,
    output: Output,
) -> None:
    """Compare a backup with its manifest, and make a new gallery of it; no other is replaced.

    Example: `upperson-rt gallery restore /mnt/disk/gallery-backup -g restored`
    """
    from upperson_maintenance.backup import restore as restore_gallery

    manifest = restore_gallery(backup, _folder(place.gallery))
    result = {"gallery": place.gallery, "backup": str(backup)} | {
        name: getattr(manifest, name) for name in ("time", "pictures", "crops")
    }
    restored = (
        f"restored {count_of(manifest.pictures, 'picture')} of {local_time(manifest.time)} to "
        f"gallery '{place.gallery}', checked"
    )
    print_result(result, output.as_json, lambda _: print_line(restored))


def _folder(gallery: str) -> Path:
    if "://" in gallery:
        raise UsageError(
            f"only galleries in folders can be backed up and restored, not {gallery}: use the "
            "server's own backup",
            code="gallery_not_a_folder",
            gallery=gallery,
        )
    return Path(gallery)


def _print_backed_up(result: dict[str, Any]) -> None:
    kind = "updated" if result["is_increment"] else "new"
    print_line(
        f"backup '{result['destination']}' ({kind}): {count_of(result['pictures'], 'picture')}; "
        f"{result['rows_added']} added, {result['rows_removed']} removed; "
        f"{count_of(result['files_copied'], 'file')} copied "
        f"({result['bytes_copied'] / 1e6:.1f} MB), {result['files_removed']} removed"
    )
