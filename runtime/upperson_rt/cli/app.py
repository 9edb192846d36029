"""How commands end: errors become one line and an exit code. Shared by both command lines.

    app = new_app("Find a person's pictures from a sentence.", "upperson-rt")

    @app.command(cls=Command)
    def query(..., debug: Debug = False) -> None: ...

    def main() -> None:
        run_app(app, "upperson-rt")

Exit codes are those of `upperson_rt.errors`, 1 for a defect of the program, 130 for Ctrl-C, 143
for SIGTERM.
"""

import io
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from upperson_rt import __version__
from upperson_rt.cli.ending import end, how_it_ended, listen
from upperson_rt.cli.log import logging_to_stderr
from upperson_rt.cli.output import print_error, print_line, print_note
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.printable import one_line, printable

__all__ = ["Command", "new_app", "run_app"]


class Command(TyperCommand):
    """A command that reports errors in one line; with its option ``--debug`` also the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; one with ``--log-json`` keeps a log on stderr meanwhile."""
        as_json = ctx.params.get("log_json")
        with nullcontext() if as_json is None else logging_to_stderr(as_json):
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # Typer ends these itself.
        except UppersonError as error:
            _report(str(error), debug=ctx.params.get("debug", False))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            message, code = how_it_ended(error)
            _report(message, debug=ctx.params.get("debug", False))
            raise typer.Exit(code) from None  # `run_app` tells it from what nobody has reported.
        except OSError as error:  # Such as a full disk under stdout.
            _report(str(error), debug=ctx.params.get("debug", False))
            raise typer.Exit(InputError.exit_code) from error
        except Exception as error:  # A defect; this is the one place that may catch everything.
            debug = ctx.params.get("debug", False)
            advice = "" if debug else "; run the command again with --debug for the details"
            name = type(error).__name__
            _report(f"internal error: {name}: {one_line(error)}{advice}", debug=debug)
            raise typer.Exit(1) from error


class _Group(TyperGroup):
    """A group of commands; what Typer says of wrong options is printable, too."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Read the options of the group."""
        with _printable_usage():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Read the options of a command, and run it."""
        with _printable_usage():
            return super().invoke(ctx)


@contextmanager
def _printable_usage() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = printable(message)  # type: ignore[attr-defined]
        raise


def new_app(help: str, program: str | None = None) -> typer.Typer:
    """Return a group of commands in the house style; a program, which is named, has --version."""
    app = typer.Typer(
        cls=_Group,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    if program is None:
        return app

    def print_version(wanted: bool) -> None:
        if wanted:
            print_line(f"{program} {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option(
                "--version", callback=print_version, is_eager=True, help="Show the version."
            ),
        ] = False,
    ) -> None:
        pass

    return app


def run_app(app: typer.Typer, name: str) -> NoReturn:
    """Run an application on the arguments of the process, and exit with its code."""
    listen()
    # What is wrong with a picture is told once, as an error, not by Pillow for each of its tags.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where there is no terminal.
            stream.reconfigure(errors="backslashreplace")  # Not every terminal knows Unicode.
    code = 0
    try:
        app(prog_name=name)
    except KeyboardInterrupt as error:  # Outside of a command: while it is being imported.
        message, code = how_it_ended(error)
        _report(message, debug=False)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        cause = ended.__context__ and ended.__context__.__cause__
        if isinstance(cause, KeyboardInterrupt):  # While options were read: all is Ctrl-C to Typer.
            message, code = how_it_ended(cause)
            _report(message, debug=False)
    end(code)


def _report(message: str, debug: bool) -> None:
    if debug:
        for line in traceback.format_exc().rstrip("\n").split("\n"):
            print_note(line)
    print_error(message)
