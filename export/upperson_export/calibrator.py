"""What calibration finds for one tower: taken over from a file, or measured when first needed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from upperson_calibration.calibration_file import (
    NOTHING_SEEN,
    Calibration,
    Ranges,
    Smoothness,
    TowerCalibration,
    six_digits,
)
from upperson_calibration.graph import TowerGraph
from upperson_calibration.observe import Observed, largest_values, observe
from upperson_calibration.ranges import Estimator, estimate
from upperson_calibration.samples import CalibrationSet
from upperson_calibration.sensitivity import LayerDamage, rank_by_damage
from upperson_calibration.smoothing import Smoothing, choose_smoothing
from upperson_rt.backends import open_backend
from upperson_rt.errors import InputError
from upperson_rt.files import sha256_of_file
from upperson_rt.towers import Tower, run_tower

StageProgress: TypeAlias = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""

DAMAGE_SAMPLES = 24
"""Enough for an order of the Linears; see `upperson_calibration.sensitivity`."""


@dataclass(frozen=True, kw_only=True)
class CalibrationTask:
    """What both towers of a model are calibrated with."""

    samples: CalibrationSet

    estimator: Estimator
    """How ranges follow from what is seen."""

    reused: Calibration | None
    """An earlier calibration of the model; what it holds is not measured again."""

    progress: StageProgress

    @cached_property
    def may_measure(self) -> bool:
        """Whether anything may be measured: one calibration has one set of samples."""
        return self.reused is None or self.reused.samples.same_as(self.samples)


class TowerCalibrator:
    """Measures one tower.

    Args:
        tower: Which tower it is.
        graph: Gives the float32 file, plain or smoothed.
        task: What is measured, and how.
    """

    def __init__(
        self, tower: Tower, graph: Callable[[Smoothness], TowerGraph], task: CalibrationTask
    ) -> None:
        self.tower = tower
        self._graph = graph
        self._task = task
        self._inputs = task.samples.inputs(tower)
        reused = None if task.reused is None else task.reused.towers.get(tower)
        self._ranges: dict[Smoothness, Ranges] = {} if reused is None else dict(reused.forms)
        self._smoothing = {} if reused is None else dict(reused.smoothing)
        self._damage = [] if reused is None else list(reused.damage)
        self._plain_seen: dict[str, Observed] | None = None
        self._embeds: npt.NDArray[np.float32] | None = None
        self._other: TowerCalibrator = self

    def know_other(self, other: "TowerCalibrator") -> None:
        """Take the other tower's embeddings: damage is measured by their rankings."""
        self._other = other

    def amax(self, smoothness: Smoothness) -> dict[str, float]:
        """Return the range of each activation that enters a block Linear.

        Raises:
            InputError: A value is not finite, or a calibration that is reused saw other samples
                and lacks it. The methods below raise the same.
        """
        if not self._known(smoothness).amax:
            self._observe(smoothness)
        return dict(self._known(smoothness).amax)

    def largest_anywhere(self, smoothness: Smoothness) -> dict[str, float]:
        """Return the largest absolute value of every computed float tensor."""
        known = self._known(smoothness)
        if not known.largest_anywhere:
            progress = self._start(f"largest values of the {smoothness} {self.tower} tower")
            found = largest_values(self._graph(smoothness), self._inputs, progress=progress)
            known = replace(known, largest_anywhere=six_digits(found))
            self._ranges[smoothness] = known
        return dict(known.largest_anywhere)

    def smoothing(self) -> dict[str, Smoothing]:
        """Return what is done at each site."""
        if not self._smoothing:
            seen = self._observe("plain") if self._plain_seen is None else self._plain_seen
            self._smoothing = choose_smoothing(self._graph("plain"), seen)
            self._plain_seen = None  # A few MiB a tensor, of no more use.
        return self._smoothing

    def damage(self) -> list[LayerDamage]:
        """Return what int8 in each Linear costs, most harmful first."""
        if not self._damage:
            progress = self._start(f"damage of each Linear of the {self.tower} tower")
            self._damage = rank_by_damage(
                self._graph("smoothed"),
                self.amax("smoothed"),
                self._few,
                self._other._few_embeds(),
                progress=progress,
            )
        return self._damage

    def found(self) -> TowerCalibration:
        """Return all that is known, to keep and to use again."""
        return TowerCalibration(
            graph_sha256=sha256_of_file(self._graph("plain").file),
            forms=dict(self._ranges),
            smoothing=self._smoothing,
            damage=tuple(self._damage),
        )

    def _known(self, smoothness: Smoothness) -> Ranges:
        return self._ranges.get(smoothness, NOTHING_SEEN)

    def _observe(self, smoothness: Smoothness) -> dict[str, Observed]:
        progress = self._start(f"ranges of the {smoothness} {self.tower} tower")
        seen = observe(self._graph(smoothness), self._inputs, progress=progress)
        known = self._known(smoothness)
        if not known.amax:
            self._ranges[smoothness] = replace(
                known,
                amax=six_digits(estimate(seen, self._task.estimator)),
                largest=six_digits({name: tensor.amax for name, tensor in seen.items()}),
            )
        if smoothness == "plain":
            self._plain_seen = seen
        return seen

    def _start(self, stage: str) -> Callable[[int, int], None]:
        """Return where progress goes, unless nothing more may be measured."""
        if not self._task.may_measure:
            raise InputError(
                f"the calibration that is reused has no {stage}, and the samples here are not "
                "those it was made from: give the same data and --calib-size, which fills the gap, "
                "or export without --calibration"
            )
        return lambda done, total: self._task.progress(stage, done, total)

    @property
    def _few(self) -> npt.NDArray[Any]:
        return self._inputs[:: max(1, len(self._inputs) // DAMAGE_SAMPLES)][:DAMAGE_SAMPLES]

    def _few_embeds(self) -> npt.NDArray[np.float32]:
        if self._embeds is None:
            backend = open_backend(self._graph("plain").file, "onnxruntime")
            self._embeds = run_tower(backend, self.tower, self._few)
        return self._embeds
