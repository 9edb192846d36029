import tracemalloc

import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson_rt.errors import InputError
from upperson_scores.metrics import per_query_metrics, retrieval_metrics


def naive_metrics(scores, query_pids, gallery_pids):
    """The definitions of the module's docstring, written out with loops."""
    found = []
    for row, pid in zip(scores, query_pids, strict=True):
        ranked = gallery_pids[np.argsort(-row, kind="stable")]
        ranks = [rank for rank, one in enumerate(ranked, start=1) if one == pid]
        precisions = [hits / rank for hits, rank in enumerate(ranks, start=1)]
        found.append((ranks[0], sum(precisions) / len(ranks), len(ranks) / ranks[-1]))
    return np.array(found).T


def test_agrees_with_the_definitions():
    rng = np.random.default_rng(1)
    queries, gallery = rng.normal(size=(31, 6)), rng.normal(size=(57, 6))
    gallery_pids = rng.integers(0, 9, 57)
    query_pids = rng.choice(gallery_pids, 31)
    both = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery))
    unit_QD, unit_GD = (x.astype(np.float32) for x in both)
    first, ap, inp = naive_metrics(unit_QD @ unit_GD.T, query_pids, gallery_pids)

    found = per_query_metrics(queries, gallery, query_pids, gallery_pids, chunk_size=7)
    np.testing.assert_array_equal(found.first_rank, first)
    np.testing.assert_allclose(found.ap, ap, rtol=1e-12)
    np.testing.assert_allclose(found.inp, inp, rtol=1e-12)

    means = retrieval_metrics(queries, gallery, query_pids, gallery_pids)
    at = {f"R@{k}": 100 * np.mean(first <= k) for k in (1, 5, 10)}
    expected = at | {"mAP": 100 * ap.mean(), "mINP": 100 * inp.mean()}
    assert means.as_dict() == pytest.approx(expected)


def test_hand_computed_examples():
    # Ranked: right, wrong, right, wrong -> AP = (1/1 + 2/3) / 2, INP = 2/3.
    gallery = np.array([[1, 0.0], [1, 0.1], [1, 0.2], [1, 0.3]])
    means = retrieval_metrics([[1, 0]], gallery, ["a"], ["a", "b", "a", "b"]).as_dict()
    expected = {"R@1": 100, "R@5": 100, "R@10": 100, "mAP": 100 * 5 / 6, "mINP": 100 * 2 / 3}
    assert (means, list(means)) == (pytest.approx(expected), list(expected))
    # Ties keep the order of the gallery.
    found = per_query_metrics(np.ones((2, 3)), np.ones((4, 3)), [7, 8], [8, 7, 8, 7])
    assert found.first_rank.tolist() == [2, 1]
    assert found.hit_at(1).tolist() == [False, True]
    # No float tells these people apart.
    one, several = np.array([2**53 + 1], np.int64), np.array([2**53, 2**53 + 1], np.uint64)
    assert per_query_metrics([[1, 0]], np.eye(2), one, several).first_rank.tolist() == [2]


@pytest.mark.parametrize(
    ("queries", "gallery", "pids", "code", "fields"),
    [
        (np.eye(3), np.eye(3), ([0, 5, 6], [0, 1, 2]), "person_missing", {"count": 2, "row": 1}),
        (np.zeros((0, 3)), np.eye(3), None, "embeds_unfit", {"what": "query_embeds"}),
        (np.eye(2), np.eye(3), None, "dimensions_differ", {}),
        (np.array([[1, np.nan, 0]] * 3), np.eye(3), None, "embeds_unusable", {"row": 0}),
        (np.eye(3), np.zeros((3, 3)), None, "embeds_unusable", {"count": 3}),
        (np.eye(3), np.eye(3), ([0, 1, 2], [0, 1]), "ids_unfit", {"what": "gallery_pids"}),
    ],
)
def test_what_cannot_be_ranked_is_refused(queries, gallery, pids, code, fields):
    query_pids, gallery_pids = pids or (np.arange(len(queries)), np.arange(len(gallery)))
    with refused(code, InputError, **fields):
        retrieval_metrics(queries, gallery, query_pids, gallery_pids)


def test_memory_grows_with_the_gallery_not_with_all_pairs():
    rng = np.random.default_rng(3)
    embeds, pids = rng.normal(size=(2000, 8)).astype(np.float32), np.arange(2000) // 5
    tracemalloc.start()
    try:
        retrieval_metrics(embeds, embeds, pids, pids, chunk_size=256)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2000 * 2000 * 4 / 2  # Half of the float32 scores alone.
