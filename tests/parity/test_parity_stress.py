"""What real CLIP weights do to INT8, and what the ladder makes of it.

Outlier channels are put into a trained model so that float32 computes the same.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QuickDemo
from tests.helpers.stress_models import with_loud_channels, with_prefix_scale
from upperson.cli.calibration_data import from_records
from upperson.cli.retrieval_split import retrieval_split
from upperson.data.records import read_dataset
from upperson.data.vocabulary import clip_tokenizer, clip_tokenizer_json
from upperson.run import load_run
from upperson_export.bundle import ExportOptions, ModelIdentity, export_bundle

GATE = 0.7
"""Points; one of the 160 queries is 0.625."""


def export(
    model: Any, quick_demo: QuickDemo, output: Path, *variants: Any, **options: Any
) -> dict[str, Any]:
    (people,) = (quick_demo.folder / "people").iterdir()
    splits = read_dataset("jsonl", people)
    height_px, width_px = model.image_size
    return export_bundle(
        model,
        ModelIdentity(
            name="stress", base="b", base_sha256="0" * 64, adapter_sha256="0" * 64, embed_dim=128
        ),
        clip_tokenizer_json(),
        from_records(
            splits["train"], "train", clip_tokenizer(), height_px=height_px, width_px=width_px,
            count=48, seed=0,
        ),
        retrieval_split(splits["test"], "test"),
        output,
        ExportOptions(variants=variants, max_r1_drop=GATE, **options),
        lambda work, done, total: None,
    )  # fmt: skip


def found(report: dict[str, Any], tower: str, rung: str) -> dict[str, Any]:
    (row,) = [row for row in report["ladder"] if (row["tower"], row["rung"]) == (tower, rung)]
    return row


@pytest.mark.timeout(240, func_only=True)
def test_loud_channels_ruin_plain_int8_and_not_what_ships(
    quick_demo: QuickDemo, tmp_path: Path
) -> None:
    _, _, model = load_run(quick_demo.folder / "run")
    report = export(with_loud_channels(model, largest=64.0), quick_demo, tmp_path / "b", "int8")
    plain, shipped = found(report, "image", "plain"), report["variants"]["int8"]
    assert plain["r1_drop"]["points"] > GATE
    assert plain["cosine"]["median"] < 0.98
    assert not plain["accepted"]
    assert shipped["shipped"]
    assert shipped["rungs"]["image"] not in ("plain", "fp32")
    assert shipped["r1_drop"]["points"] <= GATE
    assert found(report, "image", shipped["rungs"]["image"])["cosine"]["min"] > 0.999


@pytest.mark.timeout(240, func_only=True)
def test_large_prefix_values_stay_inside_float16(quick_demo: QuickDemo, tmp_path: Path) -> None:
    _, _, model = load_run(quick_demo.folder / "run")
    report = export(with_prefix_scale(model, 100.0), quick_demo, tmp_path / "b", "fp16")
    shipped = report["variants"]["fp16"]
    assert shipped["rungs"] == {"image": "fp16", "text": "fp16"}
    assert shipped["cosine"]["min"] > 0.9999
