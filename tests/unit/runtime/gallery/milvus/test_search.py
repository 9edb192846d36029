"""Exact order on a server that picks the worst of several rows with equal scores."""

import re

import numpy as np
import pytest

from upperson_milvus import store
from upperson_rt.gallery import Hit, Item

QUERY = np.ones((1, 1), np.float32)


class Contrary:
    """A collection whose search leaves out the lowest ids among rows with equal scores."""

    def __init__(self, hits):
        self.hits = hits

    def search(self, queries, limit, condition):
        gone = {int(id_) for id_ in re.findall(r"\d+", condition)}
        left = [hit for hit in self.hits if hit.id not in gone and hit.item.track not in condition]
        best = sorted(left, key=lambda hit: (-hit.score, -hit.id))[:limit]
        return [sorted(best, key=lambda hit: (-hit.score, hit.id))] * len(queries)


def some_hits(count, scores, tracks):
    rng = np.random.default_rng(count)
    return [
        Hit(
            id=1000 + number,
            score=float(rng.integers(scores)),
            item=Item(key=str(number), track=f"track-{rng.integers(tracks)}."),
        )
        for number in range(count)
    ]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """The most that one request may return."""
    monkeypatch.setattr(store, "MOST_HITS", 64)


@pytest.mark.parametrize("scores", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 2, 10, 31])
def test_ties_are_ordered_by_id(scores, k):
    hits = some_hits(60, scores, 5)
    expected = sorted(hits, key=lambda hit: (-hit.score, hit.id))
    assert store.best_rows(Contrary(hits), QUERY, k, "") == [expected[:k]]


@pytest.mark.parametrize("scores", [10, 40])
@pytest.mark.parametrize("tracks", [1, 4, 50])
@pytest.mark.parametrize("k", [1, 3, 20, 35, 50])
def test_the_best_of_each_track(scores, tracks, k):
    """More pictures than one request returns, but not more with one score."""
    hits = some_hits(200, scores, tracks)
    expected, seen = [], set()
    for hit in sorted(hits, key=lambda hit: (-hit.score, hit.id)):
        if hit.item.track not in seen:
            expected.append(hit)
            seen.add(hit.item.track)
    assert store.best_of_each_track(Contrary(hits), QUERY, k, "") == expected[:k]
