"""``upperson train`` and ``upperson pretrain-small``."""

import json
import os
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson.cli.options import DATASET_HELP, TrainingDevice, is_main_process, require_extra
from upperson_rt.cli.groups import OptionGroup, advanced, grouped, option
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import (
    PlainTable,
    new_table,
    print_json,
    print_line,
    print_note,
    print_table,
    print_warning,
)
from upperson_rt.errors import InputError, UsageError
from upperson_rt.files import remove_unfinished, unfinished, write_atomically
from upperson_rt.printable import count_of

if TYPE_CHECKING:
    from upperson.config import TrainConfig
    from upperson.plan import Plan
    from upperson.seeds import SeedsPlan


@dataclass(frozen=True)
class Data(OptionGroup, panel="Data"):
    """The data set."""

    root: Path | None = option(None, "Folder of the data set.", show_default=False)
    dataset: str | None = option(None, DATASET_HELP, show_default="jsonl")
    allow_partial: bool = advanced(False, "Train on an incomplete copy of a published data set.")
    workers: int | None = advanced(None, "Processes that decode images.")
    cache: Path | None = advanced(
        None, "Folder for decoded and resized images; 5 GB for CUHK-PEDES.", show_default=False
    )


@dataclass(frozen=True)
class Recipe(OptionGroup, panel="Recipe and model"):
    """The recipe, and what replaces its settings; None leaves the recipe's own."""

    recipe: str | None = option(
        None,
        "cuhk-pedes, icfg-pedes or rstpreid, each also with -vit-l-14; "
        "cuhk-pedes-code-2024 or -2025; site; synthetic; or a .yaml file.",
        show_default="the data set's own, else synthetic",
    )
    base: str | None = option(
        None, "upperson-small, a ViT CLIP of open_clip, or the .json file of one."
    )
    pretrained: str | None = option(None, "Weights of the base: a file or a tag of open_clip.")
    epochs: int | None = option(None, "Passes over the training split.")
    batch_size: int | None = option(None, "Pairs in a step, over all processes.")
    lr: float | None = advanced(None, "Peak learning rate.")
    loss: str | None = advanced(None, "sdm, asdm, tal, itc, cmpm, id, or several joined by +.")
    precision: str | None = advanced(None, "fp32, bf16 or fp16.")
    select_on: str | None = advanced(None, "Split that selects the best epoch: val or test.")
    init_from: Path | None = advanced(
        None, "Run over the same base whose trained tensors to start from.", show_default=False
    )
    rehearse: Path | None = advanced(
        None,
        "Data set of other people to train on as well, see docs/how-to/site.md.",
        show_default=False,
    )
    seed: int | None = advanced(None, "Random seed of the run.")
    seeds: int = advanced(
        1, "Number of runs with consecutive seeds; reports mean and spread.", min=1
    )
    settings: list[str] | None = advanced(
        None, "Any other key of a recipe, as KEY=VALUE; see docs/reference/training.md.", "--set"
    )

    def as_config(self, data: Data) -> "TrainConfig":
        """Read the recipe with all overrides."""
        from upperson.config import read_recipe, recipe_names

        dataset = data.dataset or "jsonl"
        recipe = self.recipe or (dataset if dataset in recipe_names() else "synthetic")
        base = self.base
        plain = ("epochs", "batch_size", "lr", "loss", "precision", "select_on", "seed")
        overrides = {
            "dataset": dataset,
            "root": _absolute(data.root),
            "allow_partial": data.allow_partial or None,
            "workers": data.workers,
            "cache": _absolute(data.cache),
            "base": _absolute_file(base) if base and base.endswith(".json") else base,
            "pretrained": self.pretrained and _absolute_file(self.pretrained),
            "init_from": _absolute(self.init_from),
            "rehearse": _absolute(self.rehearse),
            **{name: getattr(self, name) for name in plain},
        }
        return read_recipe(recipe, overrides, self.settings or ())


@dataclass(frozen=True)
class Target(OptionGroup, panel="Run"):
    """The run folder, and what happens in it."""

    output: Path | None = option(None, "New run folder.", show_default="runs/<dataset>/<time>")
    resume: Path | None = option(None, "Run folder of an interrupted run.", show_default=False)
    dry_run: bool = option(False, "Print data, parameters, steps and memory; stop.")
    name: str = advanced("run", "Added to the run folder's name.")
    device: TrainingDevice = "auto"


