"""What more words cost and bring: several wordings of a sentence, and what it must not have."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.marks import Root, people_of
from upperson.evaluate import measure_by_length
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import BundleOption, Debug, GalleryOption, Json
from upperson_rt.cli.output import new_table, print_line, print_result, print_table, show_progress
from upperson_rt.encoder import Encoder
from upperson_rt.gallery import Gallery
from upperson_rt.machine import describe_machine, machine_lines
from upperson_rt.phrases import parse
from upperson_rt.phrases.evidence import embed_wordings
from upperson_rt.retriever import Retriever

WORDINGS = (1, 2, 4, 8, 16)
DENIALS = ("without a backpack", "without a backpack or a hat", "without a bag")
PLAIN = "1"
_K = 10

app = new_app("Measure wordings and denials.")


@app.command(cls=Command)
def asking(
    bundle: BundleOption,
    gallery: GalleryOption,
    root: Root,
    queries: Annotated[int, typer.Option("--queries", min=1, help="Captions to time.")] = 300,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask the captions of a test split in 1 to 16 wordings, short and whole, and time a query.

    A query is timed for every wording, and with a denial such as "without a bag" behind it, in
    turns over the same captions, the first of which is not counted. Times are of the processor, one
    thread.

    Example: `python -m benchmarks.asking -b demo/bundle -g demo/gallery --root demo/people`
    """
    people = people_of(bundle, gallery, root)
    captions = [caption for _, caption in people.captions if not parse(caption).denied]
    with (
        show_progress() as progress,
        Gallery.open(gallery, people.encoder.fingerprint, people.encoder.embed_dim) as opened,
    ):
        found = {}
        for number, count in enumerate(WORDINGS):
            progress("ranking", number, len(WORDINGS))
            embed = partial(_embed, people.encoder, count)
            lengths = measure_by_length(people.records, people.vectors_ND, embed)
            found[str(count)] = {
                length: {"questions": row.questions, **row.metrics.as_dict()}
                for length, row in lengths.items()
            }
        progress("timing", len(WORDINGS), len(WORDINGS))
        times = time_queries(Retriever(people.encoder, opened), captions[: queries + 1])
    result = {
        "benchmark": "asking",
        "machine": describe_machine("onnxruntime", "openvino"),
        "pictures": len(people.vectors_ND),
        "queries": len(captions[1 : queries + 1]),
        "by_wordings": found,
        "query_ms": times,
    }
    print_result(result, as_json, _show)


def time_queries(retriever: Retriever, captions: Sequence[str]) -> dict[str, float]:
    """Return the median milliseconds of processor time that a query takes, by way of asking."""
    ways = {str(count): ("", count) for count in WORDINGS}
    ways |= {denial: (f" {denial}", 1) for denial in DENIALS}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    rng = np.random.default_rng(0)
    for caption in captions:
        for way in rng.permutation([*ways]).tolist():  # Whoever follows 16 wordings is slower.
            denied, count = ways[way]
            began = time.process_time()
            retriever.query(caption + denied, _K, paraphrases=count)
            taken[way].append(time.process_time() - began)
    return {way: 1e3 * float(np.median(seconds[1:])) for way, seconds in taken.items()}


def _embed(encoder: Encoder, count: int, texts: Sequence[str]) -> Any:
    return embed_wordings(encoder.encode_texts, [parse(text) for text in texts], count)


def _show(result: Mapping[str, Any]) -> None:
    print_line(*machine_lines(result["machine"], 1).splitlines())
    print_line(f"{result['pictures']} pictures, {result['queries']} captions timed", "")
    ways = result["by_wordings"]
    lengths = [*ways[PLAIN]]
    for metric in ("R@1", "mAP"):
        table = new_table(f"{metric}: things", *ways, right=tuple(ways))
        for length in lengths:
            table.add_row(length, *(f"{ways[way][length][metric]:.2f}" for way in ways))
        print_table(table)
        print_line("")
    table = new_table("wordings", "ms a query", "times", right=("ms a query", "times"))
    for way, milliseconds in result["query_ms"].items():
        ratio = milliseconds / result["query_ms"][PLAIN]
        table.add_row(way, f"{milliseconds:.2f}", f"{ratio:.2f}x")
    print_table(table)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.asking")
