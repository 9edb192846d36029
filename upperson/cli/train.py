"""``upperson train``."""

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson.cli.extras import require_extra
from upperson.cli.options import DATASET_HELP
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import print_json, print_table
from upperson_rt.errors import InputError, UsageError
from upperson_rt.files import write_atomically

if TYPE_CHECKING:
    from upperson.config import TrainConfig

SEEDS = "seeds.json"
SEEDS_PLAN = "seeds.yaml"


def train(
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder of the data set.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help=DATASET_HELP, show_default="jsonl")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="cuhk-pedes, icfg-pedes or rstpreid, each also with -vit-l-14; synthetic; or a "
            ".yaml file.",
            show_default="the data set's own, else synthetic",
        ),
    ] = None,
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
    batch_size: Annotated[
        int | None, typer.Option(help="Pairs of a step, over all processes.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="sdm, itc, cmpm, id, or several joined by +.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    select_on: Annotated[
        str | None, typer.Option(help="Split that chooses the best epoch: val or test.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode images.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other key of a recipe, as KEY=VALUE; see docs/training.md."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs with seeds counting up; mean and spread.")
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[
        Path | None, typer.Option(help="Run folder of an interrupted run.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print data, parameters, steps and memory; stop.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune UP-Person on a frozen CLIP.

    Options left out come from the recipe. Several GPUs: start it with torchrun or accelerate
    launch (docs/training.md).

    Example: `upperson train --root people --recipe synthetic`
    """
    require_extra("train", "training")
    overrides = {
        "base": base,
        "pretrained": pretrained and _absolute_file(pretrained),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "loss": loss,
        "precision": precision,
        "select_on": select_on,
        "workers": workers,
        "seed": seed,
    }
    if resume is not None:
        given = [key for key, value in overrides.items() if value is not None]
        if given or settings or root or dataset or recipe or output or seeds > 1 or dry_run:
            raise UsageError(
                "--resume takes everything from the run: leave out other options than --device"
            )
        _resume(resume, device, json)
        return
    if root is None:
        raise UsageError("--root is missing: pass the folder of the data set")
    dataset = dataset or "jsonl"
    config = _config(recipe, dataset, root, overrides, settings or ())
    if dry_run:
        _dry_run(config, device, json)
        return
    if output is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--output is missing: several processes must agree on the run folder")
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    run = output or Path("runs") / dataset / f"{stamp}_{name}"
    if seeds == 1:
        _train_one(config, run, device, json)
    elif run.is_dir() and any(run.iterdir()):
        raise InputError(f"{run} is not empty: choose another --output, or  --resume {run}")
    else:
        _train_seeds(config, run, seeds, device, json)


def _config(
    recipe: str | None,
    dataset: str,
    root: Path,
    overrides: dict[str, Any],
    settings: Sequence[str],
) -> "TrainConfig":
    from upperson.recipe import read_recipe, recipe_names

    recipe = recipe or (dataset if dataset in recipe_names() else "synthetic")
    facts = {"dataset": dataset, "root": str(root.absolute())}
    return read_recipe(recipe, overrides | facts, settings)


def _dry_run(config: "TrainConfig", device: str, json: bool) -> None:
    from upperson.cli.plan_table import render
    from upperson.engine import check_precision, choose_device
    from upperson.plan import LEFT_OUT, plan
    from upperson.setup import set_up

    check_precision(config.precision, choose_device(device))
    setup = set_up(config)
    classifier = sum(parameter.numel() for parameter in setup.objective.parameters())
    planned = plan(
        config,
        setup.splits,
        setup.model,
        tokenizer=setup.tokenizer,
        extra_parameters={"classifier": classifier} if classifier else None,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
    )
    if not _is_main_process():
        return
    if json:
        print_json(planned.as_dict())
        return
    for table in render(planned):
        print_table(table)
    typer.echo(f"not in the sum: {LEFT_OUT}")


def _absolute_file(pretrained: str) -> str:
    """Keep a tag; make a file's path independent of the working folder, for later commands."""
    path = Path(pretrained)
    return str(path.absolute()) if path.exists() else pretrained


def _resume(run: Path, device: str, json: bool) -> None:
    from upperson.recipe import read_config, read_seeds
    from upperson.run import CONFIG

    if (run / SEEDS_PLAN).is_file():
        config, seeds = read_seeds(run / SEEDS_PLAN)
        _train_seeds(config, run, seeds, device, json)
        return
    if not (run / CONFIG).is_file():
        raise UsageError(
            f"--resume wants a run folder with {CONFIG}, found none in {run}: pass the folder "
            "that  upperson train  was writing"
        )
    _train_one(read_config(run / CONFIG), run, device, json, resume=True)


def _train_one(
    config: "TrainConfig", run: Path, device: str, json: bool, *, resume: bool = False
) -> None:
    results = _run(config, run, device, resume=resume)
    if not _is_main_process():
        return
    if json:
        print_json({"run": str(run), **results})
    else:
        typer.echo(
            f"run {run}: best epoch {results['best_epoch']}, selected on "
            f"{results['selected_on']}; next:  upperson export {run}"
        )


def _train_seeds(config: "TrainConfig", run: Path, seeds: int, device: str, json: bool) -> None:
    import json as json_module

    from upperson.cli.seeds_table import seeds_table
    from upperson.recipe import seeds_yaml
    from upperson.run import CONFIG
    from upperson.seeds import summarise

    if _is_main_process():
        write_atomically(run / SEEDS_PLAN, seeds_yaml(config, seeds))
    results = []
    for seed in range(config.seed, config.seed + seeds):
        folder = run / f"seed_{seed}"
        begun = (folder / CONFIG).is_file()
        results.append(_run(replace(config, seed=seed), folder, device, resume=begun))
    if not _is_main_process():
        return
    summary = summarise(results)
    write_atomically(run / SEEDS, json_module.dumps(summary, indent=2) + "\n")
    if json:
        print_json({"run": str(run), "seeds": summary})
    else:
        print_table(seeds_table(summary))
        typer.echo(f"{seeds} runs in {run}; next:  upperson export {run}/seed_{config.seed}")


def _run(config: "TrainConfig", run: Path, device: str, *, resume: bool = False) -> dict[str, Any]:
    """Train and return the content of results.json; empty outside the main process."""
    import json as json_module

    from upperson.cli.progress import Display, TrainingDisplay
    from upperson.run import CONFIG, RESULTS
    from upperson.train import train as run_training

    with Display() as display:
        observer = TrainingDisplay(display, config.epochs)
        try:
            run_training(config, run, observer, device=device, resume=resume)
        except KeyboardInterrupt:
            if _is_main_process() and (run / CONFIG).is_file():
                display.say(f"stopped; go on with:  upperson train --resume {run}")
            raise
    if not _is_main_process():
        return {}
    results: dict[str, Any] = json_module.loads((run / RESULTS).read_text("utf-8"))
    return results


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
