"""Rankings by brute force, and what is compared: towers alone, together, from file or string."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.toy_bundle import HEIGHT_PX, WIDTH_PX
from tests.helpers.toy_parity import BATCH_SIZES, check, honest, subject
from upperson_export.parity.comparisons import compare_rankings, kendall_tau_b, make_reference
from upperson_export.parity.inputs import ParityInputs
from upperson_rt.errors import IntegrityError


def literal_tau_b(a: np.ndarray, b: np.ndarray) -> float:
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


@pytest.mark.parametrize("levels", [3, 1000])
def test_tau_b_equals_its_definition_with_and_without_ties(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for length in (2, 5, 30):
        a, b = rng.integers(0, levels, (2, length)).astype(np.float32)
        if np.ptp(a) and np.ptp(b):
            assert kendall_tau_b(a, b) == pytest.approx(literal_tau_b(a, b))


def test_tau_b_of_known_rankings() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert kendall_tau_b(a, a * 5 - 2) == 1.0
    assert kendall_tau_b(a, -a) == -1.0
    # One of six pairs is turned round: (5 - 1) / 6.
    assert kendall_tau_b(a, np.array([2.0, 1.0, 3.0, 4.0])) == pytest.approx(4 / 6)
    # Worked by hand: C = 5, D = 0, one pair tied in b only: 5 / sqrt(6 * 5).
    assert kendall_tau_b(a, np.array([1.0, 1.0, 3.0, 4.0])) == pytest.approx(5 / np.sqrt(30))
    assert kendall_tau_b(a, np.ones(4)) == 0.0
    assert kendall_tau_b(a[:1], a[:1]) == 0.0


def test_ranking_agreement_of_a_small_gallery_and_of_nan() -> None:
    expected = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    same = compare_rankings(expected, expected)
    assert same.as_dict() == {
        "top_k": 3, "mean_overlap": 1.0, "min_overlap": 1.0, "mean_tau": 1.0, "min_tau": 1.0
    }  # fmt: skip
    broken = compare_rankings(expected, np.array([[3.0, 2.0, 1.0], [np.nan] * 3]), top_k=2)
    assert (broken.min_overlap, broken.mean_overlap) == (0.0, 0.5)
    assert (broken.min_tau, broken.mean_tau) == (0.0, 0.5)


def test_preprocessing_that_differs_is_found_on_the_way_from_the_file(
    inputs: ParityInputs,
) -> None:
    class UpsideDown:
        def encode_images(self, images: Sequence[Path], batch_size: int) -> np.ndarray:
            turned = [np.array(Image.open(file).convert("RGB"))[::-1] for file in images]
            size = (WIDTH_PX, HEIGHT_PX)
            return honest("image", np.stack([Image.fromarray(a).resize(size) for a in turned]))

        def encode_texts(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
            return honest("text", inputs.sentence_ids_NL)

    result = check(subject(honest, whole_way=UpsideDown()), inputs)
    failing = {one.comparison.inputs for one in result.judged if one.fault}
    assert failing == {"files"}
    assert f"image {inputs.files[0].parent}" in result.message()


def test_both_towers_are_ranked_together(inputs: ParityInputs) -> None:
    def rotated_rows(tower: str, batch: np.ndarray) -> np.ndarray:
        return np.roll(honest(tower, batch), 1, axis=0)

    both = [one.comparison for one in check(subject(rotated_rows), inputs).judged
            if one.comparison.tower == "both"]  # fmt: skip
    assert [one.batch_size for one in both] == BATCH_SIZES
    assert all(one.ranking is not None for one in both)
    alone, *batches = [one.ranking.mean_tau for one in both if one.ranking]
    assert alone == 1.0
    assert max(batches) < 0.9


@pytest.mark.parametrize("value", [np.nan, 0.25])
def test_a_reference_that_is_broken_itself_is_refused(inputs: ParityInputs, value: float) -> None:
    def broken(tower: str, batch: np.ndarray) -> np.ndarray:
        return np.full((len(batch), 16), value, np.float32)

    match = "no finite embedding" if np.isnan(value) else "every image the same embedding"
    with pytest.raises(IntegrityError, match=match):
        make_reference(subject(broken), inputs)


def test_embeddings_of_another_shape_are_refused(inputs: ParityInputs) -> None:
    def short(tower: str, batch: np.ndarray) -> np.ndarray:
        return honest(tower, batch)[:, :8]

    with pytest.raises(IntegrityError, match=r"shape \(11, 8\), expected \(11, 16\)"):
        check(subject(short), inputs)
