"""The table of variants, and that no other code compares their names."""

from typing import get_args

import pytest

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
    assert row.ungated_candidate in row.own_candidates
    assert row.measured_on == (SIMULATED if row.float_type == "f16" else AS_RUN)
    assert 0.9 < row.min_cosine <= row.canary_min_cosine < 1
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