@grouped
def train(data: Data, recipe: Recipe, target: Target, output: Output) -> None:
    """Fine-tune UP-Person on a frozen CLIP.

    Options left out come from the recipe. Several GPUs: start it with torchrun or accelerate
    launch (docs/how-to/training.md).

    Example: `upperson train --root people --recipe synthetic`
    """
    require_extra("train", "training")
    device, as_json = target.device, output.as_json
    if target.resume is not None:
        if (data, recipe) != (Data(), Recipe()) or target.output or target.dry_run:
            raise UsageError(
                "--resume takes everything from the run: leave out other options than --device",
                code="options_beside_resume",
            )
        _resume(target.resume, device, as_json)
        return
    if data.root is None:
        raise UsageError("--root is missing: pass the folder of the data set", code="root_missing")
    config = recipe.as_config(data)
    if target.dry_run:
        _dry_run(config, device, as_json)
        return
    if target.output is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "--output is missing: several processes must agree on the run folder",
            code="output_missing",
        )
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    run = target.output or Path("runs") / (data.dataset or "jsonl") / f"{stamp}_{target.name}"
    if recipe.seeds == 1:
        _train_one(config, run, device, as_json)
        return
    from upperson.seeds import SEEDS_PLAN, SeedsPlan

    # Only the main process checks: it may begin to write before another one checks.
    foreign = run.is_dir() and set(run.iterdir()) - unfinished(run, SEEDS_PLAN)
    if is_main_process() and foreign:
        raise InputError(
            f"{run} is not empty: choose another --output, or  --resume {run}",
            code="run_not_empty",
            path=run,
        )
    _train_seeds(SeedsPlan(seeds=recipe.seeds, config=config), run, device, as_json)


@grouped
def pretrain_small(
    output: Annotated[Path, typer.Option(help="File to write, .safetensors.", show_default=False)],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps.", show_default="the shipped file's")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Continue from this base, at a lower rate and with other people: second stage.",
            show_default=False,
        ),
    ] = None,
    *,
    report: Output,
) -> None:
    """Pre-train the small CLIP base on synthetic people, in two stages.

    It made upperson/assets/upperson-small.safetensors, which ships with the package. The 6,000
    steps from random weights and 1,500 more take about 75 and 20 minutes of one core.

    Example: `upperson pretrain-small --init-from first.safetensors --output small.safetensors`
    """
    require_extra("train", "pre-training")
    if output.suffix != ".safetensors" or not output.parent.is_dir():
        raise UsageError(
            f"--output must be a .safetensors file in an existing folder, found {output}",
            code="output_wrong",
            path=output,
        )
    from upperson import pretrain
    from upperson.cli.progress import Display

    config = pretrain.PretrainConfig() if init_from is None else pretrain.second_stage(init_from)
    if steps is not None:
        config = replace(config, steps=steps)
    with Display() as display:
        rendering = partial(display.update, "rendering people")
        for step, loss in pretrain.pretrain_small(config, output, rendering):
            display.update("pre-training", step + 1, config.steps, f"loss {loss:.3f}")
    if report.as_json:
        print_json({"file": str(output), "steps": config.steps})
    else:
        print_line(f"wrote {output}")


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _absolute_file(pretrained: str) -> str:
    """Keep a tag; make a file's path independent of the working folder, for later commands."""
    path = Path(pretrained)
    return str(path.absolute()) if path.exists() else pretrained


def _resume(run: Path, device: str, as_json: bool) -> None:
    from upperson.config import read_config, read_yaml
    from upperson.run import CONFIG
    from upperson.seeds import SEEDS_PLAN, SeedsPlan

    if (run / SEEDS_PLAN).is_file():
        _train_seeds(read_yaml(SeedsPlan, run / SEEDS_PLAN), run, device, as_json)
        return
    if not (run / CONFIG).is_file():
        raise InputError(
            f"--resume wants a run folder with {CONFIG}, found none in {run}: pass the folder "
            "that  upperson train  was writing",
            code="not_a_run",
            path=run,
        )
    _train_one(read_config(run / CONFIG), run, device, as_json, resume=True)


def _train_one(
    config: "TrainConfig", run: Path, device: str, as_json: bool, *, resume: bool = False
) -> None:
    results = _run(config, run, device, resume=resume)
    if not is_main_process():
        return
    if as_json:
        print_json({"run": str(run), **results})
    else:
        print_line(
            f"run {run}: best epoch {results['best_epoch']}, selected on "
            f"{results['selected_on']}; next:  upperson export {run}"
        )


def _train_seeds(plan: "SeedsPlan", folder: Path, device: str, as_json: bool) -> None:
    from upperson.run import CONFIG
    from upperson.seeds import SEEDS, SEEDS_PLAN, summarise

    if is_main_process():
        remove_unfinished(folder, SEEDS_PLAN)
        write_atomically(folder / SEEDS_PLAN, plan.to_yaml())
    results = [
        _run(config, run, device, resume=(run / CONFIG).is_file())
        for config, run in plan.runs(folder)
    ]
    if not is_main_process():
        return
    summary = summarise(results)
    write_atomically(folder / SEEDS, json.dumps(summary, indent=2) + "\n")
    if as_json:
        print_json({"run": str(folder), "seeds": summary})
    else:
        print_table(seeds_table(summary))
        first = folder / f"seed_{plan.config.seed}"
        print_line(f"{plan.seeds} runs in {folder}; next:  upperson export {first}")


