"""What several commands share: options, and the optional packages that they need."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from upperson_rt.cli.groups import ADVANCED
from upperson_rt.errors import UsageError, missing_extra

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
TrainingDevice: TypeAlias = Annotated[
    str, typer.Option("--device", help="auto, cpu or cuda.", rich_help_panel=ADVANCED)
]
_TRAIN = (
    "accelerate", "torch", "torchvision", "open_clip", "safetensors", "yaml", "jinja2",
    "matplotlib", "tensorboard",
)  # fmt: skip
_PACKAGES = {"train": _TRAIN, "export": (*_TRAIN, "onnx", "onnx_ir", "onnxruntime", "onnxscript")}


def is_main_process() -> bool:
    """Return whether this process reports; torchrun and accelerate start several."""
    return int(os.environ.get("RANK", "0")) == 0


def require_no_trust(trust: Path | None, run: Path) -> None:
    """Refuse --trust with a run folder: only bundles are signed."""
    if trust is not None:
        raise UsageError(
            f"--trust needs a bundle, and {run} is none: leave it out, or unset UPPERSON_TRUST",
            code="trust_without_bundle",
            path=run,
        )


def require_extra(extra: Literal["train", "export"], purpose: str) -> None:
    """Raise BackendError with the install command if a package of an extra is missing."""
    for package in _PACKAGES[extra]:
        if find_spec(package) is None:
            raise missing_extra(package, extra, purpose)
