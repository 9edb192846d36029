"""`upperson-rt gallery ...`."""

from dataclasses import asdict

import typer
from rich.text import Text

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.options import Debug, GalleryOption, Json, default_gallery
from upperson_rt.cli.output import local_time, new_table, print_json, print_table
from upperson_rt.errors import IntegrityError

__all__ = ["app"]

app = new_app("Look into a gallery.")


@app.command(cls=Command)
def info(
    gallery: GalleryOption = default_gallery, json: Json = False, debug: Debug = False
) -> None:
    """Show what a gallery holds; needs no bundle.

    Example: `upperson-rt gallery info -g gallery`
    """
    from upperson_rt.gallery import Gallery

    with Gallery.open(gallery) as store:
        found = store.info()
    if json:
        print_json(asdict(found))
        return
    period = f"{local_time(found.first_time)} to {local_time(found.last_time)}"
    table = new_table("gallery", found.location)
    for name, value in {
        "pictures": str(found.items),
        "cameras": _counts(found.cameras),
        "taken": "unknown" if found.first_time is None else period,
        "variants": _counts(found.variants),
        "dimensions": str(found.embed_dim),
        "model": found.fingerprint,
        "size": "not known" if found.size_bytes is None else f"{found.size_bytes / 1e6:.1f} MB",
        "created": f"{found.created} by {found.generator}",
    }.items():
        table.add_row(name, Text(value))
    print_table(table)


@app.command(cls=Command)
def verify(
    gallery: GalleryOption = default_gallery, json: Json = False, debug: Debug = False
) -> None:
    """Read a whole gallery and check it; exit code 6 if anything is wrong.

    Example: `upperson-rt gallery verify -g gallery`
    """
    from upperson_rt.gallery import Gallery

    with Gallery.open(gallery) as store:
        problems = store.verify()
        items = store.count()
    if json:
        print_json(
            {"gallery": str(gallery), "items": items, "ok": not problems, "problems": problems}
        )
    elif not problems:
        typer.echo(f"gallery {gallery} is sound: {items} pictures")
    if problems:
        for problem in problems:
            typer.echo(problem, err=True)
        raise IntegrityError(
            f"gallery {gallery} has {len(problems)} problems (listed above): restore it from a "
            "copy, or index those pictures again"
        )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none given"
