"""Several runs that differ in their seed alone: which they are, and mean and spread over them."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from upperson.config import TrainConfig
from upperson_rt.errors import InputError
from upperson_rt.strict import Positive

SEEDS = "seeds.json"
SEEDS_PLAN = "seeds.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedsPlan:
    """The content of ``seeds.yaml``."""

    seeds: Positive  # Number of runs.
    config: TrainConfig  # Configuration of the first run; the others count its seed up.

    def to_yaml(self) -> str:
        """Return the plan as YAML that :func:`upperson.config.read_yaml` reads back."""
        text: str = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        return text

    def runs(self, folder: Path) -> Iterator[tuple[TrainConfig, Path]]:
        """Yield the configuration and the run folder of each run."""
        for seed in range(self.config.seed, self.config.seed + self.seeds):
            yield dataclasses.replace(self.config, seed=seed), folder / f"seed_{seed}"


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the ``results.json`` of one or more runs, in the order of their seeds.

    Returns:
        ``seeds`` and ``best_epochs`` (None where a run does not record it), and for ``val`` and
        ``test`` None or, by metric, ``mean``, ``std`` (of a sample: divided by one less than the
        number of runs; None for a single run), ``min``, ``max`` and ``values``.

    Raises:
        InputError: There is no run, or they were not measured on the same splits and metrics.
    """
    if not results:
        raise InputError("expected the results of at least one run, found none", code="no_runs")
    return {
        "seeds": [result.get("seed") for result in results],
        "best_epochs": [result.get("best_epoch") for result in results],
        **{split: _summarise_split(split, results) for split in ("val", "test")},
    }


def _summarise_split(
    split: str, results: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]] | None:
    measured: list[Mapping[str, float]] = [result.get(split) or {} for result in results]
    names = list(measured[0])
    for number, metrics in enumerate(measured, start=1):
        if set(metrics) != set(names):
            raise InputError(
                f"expected the same metrics of {split} from every run, found "
                f"{', '.join(names) or 'none'} in run 1 and {', '.join(metrics) or 'none'} in run "
                f"{number}: summarise runs of the same data set",
                code="runs_differ",
                split=split,
                run=number,
            )
    if not names:
        return None
    values = {name: [metrics[name] for metrics in measured] for name in names}
    return {
        name: {
            "mean": statistics.fmean(row),
            "std": statistics.stdev(row) if len(row) > 1 else None,
            "min": min(row),
            "max": max(row),
            "values": row,
        }
        for name, row in values.items()
    }
