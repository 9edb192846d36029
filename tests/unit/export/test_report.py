"""The tables of a bundle's report."""

from typing import Any

from upperson_export.report import too_few_queries
from upperson_export.report_rows import accuracy_rows, float_linear_rows, ladder_rows

METRICS = {"R@1": 50.0, "R@5": 60.0, "R@10": 70.0, "mAP": 40.0, "mINP": 30.0}
DROP = {"points": 0.25, "low": -0.5, "high": 1.0}


def measured(**more: Any) -> dict[str, Any]:
    return {
        "metrics": METRICS,
        "r1_drop": DROP,
        "float_types": {"image": "f32", "text": "f32"},
    } | more


def report() -> dict[str, Any]:
    time = {"ms_per_item": 2.0, "float_type": "bf16"}
    layer = {"node": "fc1", "order_loss": 1.5, "overlap_loss": 2.0, "cosine_loss": 3e-4}
    mixed = {"image": "bf16", "text": "f32"}
    return {
        "variants": {
            "int8": measured(
                elsewhere={"openvino": measured(float_types=mixed)},
                rungs={"image": "mixed-1/8", "text": "fp32"},
                kept_float={"image": [layer], "text": []},
                shipped=True,
                size_bytes=2**20,
                latency={"openvino": {"image": time, "text": time}},
            ),
            "fp16": measured(
                elsewhere={},
                rungs={"image": "fp32", "text": "fp32"},
                kept_float={"image": [], "text": []},
                shipped=False,
                size_bytes=0,
                latency={},
            ),
        },
        "ladder": [
            measured(
                variant="int8", tower="both", rung="plain + plain", backend="openvino",
                float_types={"image": "bf16", "text": "bf16"}, accepted=False, failure=None,
                cosine={"min": 0.9, "1 %": 0.95, "median": 0.99}, top10_overlap=88.0,
            ),
            measured(
                variant="fp16", tower="image", rung="fp16", float_types={}, accepted=False,
                backend="onnxruntime, float16 simulated", failure="it is not finite",
            ),
        ],
    }  # fmt: skip


def test_what_floats_were_computed_in_stands_beside_every_measurement() -> None:
    head, *rows = accuracy_rows(report())
    assert [row[1] for row in rows] == [
        "onnxruntime, f32",
        "openvino, bf16 + f32",
        "onnxruntime, float16 simulated",
    ]
    assert {len(row) for row in rows} == {len(head)}
    assert [row[head.index("ms/caption")] for row in rows] == ["-", "2.0", "-"]
    assert rows[0][head.index("R@1 change (95 %)")] == "-0.25 (-1.00 to +0.50)"
    assert [row[-1] for row in rows] == ["yes", "yes", "no"]
    assert ladder_rows(report())[1][3] == "openvino, bf16"


def test_a_form_that_does_not_work_says_why() -> None:
    head, *rows = ladder_rows(report())
    assert rows[1][-1] == "no: it is not finite"
    assert {len(row) for row in rows} == {len(head)}


def test_linears_left_in_float_come_with_their_damage() -> None:
    assert float_linear_rows(report())[1:] == [["int8", "image", "fc1", "1.50", "2.00", "3.0e-04"]]


def test_a_gate_finer_than_one_query_is_told() -> None:
    def told(captions: int, allowed: float) -> str | None:
        return too_few_queries({"split": {"captions": captions}, "max_r1_drop": allowed})

    assert told(200, 0.5) is None
    assert told(199, 0.5) == (
        "one of the 199 queries is 0.50 points of R@1, more than the 0.5 allowed: forms pass or "
        "fail by chance; measure on more queries"
    )
    assert told(1000, 0.0) is not None
    assert too_few_queries({"split": None, "max_r1_drop": 0.5}) is None
