"""One tower in every form that the ladder may try, each built once and only when it is asked for.

A rung says how: ``plain`` INT8, ``smoothed``, ``mixed-1/n`` (smoothed, with that share of the
Linears, the most harmful ones, left in float), or a float graph, ``fp16`` or ``fp32``.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from upperson_calibration.calibration_file import Form, TowerCalibration
from upperson_calibration.estimators import Estimator
from upperson_calibration.sensitivity import LayerDamage
from upperson_export.calibrator import Report, TowerCalibrator
from upperson_export.onnx import export_onnx
from upperson_export.parity import require_parity
from upperson_export.plain import PlainImageTower, PlainTextTower
from upperson_export.smooth import smooth
from upperson_export.variants import Variant, build_variant
from upperson_rt.towers import Tower

INT8_RUNGS = ("plain", "smoothed", "mixed-1/8", "mixed-1/4", "mixed-1/2")
"""From smallest to safest. A fraction is the share of Linears left in float, rounded up."""

RUNGS: dict[Variant, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "fp16": ("fp16", "fp32"),
    "int8": (*INT8_RUNGS, "fp32"),
    "int8-fp16": (*INT8_RUNGS, "fp16", "fp32"),
}
"""The ladder of each variant; the last rung loses nothing."""

_PARITY_INPUTS = 17

PlainTower = PlainImageTower | PlainTextTower


class TowerCandidates:
    """Builds the forms of one tower into a folder.

    Args:
        kind: Which tower it is.
        plain: The folded tower.
        inputs: Calibration samples: uint8 [N, H, W, 3] or zero-padded int32 [N, L].
        folder: Where files go.
        estimator: How ranges follow from what calibration sees.
        reused: An earlier calibration of this tower, or None.
        same_samples: Whether it saw these samples; see `TowerCalibrator`.
        progress: Told what goes on.
    """

    def __init__(
        self,
        kind: Tower,
        plain: PlainTower,
        inputs: npt.NDArray[Any],
        folder: Path,
        *,
        estimator: Estimator,
        reused: TowerCalibration | None,
        same_samples: bool,
        progress: Report,
    ) -> None:
        self.kind = kind
        self._plain = plain
        self._inputs = inputs
        self._folder = folder
        self._progress = progress
        self.calibrator = TowerCalibrator(
            kind,
            self._graph,
            inputs,
            estimator=estimator,
            reused=reused,
            same_samples=same_samples,
            progress=progress,
        )
        """What the forms are built from."""

    @cached_property
    def fp32(self) -> Path:
        """The float32 file, compared with torch."""
        return self._export(self._plain, f"{self.kind}.fp32.onnx")

    def build(self, variant: Variant, rung: str) -> Path:
        """Return the file of a form, building it the first time.

        Raises:
            InputError: A value is not finite, or a calibration that is reused lacks a range.
        """
        if rung == "fp32":
            return self.fp32
        if rung == "fp16":
            variant = "fp16"
        path = self._folder / f"{self.kind}.{variant}.{rung.replace('/', 'of')}.onnx"
        if not path.exists():
            form: Form = "plain" if rung in ("plain", "fp16") else "smoothed"
            amax = None if rung == "fp16" else self.calibrator.amax(form)
            largest = self.calibrator.largest_anywhere(form) if "fp16" in variant else None
            keep = [layer.node for layer in self.kept_float(rung)]
            # Loaded last, so that no calibration runs beside it.
            model = onnx.load(self._graph(form))
            onnx.save(build_variant(model, self.kind, variant, amax, keep, largest=largest), path)
        return path

    def kept_float(self, rung: str) -> list[LayerDamage]:
        """Return the Linears that a rung leaves in float, most harmful first."""
        if not rung.startswith("mixed-"):
            return []
        damage = self.calibrator.damage()
        return damage[: -(-len(damage) // int(rung.rpartition("/")[2]))]

    def _graph(self, form: Form) -> Path:
        return self.fp32 if form == "plain" else self._smoothed

    @cached_property
    def _smoothed(self) -> Path:
        factors = {
            site: found.factors
            for site, found in self.calibrator.smoothing().items()
            if found.alpha is not None
        }
        return self._export(smooth(self._plain, factors), f"{self.kind}.smoothed.onnx")

    def _export(self, tower: PlainTower, name: str) -> Path:
        path = self._folder / name
        self._progress(f"exporting the {self.kind} tower", 0, 1)
        # A batch of one would be taken for a constant.
        example = torch.from_numpy(np.concatenate([self._inputs[:2]] * 2))
        export_onnx(tower, self.kind, path, example=example)
        # A smoothed tower is compared with the tower as it was: smoothing must change nothing.
        require_parity(self._plain, path, self.kind, self._inputs[:_PARITY_INPUTS])
        self._progress(f"exporting the {self.kind} tower", 1, 1)
        return path
