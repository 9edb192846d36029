"""``upperson caption-sheet``."""

import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from upperson.cli.options import require_extra
from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.opening import open_model
from upperson_rt.cli.options import Model, Output
from upperson_rt.cli.output import backend_line, print_line, print_note, print_result, print_warning
from upperson_rt.errors import InputError
from upperson_rt.printable import count_of

_SHOWN_SKIPPED = 10


@dataclass(frozen=True)
class Chosen(OptionGroup, panel="Crops"):
    """Which crops are chosen."""

    count: int = option(100, "Crops to describe.", "--count", "-n", min=1, max=1000)
    person_from: Literal["name", "folder", "none"] = option(
        "name",
        "Where a crop's person is read from, of whom one crop is chosen: name, such as "
        "0002_c1s1_000451_03.jpg for person 2 at camera c1; folder, one for each person or track; "
        "none. Any other crop is a person of its own.",
    )
    val_share: float = option(
        0.2, "Share of the crops for the split val, the others are train.", min=0.0, max=0.9
    )


@grouped
def caption_sheet(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Crops, with sub-folders.", show_default=False),
    ],
    page: Annotated[
        Path, typer.Option("--output", help="HTML file to write; never replaced.")
    ] = Path("caption-sheet.html"),
    *,
    chosen: Chosen,
    model: Model,
    output: Output,
) -> None:
    """Choose crops that cover a folder, and make a page to describe them on.

    Open the page in any browser, write a sentence for each crop, and save annotations.jsonl into
    the folder: `upperson train --dataset jsonl --root FOLDER` reads it. The page holds the
    pictures and sends nothing. An annotations.jsonl in the folder is continued: its crops count as
    chosen, and the page saves them, too.

    Example: `upperson caption-sheet crops -n 100 -b bundle --output sheet.html`
    """
    require_extra("train", "the caption sheet")
    _require_new(page)
    from upperson.caption_sheet import TEMPLATES, make_sheet, render_sheet
    from upperson.cli.progress import Display
    from upperson_export.made_files import templates
    from upperson_rt.files import require_writable, write_atomically

    require_writable(page.parent)
    opened = open_model(model)
    opened.backend("image")
    print_note(backend_line(opened, "image"))
    with Display() as display:
        sheet = make_sheet(
            folder,
            opened.encoder(),
            chosen.count,
            person_from=chosen.person_from,
            val_share=chosen.val_share,
            progress=partial(display.update, "embedding crops"),
        )
    content = render_sheet(sheet, templates(TEMPLATES))
    _require_new(page)
    write_atomically(page, content)
    for skipped in sheet.skipped[:_SHOWN_SKIPPED]:
        print_warning(f"skipped: {skipped.reason}")
    if len(sheet.skipped) > _SHOWN_SKIPPED:
        print_warning(f"skipped: {len(sheet.skipped) - _SHOWN_SKIPPED} more unreadable pictures")
    if len(sheet.crops) < chosen.count:
        print_note(
            f"{len(sheet.crops)} instead of {chosen.count}: all other crops show a person who has "
            "one, or nearly equal a chosen crop"
        )
    result = {
        "page": str(page),
        "chosen": len(sheet.crops),
        "crops": sheet.found,
        "captioned": sheet.captioned,
        "skipped": [asdict(skipped) for skipped in sheet.skipped],
        "distance": asdict(sheet.coverage),
        "random_distance": asdict(sheet.random),
    }
    print_result(result, output.as_json, _print_sheet)


def _require_new(page: Path) -> None:
    if os.path.lexists(page):
        raise InputError(
            f"{page} is there already: open it to go on, or name another file with --output",
            code="output_exists",
            path=str(page),
        )


def _print_sheet(result: dict[str, Any]) -> None:
    distance, random = result["distance"], result["random_distance"]
    print_line(
        f"{result['chosen']} of {count_of(result['crops'], 'crop')} in {result['page']}",
        "cosine distance to the nearest chosen crop: mean "
        f"{distance['mean']:.3f}, largest {distance['largest']:.3f} (of random choices "
        f"{random['mean']:.3f} and {random['largest']:.3f})",
    )
