"""``upperson train``."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from upperson.cli.extras import require_extra
from upperson.cli.options import Dataset, Root
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import print_json


def train(
    root: Root,
    dataset: Dataset = "jsonl",
    recipe: Annotated[
        str, typer.Option(help="Named recipe of the package, or a .yaml file.")
    ] = "synthetic",
    base: Annotated[
        str | None, typer.Option(help="upperson-small or a ViT CLIP of open_clip.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Weights of the base: a file or a tag of open_clip.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="New run folder.", show_default="runs/<dataset>/<time>")
    ] = None,
    name: Annotated[str, typer.Option(help="Added to the run folder's name.")] = "run",
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune UP-Person with SDM on a frozen CLIP.

    Options left out come from the recipe.

    Example: `upperson train --root people --recipe synthetic`
    """
    require_extra("train", "training")
    from upperson.cli.progress import Display, TrainingDisplay
    from upperson.config import read_recipe
    from upperson.train import train as run_training

    config = read_recipe(
        recipe,
        {
            "dataset": dataset,
            "root": str(root.absolute()),
            "base": base,
            "pretrained": pretrained,
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "seed": seed,
        },
    )
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    run = output or Path("runs") / dataset / f"{stamp}_{name}"
    with Display() as display:
        result = run_training(config, run, TrainingDisplay(display, config.epochs))
    if json:
        print_json(
            {
                "run": str(run),
                "best_epoch": result.best_epoch,
                "val": result.val and result.val.as_dict(),
                "test": result.test and result.test.as_dict(),
                "seconds": round(result.seconds, 1),
            }
        )
    else:
        typer.echo(f"run {run}: best epoch {result.best_epoch}; next:  upperson export {run}")
