"""The demo's page for people, ``report.html``: one file with everything inside."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from upperson.data.records import Record
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

_QUERIES = 6
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Answer:
    """One picture of an answer."""

    picture: str
    """data: URL."""

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
    return [
        SampleQuery(
            captions[row][1],
            _answers(records, before, row, captions[row][0]),
            _answers(records, after, row, captions[row][0]),
        )
        for row in rows
    ]


def render_page(
    summary: dict[str, Any],
    environment: jinja2.Environment,
    *,
    question: str,
    run: Path,
    answer: Path,
    queries: Sequence[SampleQuery],
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
        quick=quick,
    )


def _answers(records: Sequence[Record], embeddings: Embeddings, row: int, pid: int) -> list[Answer]:
    text_QE, image_GE = embeddings
    ranking = np.argsort(-(image_GE @ text_QE[row]), kind="stable")[:_SHOWN]
    return [Answer(_picture(records[index].image), records[index].pid == pid) for index in ranking]


def _picture(path: Path) -> str:
    buffer = io.BytesIO()
    Image.fromarray(load_image(path)).save(buffer, format="JPEG", quality=85)
    return _data_url(buffer.getvalue(), "jpeg")


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
