"""A training plan for people to read."""

from rich.table import Table

from upperson.plan import Plan
from upperson_rt.cli.output import new_table


def render(plan: Plan) -> list[Table]:
    """Return the plan as tables to print one after the other: data, parameters, run, memory."""
    tables = [_data(plan), _parameters(plan), _run(plan), _memory(plan)]
    for table in tables[:-1]:
        table.add_row()  # An empty line before the next one.
    return tables


def _data(plan: Plan) -> Table:
    table = new_table(
        "data", "images", "captions", "people", right=("images", "captions", "people")
    )
    for name, split in plan.splits.items():
        table.add_row(name, f"{split.images:,}", f"{split.captions:,}", f"{split.people:,}")
    return table


def _parameters(plan: Plan) -> Table:
    towers = ("image tower", "text tower", "sum")
    table = new_table("parameters", *towers, right=towers)
    for part in plan.parts:
        outside = part.total != part.image + part.text
        by_tower = ("", "") if outside else (f"{part.image:,}", f"{part.text:,}")
        table.add_row(part.part, *by_tower, f"{part.total:,}")
    table.add_row(f"trained ({plan.percent:.2f} %)", "", "", f"{plan.trained:,}")
    table.add_row("trained and frozen", "", "", f"{plan.total:,}")
    return table


def _run(plan: Plan) -> Table:
    table = new_table("run", "")
    table.add_row(
        "steps",
        f"{plan.steps:,}: {plan.epochs} epochs of {plan.steps_per_epoch:,} steps "
        f"of {plan.batch_size} pairs",
    )
    if plan.tokens is not None:
        tokens = plan.tokens
        table.add_row(
            "caption tokens",
            f"mean {tokens.mean:.1f}, longest {tokens.longest}; "
            f"cut at {tokens.limit}: {tokens.cut:,} of {plan.splits['train'].captions:,}",
        )
    return table


def _memory(plan: Plan) -> Table:
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
