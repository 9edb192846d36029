"""The options of every command as text, to notice when they change.

Write the golden file again with

    python -m tests.helpers.frozen_options

and say in CHANGELOG.md what users have to change.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import upperson.cli
import upperson_rt.cli

GOLDEN = Path(__file__).parents[1] / "cli" / "options.txt"
APPS = {"upperson": upperson.cli.app, "upperson-rt": upperson_rt.cli.app}


def iter_commands() -> Iterator[tuple[str, Any]]:
    """Yield ("upperson data synthesize", command) for every command that does something."""
    for program, app in APPS.items():
        yield from _leaves(program, typer.main.get_command(app))


def options_text() -> str:
    """Return a paragraph a command: its arguments in order, its options, and their defaults."""
    return "\n".join(
        "\n".join([name, *(f"  {line}" for line in _lines(command.params))]) + "\n"
        for name, command in iter_commands()
    )


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    subcommands = getattr(command, "commands", None)
    if subcommands is None:
        yield name, command
        return
    for sub, subcommand in sorted(subcommands.items()):
        yield from _leaves(f"{name} {sub}", subcommand)


def _lines(parameters: list[Any]) -> list[str]:
    arguments, options = [], []
    for parameter in parameters:
        facts = "(required)" if parameter.required else f"= {parameter.default}"
        if parameter.envvar:
            facts += f" [{parameter.envvar}]"
        if parameter.param_type_name == "argument":
            dots = "..." if parameter.nargs == -1 else ""
            arguments.append(f"{parameter.name}{dots} {facts}")
        else:
            names = sorted([*parameter.opts, *parameter.secondary_opts], key=len, reverse=True)
            options.append(f"{', '.join(names)} {facts}")
    return arguments + sorted(options)


if __name__ == "__main__":
    GOLDEN.write_text(options_text(), "utf-8")
