"""The command line `upperson-rt`. Commands import what is heavy when they run."""

from typing import NoReturn

from upperson_rt.cli import bench, gallery
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.cameras import cameras
from upperson_rt.cli.compile import compile_engines
from upperson_rt.cli.doctor import doctor
from upperson_rt.cli.index import index
from upperson_rt.cli.query import log_app, query
from upperson_rt.cli.serve import serve
from upperson_rt.cli.token import token
from upperson_rt.cli.watch import watch

__all__ = ["app", "main"]

app = new_app("Find a person's pictures from a sentence.", "upperson-rt")
app.command(cls=Command)(index)
app.command(cls=Command)(query)
app.command(cls=Command)(watch)
app.command(cls=Command)(cameras)
app.command(cls=Command)(serve)
app.command(cls=Command)(token)
app.command(cls=Command)(doctor)
app.command("compile", cls=Command)(compile_engines)
app.add_typer(gallery.app, name="gallery")
app.add_typer(log_app, name="log")
app.add_typer(bench.app, name="bench")


def main() -> NoReturn:
    """Run the command line."""
    run_app(app, "upperson-rt")
