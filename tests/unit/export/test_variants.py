"""The table of number formats, and that nothing beside it compares their names."""

import ast
from typing import get_args

import pytest

from tests.helpers.command_line import ROOT, run_code
from upperson_export.variants import (
    AS_RUN,
    EXACT,
    INT8_RUNGS,
    SIMULATED,
    VARIANTS,
    VariantName,
    is_half,
    variants_asked,
)


@pytest.mark.parametrize("name", get_args(VariantName))
def test_every_row_answers_everything(name: VariantName) -> None:
    row = VARIANTS[name]
    assert row.name == name
    assert row.rungs[-1] == EXACT, "the last rung loses nothing"
    assert all(row.at(rung) in VARIANTS.values() for rung in row.rungs)
    assert all(rung in VARIANTS or row.int8 for rung in row.rungs)
    assert row.ungated_rung in row.own_rungs
    assert row.measured_on == (SIMULATED if row.float_type == "f16" else AS_RUN)
    assert 0.9 < row.min_cosine <= row.canary_min_cosine < 1
    assert row.asked_by or name == EXACT
    # Engines are typed graphs for GPUs, and what is slower there is no server's default.
    assert not row.tensorrt or (row.made_for, row.float_type) == ("gpu", "f16")
    assert not row.servers or not row.int8


def test_how_near_a_machine_must_come_to_the_golden_embeddings() -> None:
    floors = {name: row.canary_min_cosine for name, row in VARIANTS.items()}
    assert floors == {"fp32": 0.9999, "int8": 0.9998, "fp16": 0.999, "int8-fp16": 0.99}


def test_a_rung_that_is_another_variant_is_written_as_that() -> None:
    int8 = VARIANTS["int8-fp16"]
    assert int8.own_rungs == tuple(INT8_RUNGS)
    assert [int8.at(rung).name for rung in int8.rungs] == [
        *["int8-fp16"] * len(INT8_RUNGS), "fp16", "fp32",
    ]  # fmt: skip
    assert VARIANTS["fp16"].own_rungs == ("fp16",)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ()),
        (["int8"], ("int8",)),
        (["fp16"], ("fp16",)),
        (["int8", "trt"], ("int8", "fp16", "int8-fp16")),
        (["trt"], ("fp16",)),
        (["int8", "fp16", "trt"], ("int8", "fp16", "int8-fp16")),
    ],
)
def test_options_ask_for_variants(options: list[str], expected: tuple[str, ...]) -> None:
    assert variants_asked(options) == expected


def test_a_precision_of_a_later_version_is_not_taken_for_float16() -> None:
    assert [name for name in VARIANTS if is_half(name)] == ["fp16", "int8-fp16"]
    assert not is_half("fp16-of-the-future")


def test_the_table_needs_no_onnx() -> None:
    heavy = ["onnx", "onnx_ir", "onnxruntime", "torch"]
    done = run_code("import upperson_export.variants", without=heavy)
    assert done.returncode == 0, done.stderr


def compared_names(tree: ast.AST) -> list[ast.expr]:
    """Return what is compared, or asked for its beginning or end, with a variant's name."""
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            parts = node.args if node.func.attr in ("startswith", "endswith") else []
        for part in parts:
            constants = [inner for inner in ast.walk(part) if isinstance(inner, ast.Constant)]
            found += [constant for constant in constants if constant.value in VARIANTS]
    return found


def test_nothing_else_compares_the_names_of_variants() -> None:
    assert compared_names(ast.parse("'fp16' in x, x == 'int8', x.startswith('int8')"))
    package = ROOT / "export/upperson_export"
    strings = [
        f"{path.relative_to(package)}:{constant.lineno}"
        for path in sorted(package.rglob("*.py"))
        if path.name != "variants.py"
        for constant in compared_names(ast.parse(path.read_text("utf-8")))
    ]
    assert strings == [], "ask the table in variants.py"
