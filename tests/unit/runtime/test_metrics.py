import tracemalloc

import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson_rt.errors import InputError
from upperson_scores.metrics import per_query_metrics, retrieval_metrics


def naive_metrics(scores, query_pids, gallery_pids):
    """The definitions of the module's docstring, written out with loops."""
    first, ap, inp = [], [], []
    for row, pid in zip(scores, query_pids, strict=True):
        ranked = gallery_pids[np.argsort(-row, kind="stable")]
        hits, precisions, last = 0, 0.0, 0
        for k, found in enumerate(ranked, start=1):
            if found == pid:
                hits += 1
                precisions += hits / k
                last = k
                if hits == 1:
                    first.append(k)
        ap.append(precisions / hits)
        inp.append(hits / last)
    return np.array(first), np.array(ap), np.array(inp)


def test_agrees_with_the_definitions():
    rng = np.random.default_rng(1)
    queries, gallery = rng.normal(size=(31, 6)), rng.normal(size=(57, 6))
    gallery_pids = rng.integers(0, 9, 57)
    query_pids = rng.choice(gallery_pids, 31)
    unit = [
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for x in (queries, gallery)
    ]
    first, ap, inp = naive_metrics(unit[0] @ unit[1].T, query_pids, gallery_pids)

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


def test_ids_that_no_float_tells_apart_are_different_people():
    large = 2**53
    found = per_query_metrics(
        [[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], np.array([large + 1], np.int64),
        np.array([large, large + 1], np.uint64),
    )  # fmt: skip
    assert found.first_rank.tolist() == [2]


def test_length_of_embeddings_does_not_matter():
    rng = np.random.default_rng(2)
    queries, gallery, pids = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), np.arange(5)
    scaled = gallery * np.array([[1], [100], [1e-3], [5], [7]])
    assert retrieval_metrics(queries, gallery, pids, pids) == retrieval_metrics(
        queries * 3, scaled, pids, pids
    )


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
    def peak_bytes(count):
        rng = np.random.default_rng(3)
        embeds, pids = rng.normal(size=(count, 8)).astype(np.float32), np.arange(count) // 5
        tracemalloc.start()
        try:
            retrieval_metrics(embeds, embeds, pids, pids, chunk_size=256)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak_bytes(1500), peak_bytes(3000)
    assert large < 2.1 * small
    assert large < 3000 * 3000 * 4 / 2  # Half of the float32 scores alone.
