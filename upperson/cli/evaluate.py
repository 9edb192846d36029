"""``upperson evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from upperson.cli.extras import require_extra
from upperson.cli.options import Dataset, Root
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import new_table, print_json, print_table
from upperson_rt.errors import InputError, UsageError


def evaluate(
    target: Annotated[
        Path, typer.Argument(help="Run folder or bundle.", metavar="RUN|BUNDLE", show_default=False)
    ],
    root: Root,
    dataset: Dataset = "jsonl",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure text-to-image retrieval of a run, or of every variant of a bundle.

    Example: `upperson evaluate bundle --root people --split test`
    """
    require_extra("train", "evaluation")
    from upperson.cli.progress import Display
    from upperson.cli.retrieval_split import read_split
    from upperson.data.records import SPLITS
    from upperson_rt.bundle import MANIFEST_FILE, Bundle, read_manifest
    from upperson_rt.metrics import RetrievalMetrics

    if split not in SPLITS:
        raise UsageError(f"--split must be one of {', '.join(SPLITS)}, found '{split}'")
    records = read_split(dataset, root, split)
    found: dict[str, RetrievalMetrics] = {}
    with Display() as display:
        if (target / MANIFEST_FILE).is_file():
            require_extra("export", "evaluating a bundle")
            from upperson.cli.retrieval_split import retrieval_split
            from upperson_export.accuracy import measure

            for variant in read_manifest(target).variants:
                encoder = Bundle.open(target, variant).encoder()
                found[variant] = measure(
                    encoder,
                    retrieval_split(records, f"{root}, {split}"),
                    lambda done, total, name=variant: display.update(name, done, total),  # type: ignore[misc]
                ).mean()
        elif target.is_dir():
            from upperson.data.vocabulary import clip_tokenizer
            from upperson.evaluate import evaluate as evaluate_model
            from upperson.run import load_run

            _, _, model = load_run(target)
            found["run"] = evaluate_model(
                model,
                clip_tokenizer(model.text.context_length),
                records,
                progress=lambda done, total: display.update("encoding", done, total),
            )
        else:
            raise InputError(f"expected a run folder or a bundle at {target}, found no folder")
    if json:
        print_json({name: metrics.as_dict() for name, metrics in found.items()})
        return
    table = new_table("", "R@1", "R@5", "R@10", "mAP", "mINP")
    for name, metrics in found.items():
        table.add_row(name, *(f"{value:.2f}" for value in metrics.as_dict().values()))
    print_table(table)
