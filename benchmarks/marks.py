"""Marks on results against Rocchio's rule: mAP after some clicks, every tenth of them wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray

from upperson.data.records import Record, read_dataset
from upperson_rt.bundle import Bundle
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import BundleOption, Debug, GalleryOption, Json
from upperson_rt.cli.output import new_table, print_result, print_table
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery
from upperson_rt.serve.questions import refined

CLICKS = (0, 3, 5, 10)
WAYS = {"the first right one seen, else the first": True, "from the top": False}
_SHOWN = 20
"""How many results somebody looks at before each click."""

Vectors: TypeAlias = NDArray[np.float32]
Rule: TypeAlias = Callable[[Vectors, Vectors, Vectors], Vectors]

Root = Annotated[Path, typer.Option("--root", help="Data set that was indexed, or its folder.")]

app = new_app("Measure marks on results.")


@app.command(cls=Command)
def marks(
    bundle: BundleOption,
    gallery: GalleryOption,
    root: Root,
    queries: Annotated[int, typer.Option("--queries", min=1, help="Captions to ask.")] = 400,
    wrong: Annotated[
        float, typer.Option("--wrong", min=0.0, max=1.0, help="Share of wrong clicks.")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of captions and clicks.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Click through the results of captions as somebody does, and search again after each click.

    What is marked stays in the ranking that is measured.

    Example: `python -m benchmarks.marks -b demo/bundle -g demo/gallery --root demo/people`
    """
    print_result(measured(people_of(bundle, gallery, root), queries, wrong, seed), as_json, _show)


@dataclass(frozen=True)
class People:
    """Pictures of known people in a gallery, and captions of them."""

    bundle: Bundle
    encoder: Encoder
    vectors_ND: Vectors
    pids_N: NDArray[np.int64]
    captions: list[tuple[int, str]]
    """Who it is, and the caption."""
    records: list[Record]
    """Of the N pictures."""


def people_of(bundle: Path, gallery: str, root: Path) -> People:
    """Read the test split of a data set that was indexed.

    Raises:
        InputError: The gallery holds other pictures.
    """
    people = {
        str(record.image.absolute()): record
        for record in read_dataset("jsonl", data_set(root))["test"]
    }
    opened_bundle = Bundle.open(bundle, threads=1)
    encoder = opened_bundle.encoder()
    with Gallery.open(gallery, encoder.fingerprint, encoder.embed_dim) as opened:
        parts = list(opened.vectors())
    keys = [item.key for items, _ in parts for item in items]
    if not keys or not people.keys() >= set(keys):
        raise InputError(f"gallery {gallery} holds other pictures than the test split of {root}")
    records = [people[key] for key in keys]
    return People(
        opened_bundle,
        encoder,
        np.concatenate([vectors for _, vectors in parts]),
        np.array([record.pid for record in records]),
        [(record.pid, caption) for record in records for caption in record.captions],
        records,
    )


def measured(
    people: People, queries: int = 400, wrong: float = 0.1, seed: int = 0
) -> dict[str, Any]:
    """Return mAP after clicks of each rule, and what it was measured on."""
    asked, vectors_ND = people.captions, people.vectors_ND
    chosen = np.random.default_rng(seed).choice(len(asked), min(queries, len(asked)), replace=False)
    questions_QD = people.encoder.encode_texts([asked[one][1] for one in chosen])
    wanted_Q = np.array([asked[one][0] for one in chosen])
    rules: dict[str, Rule] = {"ours": refined, "Rocchio": _rocchio}
    result: dict[str, Any] = {
        "queries": len(chosen),
        "pictures": len(vectors_ND),
        "wrong": wrong,
        "map": {},
    }
    for way, seeks in WAYS.items():
        for name, rule in rules.items():
            found = _click(
                questions_QD, wanted_Q, vectors_ND, people.pids_N, rule, seeks, wrong, seed
            )
            result["map"][f"{name}, marking {way}"] = found
    return result


def data_set(root: Path) -> Path:
    """Return a data set, which may be the only one in a folder, as `upperson demo` leaves it."""
    below = [path.parent for path in root.glob("*/annotations.jsonl")]
    return below[0] if len(below) == 1 and not (root / "annotations.jsonl").exists() else root


def _show(result: dict[str, Any]) -> None:
    table = new_table("mAP after clicks", *map(str, CLICKS), right=tuple(map(str, CLICKS)))
    for name, values in result["map"].items():
        table.add_row(name, *(f"{value:.1f}" for value in values))
    print_table(table)


def _click(
    questions_QD: Vectors,
    wanted_Q: NDArray[np.int64],
    vectors_ND: Vectors,
    pids_N: NDArray[np.int64],
    rule: Rule,
    seeks: bool,
    wrong: float,
    seed: int,
) -> list[float]:
    """Return mAP in percent after each number of `CLICKS`."""
    chance = np.random.default_rng(seed)
    sums = dict.fromkeys(CLICKS, 0.0)
    for question_D, wanted in zip(questions_QD, wanted_Q, strict=True):
        right_N = pids_N == wanted
        query_D = question_D
        seen: dict[int, bool] = {}
        for click in range(max(CLICKS) + 1):
            scores_N = vectors_ND @ query_D
            ranked_N = np.argsort(-scores_N, kind="stable")
            if click in sums:
                sums[click] += _average_precision(right_N[ranked_N])
            left = [int(one) for one in ranked_N[:_SHOWN] if int(one) not in seen]
            if not left:
                continue
            first_right = next((one for one in left if right_N[one]), left[0])
            one = first_right if seeks else left[0]
            seen[one] = bool(right_N[one]) != (chance.random() < wrong)
            yes, no = ([n for n, said in seen.items() if said is way] for way in (True, False))
            query_D = rule(question_D, vectors_ND[yes], vectors_ND[no])
    return [100 * sums[click] / len(questions_QD) for click in CLICKS]


def _average_precision(right_N: NDArray[np.bool_]) -> float:
    places = np.flatnonzero(right_N)
    return float((np.arange(1, len(places) + 1) / (places + 1)).mean())


def _rocchio(query_D: Vectors, yes_ND: Vectors, no_ND: Vectors) -> Vectors:
    """Move a query by the rule of 1971 with the usual weights 1, 0.75 and 0.15."""
    moved = query_D.astype(np.float64)
    if len(yes_ND):
        moved = moved + 0.75 * yes_ND.mean(axis=0)
    if len(no_ND):
        moved = moved - 0.15 * no_ND.mean(axis=0)
    unit: Vectors = (moved / np.linalg.norm(moved)).astype(np.float32)
    return unit


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.marks")
