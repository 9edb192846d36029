"""The candidates of the precision search, and the calibration that some of them need.

A candidate is ``plain`` int8, ``smoothed``, ``mixed-1/n`` (smoothed, with that share of the
Linears, the most sensitive ones, left in float), or the name of a float variant.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from upperson_calibration.calibration_file import (
    NO_RANGES,
    Calibration,
    Ranges,
    Smoothness,
    TowerCalibration,
    six_digits,
)
from upperson_calibration.graph import TowerGraph
from upperson_calibration.ranges import Estimator, Observed, estimate, largest_values, observe
from upperson_calibration.samples import CalibrationSet
from upperson_calibration.sensitivity import LayerSensitivity, rank_by_sensitivity
from upperson_calibration.smoothing import Smoothing, choose_smoothing
from upperson_export.fold import smooth
from upperson_export.graphs import (
    Fp16Accumulation,
    build_variant,
    export_onnx,
    float_type_of,
    make_overflow_safe,
    open_simulated,
    write_with_weights,
)
from upperson_export.parity import require_parity
from upperson_export.plain import PlainTower
from upperson_export.precision_search import RetrievalSplit, SplitEmbeds
from upperson_export.variants import (
    EXACT,
    INT8_CANDIDATES,
    SIMULATED,
    VARIANTS,
    Int8Candidate,
    VariantName,
)
from upperson_rt.backends import open_backend
from upperson_rt.bundle import Bundle
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError
from upperson_rt.files import sha256_of_file
from upperson_rt.towers import Tower, run_tower

# --- Calibration of one tower: taken over from a file, or measured when first needed

StageProgress: TypeAlias = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

SENSITIVITY_SAMPLES = 24
"""Enough to rank the Linears; see `upperson_calibration.sensitivity`."""


@dataclass(frozen=True, kw_only=True)
class CalibrationTask:
    """Settings of the calibration of both towers."""

    samples: CalibrationSet
    estimator: Estimator
    reused: Calibration | None
    """An earlier calibration of the model; what it holds is not measured again."""
    progress: StageProgress

    @cached_property
    def may_measure(self) -> bool:
        """Whether measuring is allowed: one calibration has one set of samples."""
        return self.reused is None or self.reused.samples.same_as(self.samples)


class TowerCalibrator:
    """Measures one tower."""

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
        self._sensitivity = [] if reused is None else list(reused.damage)
        self._plain_observed: dict[str, Observed] | None = None
        self._embeds: npt.NDArray[np.float32] | None = None
        self._other: TowerCalibrator = self

    def set_other(self, other: "TowerCalibrator") -> None:
        """Set the other tower, whose embeddings the layer sensitivity needs for rankings."""
        self._other = other

    def amax(self, smoothness: Smoothness) -> dict[str, float]:
        """Return the range of each activation that enters a block Linear."""
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
        """Return the smoothing of each site."""
        if not self._smoothing:
            observed = self._plain_observed or self._observe("plain")
            self._smoothing = choose_smoothing(self._graph("plain"), observed)
            self._plain_observed = None  # A few MiB a tensor, of no more use.
        return self._smoothing

    def sensitivity(self) -> list[LayerSensitivity]:
        """Return the sensitivity of each Linear to int8, most sensitive first."""
        if not self._sensitivity:
            progress = self._start(f"layer sensitivity of the {self.tower} tower")
            self._sensitivity = rank_by_sensitivity(
                self._graph("smoothed"),
                self.amax("smoothed"),
                self._few,
                self._other._few_embeds(),
                progress=progress,
            )
        return self._sensitivity

    def found(self) -> TowerCalibration:
        """Return all that is known, for the calibration file."""
        return TowerCalibration(
            graph_sha256=sha256_of_file(self._graph("plain").file),
            forms=dict(self._ranges),
            smoothing=self._smoothing,
            damage=tuple(self._sensitivity),
        )

    def _known(self, smoothness: Smoothness) -> Ranges:
        return self._ranges.get(smoothness, NO_RANGES)

    def _observe(self, smoothness: Smoothness) -> dict[str, Observed]:
        progress = self._start(f"ranges of the {smoothness} {self.tower} tower")
        observed = observe(self._graph(smoothness), self._inputs, progress=progress)
        known = self._known(smoothness)
        if not known.amax:
            self._ranges[smoothness] = replace(
                known,
                amax=six_digits(estimate(observed, self._task.estimator)),
                largest=six_digits({name: tensor.amax for name, tensor in observed.items()}),
            )
        if smoothness == "plain":
            self._plain_observed = observed
        return observed

    def _start(self, stage: str) -> Callable[[int, int], None]:
        """Return the progress of a stage, if measuring is allowed."""
        if not self._task.may_measure:
            raise InputError(
                f"the reused calibration has no {stage}, and was made from other samples: give the "
                "same data and --calib-size, which fills the gap, or export without --calibration",
                code="calibration_incomplete",
                missing=stage,
            )
        return partial(self._task.progress, stage)

    @property
    def _few(self) -> npt.NDArray[Any]:
        return self._inputs[:: max(1, len(self._inputs) // SENSITIVITY_SAMPLES)][
            :SENSITIVITY_SAMPLES
        ]

    def _few_embeds(self) -> npt.NDArray[np.float32]:
        if self._embeds is None:
            backend = open_backend(self._graph("plain").file, "onnxruntime")
            self._embeds = run_tower(backend, self.tower, self._few)
        return self._embeds


# --- The candidates of a tower: each is built once, and embeds the split once


_PARITY_INPUTS = 17


class TowerCandidates:
    """Builds the candidates of one tower into a folder."""

    def __init__(self, kind: Tower, plain: PlainTower, folder: Path, task: CalibrationTask) -> None:
        self.kind = kind
        self._plain = plain
        self._inputs = task.samples.inputs(kind)
        self._folder = folder
        self._progress = task.progress
        self._accumulation: dict[Path, Fp16Accumulation] = {}
        self.calibrator = TowerCalibrator(kind, self._graph, task)

    @cached_property
    def fp32(self) -> TowerGraph:
        """The float32 graph, compared with torch."""
        return self._export(self._plain, f"{self.kind}.fp32.onnx")

    def build(self, variant: VariantName, candidate: str) -> Path:
        """Return the file of a candidate, building it the first time."""
        made = VARIANTS[variant].variant_of(candidate)
        if made.name == EXACT:
            return self.fp32.file
        path = self._folder / f"{self.kind}.{made.name}.{candidate.replace('/', 'of')}.onnx"
        if not path.exists():
            which = INT8_CANDIDATES.get(candidate, Int8Candidate()).graph
            amax = self.calibrator.amax(which) if made.int8 else None
            half = made.float_type == "f16"
            largest = self.calibrator.largest_anywhere(which) if half else None
            keep = [layer.node for layer in self.kept_float(candidate)]
            graph = self._graph(which)
            ir.save(build_variant(graph, made.name, amax, keep, largest=largest), path)
        return path

    def make_overflow_safe(self, variant: VariantName, candidate: str) -> Fp16Accumulation | None:
        """Rewrite the file of a candidate so that fp16 accumulation cannot overflow.

        It computes the same as before or, where products get casts, more exactly. None if the
        candidate has no float16.
        """
        made = VARIANTS[variant].variant_of(candidate)
        path = self.build(variant, candidate)
        if made.float_type == "f16" and path not in self._accumulation:
            stage = f"fp16 accumulation of the {self.kind} tower, {variant} {candidate}"
            self._progress(stage, 0, 1)
            self._accumulation[path] = make_overflow_safe(
                path, self.kind, self._inputs, made.canary_min_cosine
            )
            self._progress(stage, 1, 1)
        return self._accumulation.get(path)

    def kept_float(self, candidate: str) -> list[LayerSensitivity]:
        """Return the Linears that a candidate leaves in float, most sensitive first."""
        share = INT8_CANDIDATES.get(candidate, Int8Candidate()).in_float
        if not share:
            return []
        ranked = self.calibrator.sensitivity()
        return ranked[: math.ceil(len(ranked) * share)]

    def _graph(self, smoothness: Smoothness) -> TowerGraph:
        return self.fp32 if smoothness == "plain" else self._smoothed

    @cached_property
    def _smoothed(self) -> TowerGraph:
        factors = {
            site: found.factors
            for site, found in self.calibrator.smoothing().items()
            if found.alpha is not None
        }
        smoothed = smooth(self._plain, factors)
        return self._export(smoothed, f"{self.kind}.smoothed.onnx", like=self.fp32)

    def _export(self, tower: PlainTower, name: str, like: TowerGraph | None = None) -> TowerGraph:
        """Write a tower's graph; that of a tower of the same structure saves the trace."""
        path = self._folder / name
        self._progress(f"exporting the {self.kind} tower", 0, 1)
        graph = None if like is None else write_with_weights(like, tower, path)
        if graph is None:
            # A batch of one would be taken for a constant.
            example = torch.from_numpy(np.concatenate([self._inputs[:2]] * 2))
            graph = export_onnx(tower, self.kind, path, example=example)
        # Smoothing must change nothing, so a smoothed tower is compared with the plain one.
        require_parity(self._plain, path, self.kind, self._inputs[:_PARITY_INPUTS])
        self._progress(f"exporting the {self.kind} tower", 1, 1)
        return graph


