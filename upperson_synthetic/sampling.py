"""Weighted choice, ranges and chances. Each draws exactly one number from an explicit generator."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def choose(rng: np.random.Generator, weights: Mapping[T, float]) -> T:
    """Draw one key of a table with probability proportional to its weight."""
    # numpy's own choice() turns Python objects into arrays and is about ten times slower.
    total = sum(weights.values())
    if not total > 0:
        raise ValueError("choose needs at least one positive weight")
    mark = float(rng.random()) * total
    last: T | None = None
    for key, weight in weights.items():
        if weight <= 0:
            continue
        last = key
        mark -= weight
        if mark < 0:
            return key
    # Rounding can leave a mark of exactly zero after the last key.
    return last  # type: ignore[return-value]


def between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    """Draw a number uniformly from a closed-open interval ``(low, high)``."""
    low, high = bounds
    return low + (high - low) * float(rng.random())


def chance(rng: np.random.Generator, probability: float) -> bool:
    """Return True with the given probability."""
    return bool(rng.random() < probability)
