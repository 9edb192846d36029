"""The demo's tables, its picture, and its page for people: one file with everything inside.

Shapes: Q captions, G pictures, E embedding width.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from upperson.demo_figures import FIGURES, Searched
from upperson.evaluate import Embeddings, pids_of
from upperson_phrases.evidence import EmbedTexts
from upperson_rt import __version__
from upperson_rt.preprocess import load_image

TEMPLATES = Path(__file__).parent / "templates"

MODELS = {
    "base": "frozen base",
    "adapter": "adapter of this site",
    "other_adapter": "adapter of the other site",
    "int8": "adapter of this site, int8",
    "sdm_recipe": "SDM recipe of the paper",
}
"""What is measured on a site: keys of the summary, and names for people."""

_NAMES = dict(zip(FIGURES, ("R@1", "mAP", "short queries", "own words"), strict=True))
_COLOURS = {
    "base": "#b0b7be", "adapter": "#1f4e79", "other_adapter": "#a9cce3", "int8": "#2e86c1",
    "sdm_recipe": "#e0b36a",
}  # fmt: skip
_CAPTIONS, _OWN = 3, 3
_SHOWN = 6

Table = list[list[str]]
"""A head and rows."""


def site_rows(site: Mapping[str, Any]) -> Table:
    """Return the table of a site (of the summary): a row for each model, gains in brackets."""
    rows = [["", *_NAMES.values()]]
    for key, label in MODELS.items():
        gains = site["gains"].get(key)
        rows.append([label, *(_cell(site[key][name], gains and gains[name]) for name in _NAMES)])
    return rows


def street_rows(street: Mapping[str, Any]) -> Table:
    """Return the table of the street: the base, its int8, and what was trained at each site."""
    gains = street["gains"]
    rows = [["", *(_NAMES[name] for name in street["base"])]]

    def add(label: str, figures: Mapping[str, float], gained: Mapping[str, Any] | None) -> None:
        cells = [_cell(value, gained and gained[name]) for name, value in figures.items()]
        rows.append([label, *cells])

    add(MODELS["base"], street["base"], None)
    add(f"{MODELS['base']}, int8", street["int8"], gains["int8"])
    for kind, label in (("adapters", "adapter"), ("sdm_recipes", MODELS["sdm_recipe"])):
        for name, figures in street[kind].items():
            add(f"{label}, {name}", figures, gains[kind][name])
    return rows


def _cell(value: float, gain: Mapping[str, float] | None) -> str:
    if gain is None:
        return f"{value:.1f}"
    return f"{value:.1f} ({gain['points']:+.1f}, {gain['low']:+.1f} to {gain['high']:+.1f})"


def draw_sites(summary: Mapping[str, Any]) -> bytes:
    """Draw the figures of both sites as bars, with the intervals of the gains; return a PNG."""
    sites = summary["sites"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes_of_sites = figure.subplots(1, len(sites), squeeze=False)[0]
    for axes, (name, site) in zip(axes_of_sites, sites.items(), strict=True):
        places = np.arange(len(_NAMES))
        width = 0.8 / len(MODELS)
        for index, key in enumerate(MODELS):
            values = [site[key][figure_name] for figure_name in _NAMES]
            offsets = places + (index - (len(MODELS) - 1) / 2) * width
            axes.bar(offsets, values, width, color=_COLOURS[key], label=MODELS[key])
            if gains := site["gains"].get(key):
                spread = [
                    [gains[each]["points"] - gains[each]["low"] for each in _NAMES],
                    [gains[each]["high"] - gains[each]["points"] for each in _NAMES],
                ]
                axes.errorbar(offsets, values, spread, fmt="none", ecolor="#333", elinewidth=0.8)
        axes.set_xticks(places, list(_NAMES.values()))
        axes.set(title=f"{name}: {', '.join(site['things'])}", ylim=(0, 100))
        axes.set_ylabel("%")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    style: dict[str, Any] = {"ncols": len(MODELS), "frameon": False, "fontsize": 8}
    figure.legend(handles, labels, loc="outside lower center", **style)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


# --- The page


@dataclass(frozen=True, slots=True)
class Answer:
    """One picture of an answer."""

    picture: str  # data: URL.
    right: bool


@dataclass(frozen=True, slots=True)
class SampleQuery:
    """A query on a site's people with what the model answers before and after fine-tuning."""

    text: str
    before: list[Answer]
    after: list[Answer]


def sample_queries(
    searched: Searched,
    before: Embeddings,
    after: Embeddings,
    embed_before: EmbedTexts,
    embed_after: EmbedTexts,
) -> list[SampleQuery]:
    """Take own words and captions at even distances through the split, not the best ones.

    ``before`` and ``after`` are captions [Q, E] and pictures [G, E] of a model, and the functions
    embed with the same one.
    """
    own = list(searched.own)
    chosen = [own[row] for row in np.linspace(0, len(own) - 1, _OWN).astype(int)]
    shown = [
        SampleQuery(
            text,
            *(
                _answers(searched, image_GE @ embed([text])[0], searched.own[text])
                for (_, image_GE), embed in ((before, embed_before), (after, embed_after))
            ),
        )
        for text in chosen
    ]
    captions = [text for record in searched.records for text in record.captions]
    pids_Q, pids_G = pids_of(searched.records)
    for row in np.linspace(0, len(captions) - 1, _CAPTIONS).astype(int):
        answers = [
            _answers(searched, image_GE @ text_QE[row], pids_G == pids_Q[row])
            for text_QE, image_GE in (before, after)
        ]
        shown.append(SampleQuery(captions[row], *answers))
    return shown


def _answers(
    searched: Searched, score_G: NDArray[np.float32], right_G: NDArray[np.bool_]
) -> list[Answer]:
    answers = []
    for index in np.argsort(-score_G, kind="stable")[:_SHOWN]:
        buffer = io.BytesIO()
        picture = load_image(searched.records[index].image)
        Image.fromarray(picture).save(buffer, format="JPEG", quality=85)
        answers.append(Answer(_data_url(buffer.getvalue(), "jpeg"), bool(right_G[index])))
    return answers


def render_page(
    summary: dict[str, Any],
    environment: jinja2.Environment,
    *,
    folder: Path,
    question: str,
    queries: Mapping[str, Sequence[SampleQuery]],
    quick: bool,
) -> str:
    """Fill the template. Its numbers are the summary's, its pictures are embedded.

    ``environment`` finds it in `TEMPLATES`, and beside it ``page.html.j2``, which it extends.
    """
    png = partial(_png, folder)
    return environment.get_template("demo.html.j2").render(
        version=__version__,
        question=question,
        answer=png("answer.png"),
        chart=png("sites.png"),
        size=summary["size"],
        seconds=summary["seconds"],
        street=street_rows(summary["street"]),
        sites={
            name: {
                "rows": site_rows(site),
                "facts": site,
                "answer": png(f"sites/{name}/answer.png"),
                "curves": png(f"sites/{name}/run/curves.png"),
                "queries": queries[name],
            }
            for name, site in summary["sites"].items()
        },
        quick=quick,
    )


def _png(folder: Path, name: str) -> str:
    return _data_url((folder / name).read_bytes(), "png")


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
