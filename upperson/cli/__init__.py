"""The command line ``upperson``; the only part of the package that knows export and calibration."""

from typing import NoReturn

from upperson.cli.caption_sheet import caption_sheet
from upperson.cli.data import app as data_app
from upperson.cli.demo import demo
from upperson.cli.distill import distill
from upperson.cli.evaluate import evaluate
from upperson.cli.export import export
from upperson.cli.finished import serving, sign
from upperson.cli.import_ import import_
from upperson.cli.parity import parity
from upperson.cli.train import pretrain_small, train
from upperson_rt.cli.app import Command, new_app, run_app

__all__ = ["app", "main"]

app = new_app("Train, export and try out text-based person retrieval.", "upperson")
for command in (*(demo, train, distill, evaluate, export, parity, sign, serving, pretrain_small),):
    app.command(cls=Command)(command)
app.command("caption-sheet", cls=Command)(caption_sheet)
app.command("import", cls=Command)(import_)
app.add_typer(data_app, name="data")


def main() -> NoReturn:
    """Run the command line."""
    run_app(app, "upperson")
