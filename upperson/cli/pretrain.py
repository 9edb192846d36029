"""``upperson pretrain-small``: make the small base that ships with the package."""

from pathlib import Path
from typing import Annotated

import typer

from upperson.cli.extras import require_extra
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import print_json


def pretrain_small(
    output: Annotated[Path, typer.Option(help="File to write, .safetensors.", show_default=False)],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps.", show_default="the shipped file's")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the small CLIP base from random weights on synthetic people of the studio look.

    This made upperson/assets/upperson-small.safetensors; nobody needs to run it again.

    Example: `upperson pretrain-small --output upperson-small.safetensors`
    """
    require_extra("train", "pre-training")
    from upperson.cli.progress import Display
    from upperson.pretrain import PretrainConfig
    from upperson.pretrain import pretrain_small as train_small

    config = PretrainConfig() if steps is None else PretrainConfig(steps=steps)
    with Display() as display:
        for step, loss in train_small(config, output):
            display.update("pre-training", step + 1, config.steps, f"loss {loss:.3f}")
    if json:
        print_json({"file": str(output), "steps": config.steps})
    else:
        typer.echo(f"wrote {output}")
