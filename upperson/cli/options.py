"""Options that several commands share, defined once."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

DATASET_HELP = (
    "cuhk-pedes, icfg-pedes, rstpreid, flickr30k or mscoco in their published layout; jsonl or csv "
    "for annotations.jsonl or annotations.csv in the root. Synthetic sets are jsonl."
)
Root: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--root",
        help="Folder of the data set; for the published ones also the folder around it.",
        show_default=False,
    ),
]
Dataset: TypeAlias = Annotated[str, typer.Option("--dataset", help=DATASET_HELP)]
RunFolder: TypeAlias = Annotated[
    Path, typer.Argument(help="Run folder that  upperson train  made.", show_default=False)
]
