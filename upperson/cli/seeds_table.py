"""Runs with several seeds for people to read."""

from typing import Any

from rich.table import Table

from upperson_rt.cli.output import new_table


def seeds_table(summary: dict[str, Any]) -> Table:
    """Return every run's metrics with their mean and standard deviation, in percent.

    Args:
        summary: What :func:`upperson.seeds.summarise` returned.
    """
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
