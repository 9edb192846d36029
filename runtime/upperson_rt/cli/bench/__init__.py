"""`upperson-rt bench ...`."""

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.bench.gallery import gallery
from upperson_rt.cli.bench.pipeline import pipeline
from upperson_rt.cli.bench.query import query
from upperson_rt.cli.bench.towers import towers

__all__ = ["app"]

app = new_app("Time what this machine runs, contenders in turns.")
app.command(cls=Command)(towers)
app.command(cls=Command)(query)
app.command(cls=Command)(gallery)
app.command(cls=Command)(pipeline)


@app.callback()
def _group() -> None:
    """Time what this machine runs, contenders in turns."""
