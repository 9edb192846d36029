"""`upperson-rt oversight`."""

from pathlib import Path
from typing import Annotated

import typer

from upperson_console.cli import require_packages
from upperson_maintenance.cli.retention import read_retention
from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output, age_seconds
from upperson_rt.cli.output import print_line, print_note, print_result
from upperson_rt.errors import UsageError

app = new_app("Write outlines for data protection officers.")


@app.callback()
def oversight() -> None:
    """Write outlines for data protection officers."""


@app.command(cls=Command)
@grouped
def templates(
    *,
    file: Annotated[
        Path, typer.Option("--oversight", metavar="FILE", help="As given to  upperson-rt serve.")
    ],
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the outlines go.")
    ],
    gallery: Annotated[
        str | None, typer.Option("--gallery", "-g", help="Its cameras are listed.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", help="Its model and accuracy are stated.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="Its accounts are counted.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="[CAMERA=]AGE",
            help="Retention in force, as given to  upperson-rt serve; repeatable.",
        ),
    ] = None,
    bin: Annotated[
        str | None,
        typer.Option(
            "--bin",
            metavar="AGE",
            help="How long deleted pictures can be restored, as given to  upperson-rt serve.",
        ),
    ] = None,
    blur: Annotated[bool, typer.Option("--blur", help="If  serve  runs with it.")] = False,
    language: Annotated[str, typer.Option("--language", help="en or de.")] = "en",
    output: Output,
) -> None:
    """Write outlines of a DPIA, a record of processing and a sign, filled from the configuration.

    What the program cannot know stays a marked blank. No file is replaced. The texts are no legal
    advice: have counsel check them.

    Example: `upperson-rt oversight templates --oversight oversight.yaml -g gallery -o dpia`
    """
    require_packages("writing outlines")
    from upperson_console.oversight import read_oversight
    from upperson_console.oversight_documents import LANGUAGES, site_facts, write_documents

    if language not in LANGUAGES:
        raise UsageError(
            f"--language takes {' or '.join(LANGUAGES)}", code="language_unknown", found=language
        )
    read_retention(keep or (), None)  # Refuses what  serve  would refuse.
    if bin not in (None, "0"):
        age_seconds(bin)
    facts = site_facts(read_oversight(file), gallery, bundle, token_file)
    facts |= {"keep": keep or [], "bin": bin, "blur": blur}
    written = write_documents(folder, language, facts)
    files = [str(path) for path in written]
    print_result({"files": files}, output.as_json, lambda _: print_line(*files))
    print_note("no legal advice: fill in the blanks, and have counsel check the texts")
