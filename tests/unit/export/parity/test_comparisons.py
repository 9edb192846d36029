"""Rankings by brute force, and what is compared: towers alone, together, from file or string."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import HEIGHT_PX, WIDTH_PX
from tests.helpers.toy_parity import BATCH_SIZES, check, honest, rotated_rows, subject
from upperson_export.parity.comparisons import compare_rankings, kendall_tau_b, make_reference
from upperson_rt.errors import IntegrityError


def literal_tau_b(a, b):
    """Kendall's tau-b from its definition, pair by pair."""
    concordant = discordant = tied_a = tied_b = 0
    pairs = list(combinations(range(len(a)), 2))
    for i, j in pairs:
        product = (a[i] - a[j]) * (b[i] - b[j])
        concordant += product > 0
        discordant += product < 0
        tied_a += a[i] == a[j]
        tied_b += b[i] == b[j]
    return (concordant - discordant) / np.sqrt((len(pairs) - tied_a) * (len(pairs) - tied_b))


def test_tau_b_equals_its_definition_with_and_without_ties():
    for levels in (3, 1000):
        rng = np.random.default_rng(levels)
        for length in (2, 5, 30):
            a, b = rng.integers(0, levels, (2, length)).astype(np.float32)
            if np.ptp(a) and np.ptp(b):
                assert kendall_tau_b(a, b) == pytest.approx(literal_tau_b(a, b))


@pytest.mark.parametrize(
    ("b", "expected"),
    [
        ([3.0, 8.0, 13.0, 18.0], 1.0),
        ([-1.0, -2.0, -3.0, -4.0], -1.0),
        ([2.0, 1.0, 3.0, 4.0], 4 / 6),  # One of six pairs is swapped: (5 - 1) / 6.
        ([1.0, 1.0, 3.0, 4.0], 5 / np.sqrt(30)),  # One pair is tied in b: 5 / sqrt(6 * 5).
        ([1.0] * 4, 0.0),
        ([1.0], 0.0),
    ],
)
def test_tau_b_of_known_rankings(b, expected):
    a = np.array([1.0, 2.0, 3.0, 4.0])[: len(b)]
    assert kendall_tau_b(a, np.array(b)) == pytest.approx(expected)


def test_ranking_agreement_of_a_small_gallery_and_of_nan():
    expected = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    same = compare_rankings(expected, expected)
    assert same.as_dict() == {
        "top_k": 3, "mean_overlap": 1.0, "min_overlap": 1.0, "mean_tau": 1.0, "min_tau": 1.0
    }  # fmt: skip
    broken = compare_rankings(expected, np.array([[3.0, 2.0, 1.0], [np.nan] * 3]), top_k=2)
    assert (broken.min_overlap, broken.mean_overlap) == (0.0, 0.5)
    assert (broken.min_tau, broken.mean_tau) == (0.0, 0.5)


def test_preprocessing_that_differs_is_found_on_the_way_from_the_file(inputs):
    class UpsideDown:
        def encode_images(self, images, batch_size):
            turned = [np.array(Image.open(file).convert("RGB"))[::-1] for file in images]
            size = (WIDTH_PX, HEIGHT_PX)
            return honest("image", np.stack([Image.fromarray(a).resize(size) for a in turned]))

        def encode_texts(self, texts, batch_size):
            return honest("text", inputs.sentence_ids_NL)

    result = check(subject(honest, end_to_end=UpsideDown()), inputs)
    failing = {one.comparison.inputs for one in result.judged if one.fault}
    assert failing == {"files"}
    assert f"image {inputs.files[0].parent}" in result.message()


def test_both_towers_are_ranked_together(inputs):
    both = [one.comparison for one in check(subject(rotated_rows), inputs).judged
            if one.comparison.tower == "both"]  # fmt: skip
    assert [one.batch_size for one in both] == BATCH_SIZES
    assert all(one.ranking is not None for one in both)
    alone, *batches = [one.ranking.mean_tau for one in both if one.ranking]
    assert alone == 1.0
    assert max(batches) < 0.9


@pytest.mark.parametrize(
    ("value", "code"), [(np.nan, "reference_not_finite"), (0.25, "reference_constant")]
)
def test_a_broken_reference_and_embeddings_of_another_shape_are_refused(inputs, value, code):
    with refused(code, IntegrityError):
        make_reference(subject(lambda _, batch: np.full((len(batch), 16), value, "f4")), inputs)
    with refused("shape_differs", IntegrityError, found=(11, 8), expected=(11, 16)):
        check(subject(lambda tower, batch: honest(tower, batch)[:, :8]), inputs)
