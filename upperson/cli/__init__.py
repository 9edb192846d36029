"""The command line ``upperson``; the only part of the package that knows export and calibration."""

from typing import Annotated, NoReturn

import typer

from upperson.cli.data import app as data_app
from upperson.cli.demo import demo
from upperson.cli.evaluate import evaluate
from upperson.cli.export import export
from upperson.cli.import_ import import_
from upperson.cli.parity import parity
from upperson.cli.serving import serving
from upperson.cli.train import pretrain_small, train
from upperson_rt import __version__
from upperson_rt.cli.app import Command, new_app, run_app

__all__ = ["app", "main"]

app = new_app("Train, export and try out text-based person retrieval.")
for command in (demo, train, evaluate, export, parity, serving, pretrain_small):
    app.command(cls=Command)(command)
app.command("import", cls=Command)(import_)
app.add_typer(data_app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"upperson {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train, export and try out text-based person retrieval."""


def main() -> NoReturn:
    """Run the command line."""
    run_app(app, "upperson")
