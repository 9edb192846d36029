"""The word for a match, measured: of the right person, of the best of all others, of itself.

In galleries of each size: a word that is made of a gallery alone misleads in a small one.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.marks import People, Root, people_of
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import BundleOption, Debug, GalleryOption, Json
from upperson_rt.cli.output import new_table, print_result, print_table
from upperson_rt.gallery import Item
from upperson_rt.serve.scale import ORDINARY, Scale

SIZES = (1, 10, 100, 1200)
ASKED = {"a sentence": 0.0, "both": 0.5, "a picture": 1.0}
"""The share of the picture."""
_WORDS = ("very close", "close", "similar", "loose")

app = new_app("Measure the word for a match.")


@app.command(cls=Command)
def words(
    bundle: BundleOption,
    gallery: GalleryOption,
    root: Root,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Galleries of each size.")] = 200,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask for somebody who has one other picture in a gallery, and see what it is called.

    Example: `python -m benchmarks.words -b demo/bundle -g demo/gallery --root demo/people`
    """
    print_result(measured(people_of(bundle, gallery, root), trials), as_json, _show)


def measured(people: People, trials: int = 200) -> dict[str, Any]:
    """Return percent of each word: by question and size, of the right one, the others, itself."""
    ordinary_SD = people.encoder.encode_texts(ORDINARY)
    texts_CD = people.encoder.encode_texts([caption for _, caption in people.captions])
    strangers_KD = people.bundle.canaries.image_embeds
    vectors_ND, pids_N = people.vectors_ND, people.pids_N
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {}
    for asked, share in ASKED.items():
        for size in SIZES:
            counts = {who: Counter[str]() for who in ("right", "others", "itself")}
            for _ in range(trials):
                text = int(rng.integers(len(texts_CD)))
                own = rng.permutation(np.flatnonzero(pids_N == people.captions[text][0]))
                others = np.flatnonzero(pids_N != people.captions[text][0])
                there = rng.choice(others, min(size, len(others)), replace=False)
                if len(own) < 2:
                    continue
                there[0] = own[1]
                query_D = (1 - share) * texts_CD[text] + share * vectors_ND[own[0]]
                query_D /= np.linalg.norm(query_D)
                scale = scale_of(vectors_ND[there], strangers_KD, ordinary_SD)
                rest = there[1:] if size > 1 else others[:1]
                scores = [
                    float(vectors_ND[own[1]] @ query_D),
                    float((vectors_ND[rest] @ query_D).max()),
                ]
                for who, word in zip(("right", "others"), scale.words(share, scores), strict=True):
                    counts[who][word] += 1
                itself = float(vectors_ND[own[1]] @ vectors_ND[own[1]])
                counts["itself"][scale.words(1.0, [itself])[0]] += 1
            result[f"{asked}, {size:,}"] = {who: _percent(count) for who, count in counts.items()}
    return result


def scale_of(vectors_ND: Any, strangers_KD: Any, ordinary_SD: Any) -> Scale:
    """Return the scale of a gallery of some pictures."""
    items = [Item(key=str(number)) for number in range(len(vectors_ND))]
    gallery: Any = SimpleNamespace(
        embed_dim=vectors_ND.shape[1],
        count=lambda: len(items),
        vectors=lambda batch_size: iter([(items[:batch_size], vectors_ND[:batch_size])]),
    )
    return Scale(gallery, strangers_KD, lambda: ordinary_SD)


def _percent(count: "Counter[str]") -> list[int]:
    return [round(100 * count[word] / max(1, count.total())) for word in _WORDS]


def _show(result: dict[str, Any]) -> None:
    table = new_table("asked with, pictures", "the right one", "best of all others", "itself")
    for name, found in result.items():
        table.add_row(name, *(", ".join(map(str, percent)) for percent in found.values()))
    print_table(table)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.words")
