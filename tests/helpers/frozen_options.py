"""Help and options of every command as text, one file a command, to notice when they change.

The text holds what ``--help`` shows, without its layout, which differs between releases of Typer.
Write the files again with

    python -m tests.helpers.frozen_options

and say in CHANGELOG.md what users have to change.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import upperson.cli
import upperson_rt.cli

SNAPSHOTS = Path(__file__).parents[1] / "cli" / "snapshots"
APPS = {"upperson": upperson.cli.app, "upperson-rt": upperson_rt.cli.app}


def iter_commands() -> Iterator[tuple[str, Any]]:
    """Yield ("upperson data synthesize", command) for every command that does something."""
    for program, app in APPS.items():
        yield from _leaves(program, typer.main.get_command(app))


def snapshots() -> dict[str, str]:
    """Return the text of each command by the name of its file."""
    return {f"{name.replace(' ', '-')}.txt": _text(name, one) for name, one in iter_commands()}


def panel_of(parameter: Any) -> str:
    """Return the title under which ``--help`` shows a parameter."""
    usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
    return getattr(parameter, "rich_help_panel", None) or usual


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    subcommands = getattr(command, "commands", None)
    if subcommands is None:
        yield name, command
        return
    for sub, subcommand in sorted(subcommands.items()):
        yield from _leaves(f"{name} {sub}", subcommand)


def _text(name: str, command: Any) -> str:
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        panels.setdefault(panel_of(parameter), []).extend(_lines(parameter))
    shown = ["\n".join([panel, *lines]) for panel, lines in panels.items()]
    return "\n\n".join([name, inspect.cleandoc(command.help or ""), *shown]) + "\n"


def _lines(parameter: Any) -> list[str]:
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [parameter.name + ("..." if parameter.nargs == -1 else "")]
    facts = ["(required)" if parameter.required else f"= {parameter.default}"]
    if isinstance(shown := getattr(parameter, "show_default", None), str):
        facts.append(f"({shown})")
    if parameter.envvar:
        facts.append(f"[{parameter.envvar}]")
    first = " ".join(filter(None, [", ".join(names), parameter.metavar, *facts]))
    return [f"  {first}", f"    {parameter.help}"]


if __name__ == "__main__":
    for file in SNAPSHOTS.glob("*.txt"):
        file.unlink()
    SNAPSHOTS.mkdir(exist_ok=True)
    for file_name, text in snapshots().items():
        (SNAPSHOTS / file_name).write_text(text, "utf-8")
