"""The command line `upperson-rt`. Commands import what is heavy when they run.

Optional packages add their commands under the entry points ``upperson.commands``.
"""

from typing import NoReturn

import typer

from upperson_rt.cli import bench, gallery
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.doctor import doctor
from upperson_rt.cli.index import index
from upperson_rt.cli.output import print_warning
from upperson_rt.cli.query import log_app, query
from upperson_rt.errors import UppersonError
from upperson_rt.extensions import extension_names, load_extension

__all__ = ["app", "main"]

app = new_app("Find a person's pictures from a sentence.", "upperson-rt")
app.command(cls=Command)(index)
app.command(cls=Command)(query)
app.command(cls=Command)(doctor)
app.add_typer(gallery.app, name="gallery")
app.add_typer(log_app, name="log")
app.add_typer(bench.app, name="bench")
for _name in extension_names("commands"):
    _group, _, _command = _name.rpartition(" ")
    _owner: typer.Typer = {"": app, "bench": bench.app}[_group]
    try:
        _owner.command(_command, cls=Command)(load_extension("commands", _name))
    except UppersonError as _error:  # One that is broken must not take the others with it.
        print_warning(str(_error))


def main() -> NoReturn:
    """Run the command line."""
    run_app(app, "upperson-rt")
