"""The demo's page for people, ``report.html``: one file with everything inside."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from upperson.attributes import AttributeReport, Share, ShortQuestions
from upperson.data.records import Record
from upperson.questions import ANY
from upperson_rt import __version__
from upperson_rt.preprocess import load_image

Embeddings = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Captions [Q, E] and images [G, E] of one model."""

TEMPLATES = Path(__file__).parent / "templates"

STAGES = {
    "zero_shot": "Frozen base, zero-shot",
    "fine_tuned": "Fine-tuned with SDM",
    "onnx_fp32": "ONNX fp32",
    "onnx_int8": "ONNX int8",
}
"""What was measured: keys of the summary, and names for people."""

_THINGS = {"bag": "a bag", "headwear": "headwear", "accessory": "an accessory"}
_SHARED = {
    "gender": "gender",
    "upper_colour": "colour",
    "upper": "garment",
    "lower": "legs",
    "bag": "bag",
    "hair_colour": "hair colour",
}
"""Attributes in the drawing, and what people call them."""

_BEFORE, _AFTER, _CHANCE = "#a9cce3", "#1f4e79", "#c0392b"

_QUERIES = 6
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Answer:
    """One picture of an answer."""

    picture: str  # data: URL.
    right: bool


@dataclass(frozen=True, slots=True)
class SampleQuery:
    """A caption of the test split with what the model answers before and after fine-tuning."""

    caption: str
    before: list[Answer]
    after: list[Answer]


def sample_queries(
    records: Sequence[Record], before: Embeddings, after: Embeddings
) -> list[SampleQuery]:
    """Take captions at even distances through the split, not the best ones."""
    captions = [(record.pid, text) for record in records for text in record.captions]
    rows = np.linspace(0, len(captions) - 1, _QUERIES).astype(int)
    queries = []
    for row in rows:
        pid, text = captions[row]
        answers = [_answers(records, embeddings, row, pid) for embeddings in (before, after)]
        queries.append(SampleQuery(text, *answers))
    return queries


def render_page(
    summary: dict[str, Any],
    environment: jinja2.Environment,
    *,
    question: str,
    run: Path,
    answer: Path,
    queries: Sequence[SampleQuery],
    words: Mapping[str, AttributeReport],
    quick: bool,
) -> str:
    """Fill the template. Its numbers are the summary's, its pictures are embedded.

    ``environment`` finds it in `TEMPLATES`, and beside it ``page.html.j2``, which it extends.
    """
    return environment.get_template("demo.html.j2").render(
        version=__version__,
        question=question,
        rows=[(name, summary[key]) for key, name in STAGES.items()],
        drop=summary["int8_r1_drop"],
        size=summary["size"],
        seconds=summary["seconds"],
        curves=_data_url((run / "curves.png").read_bytes(), "png"),
        answer=_data_url(answer.read_bytes(), "png"),
        queries=queries,
        words=_data_url(draw_words(words), "png"),
        asked=words["fine_tuned"].short["person"],
        int8=summary["short_questions"]["onnx_int8"],
        quick=quick,
    )


def short_questions(asked: Mapping[str, ShortQuestions]) -> dict[str, dict[str, float]]:
    """Return in what the first picture is right, in percent, by key of `STAGES`; and by chance."""
    found = {key: answers.parts for key, answers in asked.items()}
    parts = next(iter(found.values()))
    return {key: {part: shares[part].top1 for part in parts} for key, shares in found.items()} | {
        "chance": {part: share.chance for part, share in parts.items()}
    }


def draw_words(words: Mapping[str, AttributeReport]) -> bytes:
    """Draw which words models understand, by key of `STAGES`; return a PNG."""
    reports = list(words.values())
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    short = [report.short["person"].parts for report in reports]
    _draw_bars(
        axes[0],
        "Short questions:\nfirst picture right in",
        {part: [parts[part].top1 for parts in short] for part in short[0]},
        {part: share.chance for part, share in short[0].items()},
    )
    things: dict[str, list[Share]] = {}
    for name, label in _THINGS.items():
        things[f"with {label}"] = [report.with_thing[name]["all"] for report in reports]
        refused = [report.without_thing[name] for report in reports]
        things[f"without {label}"] = [shares.get(ANY, shares["all"]) for shares in refused]
    _draw_bars(
        axes[1],
        "Things, asked for and refused:\nof the first ten pictures have it",
        {label: [share.at10 for share in shares] for label, shares in things.items()},
        {label: shares[0].chance for label, shares in things.items()},
    )
    _draw_bars(
        axes[2],
        "Captions:\nfirst picture shares",
        {label: [each.captions[name].top1 for each in reports] for name, label in _SHARED.items()},
        {label: reports[0].captions[name].chance for name, label in _SHARED.items()},
    )
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    names = {str(index): STAGES[key] for index, key in enumerate(words)} | {"chance": "chance"}
    lines = [handles[key] for key in names]
    style: dict[str, Any] = {"ncols": len(names), "frameon": False, "fontsize": 9}
    figure.legend(lines, list(names.values()), loc="outside lower center", **style)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_bars(
    axes: Axes, title: str, bars: Mapping[str, Sequence[float]], chance: Mapping[str, float]
) -> None:
    """Draw a group of bars a row, in percent, and a mark where chance is."""
    rows = np.arange(len(bars))
    colours = (_BEFORE, _AFTER)
    height = 0.8 / len(colours)
    for index, colour in enumerate(colours):
        widths = [values[index] for values in bars.values()]
        axes.barh(rows + (index - 0.5) * height, widths, height, color=colour, label=str(index))
        for row, width in zip(rows, widths, strict=True):
            place = row + (index - 0.5) * height
            axes.text(width + 1.5, place, f"{width:.0f}", va="center", fontsize=7)
    marks = [chance[name] for name in bars]
    axes.vlines(marks, rows - 0.45, rows + 0.45, color=_CHANCE, linewidth=1.5, label="chance")
    axes.set_yticks(rows, list(bars))
    axes.set(xlim=(0, 110), xticks=range(0, 101, 25))
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _answers(records: Sequence[Record], embeddings: Embeddings, row: int, pid: int) -> list[Answer]:
    text_QE, image_GE = embeddings
    answers = []
    for index in np.argsort(-(image_GE @ text_QE[row]), kind="stable")[:_SHOWN]:
        buffer, record = io.BytesIO(), records[index]
        Image.fromarray(load_image(record.image)).save(buffer, format="JPEG", quality=85)
        answers.append(Answer(_data_url(buffer.getvalue(), "jpeg"), record.pid == pid))
    return answers


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
