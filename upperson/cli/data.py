"""``upperson data``: make data sets."""

from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import print_json

app = new_app("Make data sets.")


@app.callback()
def _group() -> None:
    """Make data sets."""


@app.command(cls=Command)
def synthesize(
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    look: Annotated[str, typer.Option(help="studio or street.")] = "street",
    train_ids: Annotated[int, typer.Option(min=0, help="People in the train split.")] = 500,
    val_ids: Annotated[int, typer.Option(min=0, help="People in the val split.")] = 100,
    test_ids: Annotated[int, typer.Option(min=0, help="People in the test split.")] = 300,
    views: Annotated[int, typer.Option(min=1, help="Pictures of each person.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal files.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Render synthetic people with captions, in the project's jsonl format.

    Example: `upperson data synthesize people --look street --train-ids 500`
    """
    from upperson.cli.progress import Display
    from upperson.data.synthetic import SyntheticSpec, write_dataset

    spec = SyntheticSpec(
        look=look,
        train_ids=train_ids,
        val_ids=val_ids,
        test_ids=test_ids,
        views=views,
        seed=seed,
    )
    with Display() as display:
        write_dataset(
            output, spec, lambda done, total: display.update("rendering people", done, total)
        )
    images = (train_ids + val_ids + test_ids) * views
    if json:
        print_json({"root": str(output), "images": images})
    else:
        typer.echo(f"{images} images of {images // views} people in {output}")