class CandidateEmbeddings:
    """Embeds a split with any candidate, from its file and through the runtime."""

    def __init__(
        self,
        folder: Path,
        towers: Mapping[Tower, TowerCandidates],
        split: RetrievalSplit,
        progress: StageProgress,
    ) -> None:
        self._exact = Bundle.open(folder, EXACT)
        self._towers = towers
        self._split = split
        self._progress = progress
        self._known: dict[tuple[Path, str], SplitEmbeds] = {}

    def __call__(
        self, tower: Tower, variant: VariantName, candidate: str, backend: str
    ) -> SplitEmbeds:
        """Embed the split: a `upperson_export.precision_search.EmbedSplit`."""
        path = self._towers[tower].build(variant, candidate)
        if backend == SIMULATED:  # A float32 candidate has no float16 to simulate.
            backend = VARIANTS[variant].variant_of(candidate).measured_on
        if (path, backend) not in self._known:
            on_half = backend == SIMULATED
            loaded = open_simulated(path) if on_half else open_backend(path, backend)
            encoder = Encoder(
                self._exact.manifest, variant, self._exact.tokenizer, lambda _: loaded
            )
            stage = f"measuring the {tower} tower, {variant} {candidate} on {backend}"
            if tower == "image":
                embeds = encoder.encode_images(
                    list(self._split.image_files), progress=partial(self._progress, stage)
                )
            else:
                self._progress(stage, 0, 1)
                embeds = encoder.encode_texts(self._split.texts)
                self._progress(stage, 1, 1)
            float_type = "f16" if on_half else float_type_of(loaded)
            self._known[path, backend] = SplitEmbeds(embeds, float_type)
        return self._known[path, backend]
