"""The table of variants, and that no other code compares their names."""

import ast
from typing import get_args

import pytest

from tests.helpers.command_line import ROOT, run_code
from upperson_export.variants import (
    AS_RUN,
    EXACT,
    SIMULATED,
    VARIANTS,
    VariantName,
    is_half,
    variants_for,
)


@pytest.mark.parametrize("name", get_args(VariantName))
def test_every_row_is_consistent(name):
    row = VARIANTS[name]
    assert row.name == name
    assert row.candidates[-1] == EXACT, "the last candidate loses nothing"
    assert all(candidate in VARIANTS or row.int8 for candidate in row.candidates)
    assert row.ungated_candidate in row.own_candidates
    assert row.measured_on == (SIMULATED if row.float_type == "f16" else AS_RUN)
    assert 0.9 < row.min_cosine <= row.canary_min_cosine < 1
    assert row.chosen_by or name == EXACT
    # Engines are typed graphs for GPUs, and a variant that is slower there is no server's default.
    assert not row.tensorrt or (row.made_for, row.float_type) == ("gpu", "f16")
    assert not row.servers or not row.int8


def test_the_minimum_cosines_to_golden_samples_and_the_half_variants():
    floors = {name: row.canary_min_cosine for name, row in VARIANTS.items()}
    assert floors == {"fp32": 0.9999, "int8": 0.9998, "fp16": 0.999, "int8-fp16": 0.99}
    assert [name for name in VARIANTS if is_half(name)] == ["fp16", "int8-fp16"]
    assert not is_half("fp16-of-the-future")


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
def test_options_choose_variants(options, expected):
    assert variants_for(options) == expected


def test_the_table_needs_no_onnx():
    heavy = ["onnx", "onnx_ir", "onnxruntime", "torch"]
    done = run_code("import upperson_export.variants", without=heavy)
    assert done.returncode == 0, done.stderr


def compared_names(tree):
    """Return variants' names that are compared, or given to startswith or endswith."""
    found = []
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            parts = node.args if node.func.attr in ("startswith", "endswith") else []
        for part in parts:
            constants = [inner for inner in ast.walk(part) if isinstance(inner, ast.Constant)]
            found += [constant for constant in constants if constant.value in VARIANTS]
    return found


def test_no_other_code_compares_the_names_of_variants():
    assert compared_names(ast.parse("'fp16' in x, x == 'int8', x.startswith('int8')"))
    strings = [
        f"{path.name}:{constant.lineno}"
        for path in sorted((ROOT / "export/upperson_export").rglob("*.py"))
        if path.name != "variants.py"
        for constant in compared_names(ast.parse(path.read_text("utf-8")))
    ]
    assert strings == [], "use the table in variants.py"
