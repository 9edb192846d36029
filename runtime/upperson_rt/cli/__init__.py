"""The command line `upperson-rt`. Commands import what is heavy when they run.

Optional packages add their commands under the entry points ``upperson.commands``.
"""

from typing import NoReturn

import typer

from upperson_rt.cli import gallery
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.index import index
from upperson_rt.cli.output import print_warning
from upperson_rt.cli.query import query
from upperson_rt.errors import UppersonError
from upperson_rt.extensions import extension_names, load_extension

__all__ = ["app", "main"]

app = new_app("Find a person's pictures from a sentence.", "upperson-rt")
app.command(cls=Command)(index)
app.command(cls=Command)(query)
app.add_typer(gallery.app, name="gallery")
_groups = {"": app, "gallery": gallery.app}
for _name in extension_names("commands"):
    _group, _, _command = _name.rpartition(" ")
    try:
        _loaded = load_extension("commands", _name)
        if isinstance(_loaded, typer.Typer):
            _groups[_name] = _loaded
            app.add_typer(_loaded, name=_name)
        elif _group in _groups:  # Else the package with the group is not installed.
            _groups[_group].command(_command, cls=Command)(_loaded)
    except UppersonError as _error:  # One that is broken must not take the others with it.
        print_warning(str(_error))
gallery.sort_commands()


def main() -> NoReturn:
    """Run the command line."""
    run_app(app, "upperson-rt")
