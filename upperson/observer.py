"""Events of a run, for progress displays, benchmarks and tests. Loads no torch."""

from dataclasses import dataclass

from upperson_scores.metrics import RetrievalMetrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimisation step that is done."""

    epoch: int  # From 0.
    number: int  # In its epoch, from 0.
    steps: int  # Steps in an epoch.
    loss: float
    lr: float
    images_per_s: float
    """Images of the global batch, by the time since the step before; loading is in it."""


class Observer:
    """Ignores every event; subclasses override those they need."""

    def note(self, text: str) -> None:
        """A notice for the user, in one line."""

    def caching(self, done: int, total: int) -> None:
        """So many pictures are in the cache."""

    def teaching(self, done: int, total: int) -> None:
        """A teacher has embedded so many pictures."""

    def expecting(self, step_s: float, steps: int) -> None:
        """Before the first step: how long one should take, loading apart, and how many are left."""

    def step(self, step: Step) -> None:
        """An optimisation step is done."""

    def evaluated(self, epoch: int, split: str, metrics: RetrievalMetrics) -> None:
        """A split was evaluated after an epoch, counted from 0."""

    def measured(self, best_epoch: int, split: str, metrics: RetrievalMetrics) -> None:
        """A split was measured on the saved run, whose epoch counts from 1."""
