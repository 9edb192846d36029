"""One tower in every form that the ladder may try, each built once and only when it is asked for.

A rung says how: ``plain`` INT8, ``smoothed``, ``mixed-1/n`` (smoothed, with that share of the
Linears, the most harmful ones, left in float), or a float graph, ``fp16`` or ``fp32``.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from upperson_calibration.calibration_file import TowerCalibration
from upperson_calibration.estimators import Estimator, estimate
from upperson_calibration.observe import Observed, observe
from upperson_calibration.sensitivity import LayerDamage, rank_by_damage
from upperson_calibration.smoothing import Smoothing, choose_smoothing
from upperson_export.extremes import largest_values
from upperson_export.onnx import export_onnx
from upperson_export.parity import require_parity
from upperson_export.plain import PlainImageTower, PlainTextTower
from upperson_export.smooth import smooth
from upperson_export.variants import Variant, build_variant
from upperson_rt.backends import open_backend
from upperson_rt.bundle import sha256_of_file
from upperson_rt.canaries import Tower
from upperson_rt.encoder import run_tower

Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""

INT8_RUNGS = ("plain", "smoothed", "mixed-1/8", "mixed-1/4", "mixed-1/2")
"""From smallest to safest. A fraction is the share of Linears left in float, rounded up."""

RUNGS: dict[Variant, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "fp16": ("fp16", "fp32"),
    "int8": (*INT8_RUNGS, "fp32"),
    "int8-fp16": (*INT8_RUNGS, "fp16", "fp32"),
}
"""The ladder of each variant; the last rung loses nothing."""

DAMAGE_SAMPLES = 24
"""Enough for an order of the Linears; see `upperson_calibration.sensitivity`."""

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
        reused: An earlier calibration of this graph; nothing is observed then.
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
        progress: Report,
    ) -> None:
        self.kind = kind
        self._plain = plain
        self._inputs = inputs
        self._folder = folder
        self._estimator = estimator
        self._reused = reused
        self._progress = progress
        self._other: TowerCandidates = self

    @cached_property
    def fp32(self) -> Path:
        """The float32 file, compared with torch."""
        return self._export(self._plain, f"{self.kind}.fp32.onnx")

    @cached_property
    def embeds(self) -> npt.NDArray[np.float32]:
        """float32 embeddings of a few calibration samples, [n, E]."""
        backend = open_backend(self.fp32, "onnxruntime")
        return run_tower(backend, self.kind, self._few)

    @property
    def _few(self) -> npt.NDArray[Any]:
        return self._inputs[:: max(1, len(self._inputs) // DAMAGE_SAMPLES)][:DAMAGE_SAMPLES]

    def know_other(self, other: "TowerCandidates") -> None:
        """Take the other tower's embeddings: damage is measured by their rankings."""
        self._other = other

    def build(self, variant: Variant, rung: str) -> Path:
        """Return the file of a form, building it the first time.

        Raises:
            InputError: A value is not finite, or a calibration that is reused lacks a range.
        """
        if rung == "fp32":
            return self.fp32
        if rung == "fp16":
            return self._fp16
        path = self._folder / f"{self.kind}.{variant}.{rung.replace('/', 'of')}.onnx"
        if not path.exists():
            graph = self.fp32 if rung == "plain" else self._smoothed
            model = onnx.load(graph)
            largest = None
            if variant == "int8-fp16":
                largest = self._largest if rung == "plain" else self._smoothed_largest
            keep = self.kept_float(rung)
            amax = self._amax if rung == "plain" else self._smoothed_amax
            built = build_variant(model, self.kind, variant, amax, keep, largest=largest)
            onnx.save(built, path)
        return path

    def kept_float(self, rung: str) -> list[str]:
        """Return the MatMul nodes that a rung leaves in float, most harmful first."""
        if not rung.startswith("mixed-"):
            return []
        count = -(-len(self._damage) // int(rung.rpartition("/")[2]))
        return [layer.node for layer in self._damage[:count]]

    def calibration(self) -> TowerCalibration:
        """Return what was found so far, to keep and to use again."""
        found = self.__dict__
        smoothed = "_smoothing" in found
        observed = self._smoothed_observed if smoothed else self._observed
        return TowerCalibration(
            graph_sha256=sha256_of_file(self.fp32),
            estimator=self._estimator,
            amax=self._smoothed_amax if smoothed else self._amax,
            largest={name: seen.amax for name, seen in observed.items()},
            smoothing=self._smoothing if smoothed else {},
            damage=tuple(self._damage) if "_damage" in found else (),
        )

    @cached_property
    def _fp16(self) -> Path:
        path = self._folder / f"{self.kind}.fp16.onnx"
        built = build_variant(onnx.load(self.fp32), self.kind, "fp16", largest=self._largest)
        onnx.save(built, path)
        return path

    @cached_property
    def _largest(self) -> dict[str, float]:
        return self._extremes(self.fp32, f"largest values of the {self.kind} tower")

    @cached_property
    def _smoothed_largest(self) -> dict[str, float]:
        work = f"largest values of the smoothed {self.kind} tower"
        return self._extremes(self._smoothed, work)

    @cached_property
    def _observed(self) -> dict[str, Observed]:
        return self._observe(self.fp32, f"calibrating the {self.kind} tower")

    @cached_property
    def _amax(self) -> dict[str, float]:
        return estimate(self._observed, self._estimator)

    @cached_property
    def _smoothing(self) -> dict[str, Smoothing]:
        if self._reused is not None and self._reused.smoothing:
            return dict(self._reused.smoothing)
        return choose_smoothing(onnx.load(self.fp32), self._observed)

    @cached_property
    def _smoothed(self) -> Path:
        factors = {
            site: found.factors
            for site, found in self._smoothing.items()
            if found.alpha is not None
        }
        return self._export(smooth(self._plain, factors), f"{self.kind}.smoothed.onnx")

    @cached_property
    def _smoothed_observed(self) -> dict[str, Observed]:
        return self._observe(self._smoothed, f"calibrating the smoothed {self.kind} tower")

    @cached_property
    def _smoothed_amax(self) -> dict[str, float]:
        return estimate(self._smoothed_observed, self._estimator)

    @cached_property
    def _damage(self) -> list[LayerDamage]:
        if self._reused is not None and self._reused.damage:
            return list(self._reused.damage)
        work = f"sensitivity of the {self.kind} tower"
        return rank_by_damage(
            self.kind,
            self._smoothed,
            self._smoothed_amax,
            self._few,
            self._other.embeds,
            progress=lambda done, total: self._progress(work, done, total),
        )

    def _observe(self, graph: Path, work: str) -> dict[str, Observed]:
        return observe(
            graph,
            self._inputs,
            progress=lambda done, total: self._progress(work, done, total),
        )

    def _extremes(self, graph: Path, work: str) -> dict[str, float]:
        return largest_values(
            graph, self._inputs, progress=lambda done, total: self._progress(work, done, total)
        )

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
