"""Do embeddings agree: by hand, by brute force, and with what is not finite."""

import numpy as np
import pytest

from upperson_rt.agreement import compare_embeds, is_constant, row_cosines
from upperson_scores.rankings import TOP_K, exchanged_item, top_k_overlap

NOT_FINITE = [np.nan, np.inf, -np.inf]


def test_cosines_errors_and_limits_that_rows_may_reach():
    expected = np.eye(4, dtype=np.float32)
    found = expected.copy()
    found[1] = [0.6, 0.8, 0, 0]
    found[2] *= 0.9  # Another length, the same direction.
    agreement = compare_embeds(expected, found)
    assert agreement.cosine_N.dtype == np.float64
    assert agreement.cosine_N == pytest.approx([1, 0.8, 1, 1])
    assert agreement.error_N == pytest.approx([0, 0.6, 0.1, 0])
    assert agreement.min_cosine == pytest.approx(0.8)
    assert agreement.p1_cosine == pytest.approx(np.quantile([1, 0.8, 1, 1], 0.01))
    assert agreement.median_cosine == pytest.approx(1.0)
    assert agreement.max_error == pytest.approx(0.6)
    assert (agreement.worst_cosine, agreement.worst_error, agreement.not_finite) == (1, 1, 0)
    reached = {"min_cosine": agreement.min_cosine}, {"max_error": agreement.max_error}
    for limits in ({}, *reached):
        assert agreement.agrees(**limits).all()
    for limits in ({"min_cosine": 0.81}, {"max_error": 0.59}):
        assert agreement.agrees(**limits).tolist() == [True, False, True, True]
    for limits in ({"min_cosine": np.nan}, {"max_error": np.nan}):
        assert not agreement.agrees(**limits).any()


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("which", ["expected", "found"])
def test_what_is_not_finite_never_agrees(value, which):
    rows = {"expected": np.eye(3, dtype=np.float32), "found": np.eye(3, dtype=np.float32)}
    rows[which][2, 0] = value
    agreement = compare_embeds(rows["expected"], rows["found"])
    assert (agreement.min_cosine, agreement.worst_cosine, agreement.worst_error) == (0.0, 2, 2)
    assert (agreement.max_error, agreement.not_finite) == (np.inf, 1)
    for limits in ({}, {"max_error": np.inf}):
        assert agreement.agrees(**limits).tolist() == [True, True, False]


def test_zeros_have_no_direction_and_constant_means_several_and_all_alike():
    rows = np.array([[0, 0], [3, 4], [1e-30, 0], [1e30, 0]], np.float32)
    assert row_cosines(rows, rows).tolist() == [0, 1, 1, 1]
    assert row_cosines(rows, np.zeros_like(rows)).tolist() == [0, 0, 0, 0]
    for constant in (np.ones((3, 4)), 1 + 1e-7 * np.eye(3)):
        assert is_constant(constant)
    for varied in (np.ones((1, 4)), np.eye(3), *(np.full((3, 4), value) for value in NOT_FINITE)):
        assert not is_constant(varied)


def test_exchanged_items_are_told_from_noise_and_from_twins():
    rng = np.random.default_rng(0)
    alone = rng.normal(size=(8, 16))
    alone[5] = alone[4]
    noisy = alone + 1e-4 * rng.normal(size=alone.shape)
    everything = np.arange(8)
    assert exchanged_item(alone, noisy, everything) is None
    assert exchanged_item(alone, noisy[[1, 0]], np.array([1, 0])) is None
    assert exchanged_item(alone, noisy[[0, 1, 2, 6]], np.array([0, 1, 2, 3])) == (3, 6)
    assert exchanged_item(alone, noisy[[4]], np.array([5])) is None  # Twins.
    assert exchanged_item(alone, rng.normal(size=(8, 16)), everything) is None  # Anything else.
    noisy[2, 0] = np.nan
    assert exchanged_item(alone, noisy, everything) is None


def shared_by_sorting(expected, found, k):
    tops = [np.argsort(-scores, axis=1, kind="stable")[:, :k] for scores in (expected, found)]
    return [len(set(a) & set(b)) / len(a) for a, b in zip(*np.array(tops).tolist(), strict=True)]


@pytest.mark.parametrize("levels", [3, 1000])
def test_overlap_counts_shared_firsts_and_ranks_ties_in_gallery_order(levels):
    rng = np.random.default_rng(levels)
    expected, found = rng.integers(0, levels, (2, 30, 20)).astype(np.float32)
    found[:, 0] = levels  # So that no query scores all alike.
    for k in (1, 5, 19, 20):
        literal = shared_by_sorting(expected, found, k)
        assert top_k_overlap(expected, found, k).tolist() == pytest.approx(literal)


def test_overlap_of_small_galleries_and_of_scores_that_say_nothing():
    expected, found = np.random.default_rng(0).normal(size=(2, 4, TOP_K - 1))
    assert top_k_overlap(expected, found).tolist() == [1.0] * 4, "all of it counts"
    best_first = -np.arange(20.0)[None]  # As the files are.
    for value in NOT_FINITE:  # It ranks last.
        assert top_k_overlap(best_first[:, :4], np.array([[value, 3, 2, 1]]), 2).tolist() == [0.5]
    for value in (0.5, *NOT_FINITE):
        assert top_k_overlap(best_first, np.full((1, 20), value)).tolist() == [0.0]
