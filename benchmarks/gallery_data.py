"""Synthetic vectors of pictures, clustered as crops of people are."""

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery import Item

_CAMERAS = 100
_CROPS = 20  # Of a person, one after another.
_KINDS = 64  # Of people; those of a kind look alike.
_QUERY_COSINE = 0.54  # Of a sentence and the best picture.


class SyntheticPeople:
    """Unit vectors in clusters of 20, the clusters in 64 groups, and far queries.

    The same row has the same vector each time.
    """

    def __init__(self, rows: int, dim: int, seed: int = 0) -> None:
        """Draw the centres of ``rows`` pictures, of vectors of ``dim`` values."""
        rng = np.random.default_rng(seed)
        people = -(-rows // _CROPS)
        kinds = _unit(rng.standard_normal((_KINDS, dim), np.float32))
        self._people = _unit(
            0.6 * kinds[rng.integers(0, _KINDS, people)]
            + _unit(rng.standard_normal((people, dim), np.float32))
        )
        self.rows, self.dim, self._seed = rows, dim, seed

    def vectors(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows start to stop as (N, D)."""
        rng = np.random.default_rng((self._seed, start))
        own = _unit(rng.standard_normal((stop - start, self.dim), np.float32))
        return _unit(self._people[np.arange(start, stop) // _CROPS] + 0.7 * own)

    def items(self, start: int, stop: int) -> list[Item]:
        """Return the items of these rows: 100 cameras, a picture a second, a track a person."""
        return [
            Item(
                key=f"{row:09d}",
                source=f"rtsp://camera-{row % _CAMERAS}#{row}",
                camera=f"camera-{row % _CAMERAS}",
                time=1_700_000_000.0 + row,
                track=f"{row // _CROPS:08d}",
                box=(10, 20, 74, 212),
                attributes={"score": 0.5},
            )
            for row in range(start, stop)
        ]

    def queries(self, count: int) -> NDArray[np.float32]:
        """Return (count, D) queries as far from the best picture as sentences are."""
        rng = np.random.default_rng((self._seed, 1, 1))
        near = np.concatenate(
            [self.vectors(row, row + 1) for row in rng.integers(0, self.rows, count).tolist()]
        )
        away = _unit(rng.standard_normal(near.shape, np.float32))
        return _unit(near + np.float32(np.sqrt(1 / _QUERY_COSINE**2 - 1)) * away)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    normalised: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normalised.astype(np.float32)
