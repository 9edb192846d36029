"""Options that several commands share, defined once."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Root: TypeAlias = Annotated[
    Path, typer.Option("--root", help="Folder of the data set.", show_default=False)
]
Dataset: TypeAlias = Annotated[
    str, typer.Option("--dataset", help="Annotation format: jsonl (annotations.jsonl in the root).")
]
RunFolder: TypeAlias = Annotated[
    Path, typer.Argument(help="Run folder that  upperson train  made.", show_default=False)
]
