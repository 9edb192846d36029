"""What calibration finds for one tower: taken over from a file, or measured when first needed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from upperson_calibration.calibration_file import (
    FORMS,
    Form,
    FormRanges,
    TowerCalibration,
    six_digits,
)
from upperson_calibration.estimators import Estimator, estimate
from upperson_calibration.observe import Observed, observe
from upperson_calibration.sensitivity import LayerDamage, rank_by_damage
from upperson_calibration.smoothing import Smoothing, choose_smoothing
from upperson_export.extremes import largest_values
from upperson_rt.backends import open_backend
from upperson_rt.errors import InputError
from upperson_rt.files import sha256_of_file
from upperson_rt.towers import Tower, run_tower

Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""

DAMAGE_SAMPLES = 24
"""Enough for an order of the Linears; see `upperson_calibration.sensitivity`."""


class TowerCalibrator:
    """Measures one tower.

    Args:
        kind: Which tower it is.
        graph: Gives the float32 file of a form.
        inputs: Samples: uint8 [N, H, W, 3] or zero-padded int32 [N, L].
        estimator: How ranges follow from what is seen.
        reused: An earlier calibration of this tower; what it holds is not measured again.
        same_samples: Whether it saw these samples. If not, what it lacks is not measured either:
            one calibration has one set of samples.
        progress: Told what goes on.
    """

    def __init__(
        self,
        kind: Tower,
        graph: Callable[[Form], Path],
        inputs: npt.NDArray[Any],
        *,
        estimator: Estimator,
        reused: TowerCalibration | None,
        same_samples: bool,
        progress: Report,
    ) -> None:
        self.kind = kind
        self._graph = graph
        self._inputs = inputs
        self._estimator = estimator
        self._frozen = reused is not None and not same_samples
        self._progress = progress
        self._forms: dict[Form, FormRanges] = {} if reused is None else dict(reused.forms)
        self._smoothing = {} if reused is None else dict(reused.smoothing)
        self._damage = [] if reused is None else list(reused.damage)
        self._plain_seen: dict[str, Observed] | None = None
        self._embeds: npt.NDArray[np.float32] | None = None
        self._other: TowerCalibrator = self

    def know_other(self, other: "TowerCalibrator") -> None:
        """Take the other tower's embeddings: damage is measured by their rankings."""
        self._other = other

    def amax(self, form: Form) -> dict[str, float]:
        """Return the range of each activation that enters a block Linear.

        Raises:
            InputError: A value is not finite, or a calibration that is reused saw other samples
                and lacks it. The methods below raise the same.
        """
        if not self._ranges(form).amax:
            self._observe(form)
        return dict(self._ranges(form).amax)

    def largest_anywhere(self, form: Form) -> dict[str, float]:
        """Return the largest absolute value of every computed float tensor."""
        if not self._ranges(form).largest_anywhere:
            work = self._start(f"largest values of the {form} {self.kind} tower")
            found = largest_values(self._graph(form), self._inputs, progress=work)
            self._forms[form] = replace(self._ranges(form), largest_anywhere=six_digits(found))
        return dict(self._ranges(form).largest_anywhere)

    def smoothing(self) -> dict[str, Smoothing]:
        """Return what is done at each site."""
        if not self._smoothing:
            seen = self._observe("plain") if self._plain_seen is None else self._plain_seen
            self._smoothing = choose_smoothing(onnx.load(self._graph("plain")), seen)
            self._plain_seen = None  # A few MiB a tensor, of no more use.
        return self._smoothing

    def damage(self) -> list[LayerDamage]:
        """Return what int8 in each Linear costs, most harmful first."""
        if not self._damage:
            work = self._start(f"damage of each Linear of the {self.kind} tower")
            self._damage = rank_by_damage(
                self.kind,
                self._graph("smoothed"),
                self.amax("smoothed"),
                self._few,
                self._other._few_embeds(),
                progress=work,
            )
        return self._damage

    def found(self) -> TowerCalibration:
        """Return all that is known, to keep and to use again."""
        return TowerCalibration(
            graph_sha256=sha256_of_file(self._graph("plain")),
            forms={form: self._forms[form] for form in FORMS if form in self._forms},
            smoothing=self._smoothing,
            damage=tuple(self._damage),
        )

    def _ranges(self, form: Form) -> FormRanges:
        return self._forms.get(form, FormRanges())

    def _observe(self, form: Form) -> dict[str, Observed]:
        work = self._start(f"ranges of the {form} {self.kind} tower")
        seen = observe(self._graph(form), self._inputs, progress=work)
        if not self._ranges(form).amax:
            self._forms[form] = replace(
                self._ranges(form),
                amax=six_digits(estimate(seen, self._estimator)),
                largest=six_digits({name: tensor.amax for name, tensor in seen.items()}),
            )
        if form == "plain":
            self._plain_seen = seen
        return seen

    def _start(self, what: str) -> Callable[[int, int], None]:
        """Return where progress goes, unless nothing more may be measured."""
        if self._frozen:
            raise InputError(
                f"the calibration that is reused has no {what}, and the samples here are not those "
                "it was made from: give the same data and --calib-size, which fills the gap, or "
                "export without --calibration"
            )
        return lambda done, total: self._progress(what, done, total)

    @property
    def _few(self) -> npt.NDArray[Any]:
        return self._inputs[:: max(1, len(self._inputs) // DAMAGE_SAMPLES)][:DAMAGE_SAMPLES]

    def _few_embeds(self) -> npt.NDArray[np.float32]:
        if self._embeds is None:
            backend = open_backend(self._graph("plain"), "onnxruntime")
            self._embeds = run_tower(backend, self.kind, self._few)
        return self._embeds