def _run(config: "TrainConfig", run: Path, device: str, *, resume: bool) -> dict[str, Any]:
    from upperson.cli.progress import run_shown
    from upperson.train import train as run_training

    return run_shown(run_training, config, run, device, resume=resume, command="train")


def seeds_table(summary: dict[str, Any]) -> PlainTable:
    """Return the metrics of every run with mean and deviation, from `upperson.seeds.summarise`."""
    measured = {split: summary[split] for split in ("val", "test") if summary[split]}
    names = list(dict.fromkeys(name for metrics in measured.values() for name in metrics))
    table = new_table("", "seed", *names, right=("seed", *names))
    for split, metrics in measured.items():
        for row, seed in enumerate(summary["seeds"]):
            table.add_row(
                "" if row else split,
                "?" if seed is None else str(seed),
                *(_number(metrics[name]["values"][row]) for name in names),
            )
        table.add_row("", "mean", *(_number(metrics[name]["mean"]) for name in names))
        table.add_row("", "std", *(_number(metrics[name]["std"]) for name in names))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _dry_run(config: "TrainConfig", device: str, as_json: bool) -> None:
    from upperson.components import NO_BF16, build_components, choose_device, usable_precision
    from upperson.plan import LEFT_OUT, plan
    from upperson.run import start_from

    precision = usable_precision(config.precision, choose_device(device))
    if precision != config.precision:
        config = replace(config, precision=precision)
        print_note(f"note: {NO_BF16}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    components = build_components(config)
    if config.init_from is not None:
        start_from(Path(config.init_from), components.model, components.base, config.model)
    planned = plan(config, components, processes=processes)
    if not is_main_process():
        return
    for line in components.notes:
        print_note(f"note: {line}")
    if (pairs := planned.splits["train"].captions) < config.batch_size:
        print_warning(
            f"a batch of {config.batch_size} is more than the {pairs} pairs of the training split: "
            "every epoch is one step with all of them; choose a smaller --batch-size"
        )
    if as_json:
        print_json(planned.as_dict())
        return
    for table in plan_tables(planned):
        print_table(table)
    print_line(f"not in the sum: {LEFT_OUT}")


def plan_tables(plan: "Plan") -> list[PlainTable]:
    """Return the plan as tables to print one after the other: data, parameters, run, memory."""
    tables = [_data_table(plan), _parameters_table(plan), _steps_table(plan), _memory_table(plan)]
    for table in tables[:-1]:
        table.add_row()  # An empty line before the next one.
    return tables


def _data_table(plan: "Plan") -> PlainTable:
    table = new_table(
        "data", "images", "captions", "people", right=("images", "captions", "people")
    )
    for name, split in plan.splits.items():
        table.add_row(name, f"{split.images:,}", f"{split.captions:,}", f"{split.people:,}")
    return table


def _parameters_table(plan: "Plan") -> PlainTable:
    towers = ("image tower", "text tower", "sum")
    table = new_table("parameters", *towers, right=towers)
    for part in plan.parts:
        outside = part.total != part.image + part.text
        by_tower = ("", "") if outside else (f"{part.image:,}", f"{part.text:,}")
        table.add_row(part.part, *by_tower, f"{part.total:,}")
    table.add_row(f"trained ({plan.percent:.2f} %)", "", "", f"{plan.trained:,}")
    table.add_row("trained and frozen", "", "", f"{plan.total:,}")
    return table


def _steps_table(plan: "Plan") -> PlainTable:
    from upperson.cli.progress import expected_time

    table = new_table("run", "")
    table.add_row(
        "steps",
        f"{plan.steps:,}: {count_of(plan.epochs, 'epoch')} of {plan.steps_per_epoch:,} "
        f"{'step' if plan.steps_per_epoch == 1 else 'steps'} of "
        f"{count_of(plan.batch_size, 'pair')}",
    )
    table.add_row(
        "time", f"{expected_time(plan.step_s, plan.steps)}, without loading and evaluation"
    )
    tokens = plan.tokens
    table.add_row(
        "caption tokens",
        f"mean {tokens.mean:.1f}, longest {tokens.longest}; "
        f"cut at {tokens.limit}: {tokens.cut:,} of {plan.splits['train'].captions:,}",
    )
    return table


def _memory_table(plan: "Plan") -> PlainTable:
    memory = plan.memory
    table = new_table("memory of a device", "MiB", "", right=("MiB",))
    for name, size, detail in (
        ("frozen weights", memory.frozen_bytes, ""),
        ("trained weights", memory.trained_bytes, "float32"),
        ("gradients", memory.gradient_bytes, ""),
        ("Adam", memory.optimizer_bytes, ""),
        ("copies of weights", memory.copies_bytes, ""),
        (
            "activations",
            memory.activation_bytes,
            f"{memory.pairs} pairs of {_mib(memory.activation_bytes_per_pair)} MiB",
        ),
        ("sum, an estimate", memory.total_bytes, ""),
    ):
        table.add_row(name, _mib(size), detail)
    return table


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f}"
