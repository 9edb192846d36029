"""The towers in every form that the ladder may try, and the calibration that some of them need.

A rung says how a tower is made: ``plain`` int8, ``smoothed``, ``mixed-1/n`` (smoothed, with that
share of the Linears, the most harmful ones, left in float), or the name of a float variant.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from upperson_calibration.calibration_file import (
    NOTHING_SEEN,
    Calibration,
    Ranges,
    Smoothness,
    TowerCalibration,
    six_digits,
)
from upperson_calibration.graph import TowerGraph
from upperson_calibration.ranges import Estimator, Observed, estimate, largest_values, observe
from upperson_calibration.samples import CalibrationSet
from upperson_calibration.sensitivity import LayerDamage, rank_by_damage
from upperson_calibration.smoothing import Smoothing, choose_smoothing
from upperson_export.fold import smooth
from upperson_export.graphs import (
    HalfSums,
    build_variant,
    export_onnx,
    float_type_of,
    open_simulated,
    with_safe_sums,
    write_with_weights,
)
from upperson_export.ladder import RetrievalSplit, SplitEmbeds
from upperson_export.parity import require_parity
from upperson_export.plain import PlainTower
from upperson_export.variants import (
    EXACT,
    INT8_RUNGS,
    SIMULATED,
    VARIANTS,
    Int8Rung,
    VariantName,
)
from upperson_rt.backends import open_backend
from upperson_rt.bundle import Bundle
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError
from upperson_rt.files import sha256_of_file
from upperson_rt.towers import Tower, run_tower

# --- What calibration finds for one tower: taken over from a file, or measured when first needed

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


# --- The towers in every form that the ladder may try: built once, embedded once, when asked for


_PARITY_INPUTS = 17


class TowerForms:
    """Builds the forms of one tower into a folder.

    Args:
        kind: Which tower it is.
        plain: The folded tower.
        folder: Where files go.
        task: How it is calibrated; its samples are also what files are compared on.
    """

    def __init__(self, kind: Tower, plain: PlainTower, folder: Path, task: CalibrationTask) -> None:
        self.kind = kind
        self._plain = plain
        self._inputs = task.samples.inputs(kind)
        self._folder = folder
        self._progress = task.progress
        self._half_sums: dict[Path, HalfSums] = {}
        self.calibrator = TowerCalibrator(kind, self._graph, task)
        """What the forms are built from."""

    @cached_property
    def fp32(self) -> TowerGraph:
        """The float32 graph, compared with torch."""
        return self._export(self._plain, f"{self.kind}.fp32.onnx")

    def build(self, variant: VariantName, rung: str) -> Path:
        """Return the file of a form, building it the first time.

        Raises:
            InputError: A value is not finite, or a calibration that is reused lacks a range.
        """
        made = VARIANTS[variant].at(rung)
        if made.name == EXACT:
            return self.fp32.file
        path = self._folder / f"{self.kind}.{made.name}.{rung.replace('/', 'of')}.onnx"
        if not path.exists():
            which = INT8_RUNGS.get(rung, Int8Rung()).graph
            amax = self.calibrator.amax(which) if made.int8 else None
            half = made.float_type == "f16"
            largest = self.calibrator.largest_anywhere(which) if half else None
            keep = [layer.node for layer in self.kept_float(rung)]
            graph = self._graph(which)
            ir.save(build_variant(graph, made.name, amax, keep, largest=largest), path)
        return path

    def bear_half_sums(self, variant: VariantName, rung: str) -> HalfSums | None:
        """Make the file of a form one that bears sums in float16; None where nothing is float16.

        It computes the same or, where products get casts, more exactly than what was measured.
        """
        made = VARIANTS[variant].at(rung)
        path = self.build(variant, rung)
        if made.float_type == "f16" and path not in self._half_sums:
            self._progress(f"sums in float16 of the {self.kind} tower, {variant} {rung}", 0, 1)
            self._half_sums[path] = with_safe_sums(
                path, self.kind, self._inputs, made.canary_min_cosine
            )
            self._progress(f"sums in float16 of the {self.kind} tower, {variant} {rung}", 1, 1)
        return self._half_sums.get(path)

    def kept_float(self, rung: str) -> list[LayerDamage]:
        """Return the Linears that a rung leaves in float, most harmful first."""
        share = INT8_RUNGS.get(rung, Int8Rung()).in_float
        if not share:
            return []
        damage = self.calibrator.damage()
        return damage[: math.ceil(len(damage) * share)]

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
        """Write a tower's graph, if possible without a trace: from that of a tower alike."""
        path = self._folder / name
        self._progress(f"exporting the {self.kind} tower", 0, 1)
        graph = None if like is None else write_with_weights(like, tower, path)
        if graph is None:
            # A batch of one would be taken for a constant.
            example = torch.from_numpy(np.concatenate([self._inputs[:2]] * 2))
            graph = export_onnx(tower, self.kind, path, example=example)
        # A smoothed tower is compared with the tower as it was: smoothing must change nothing.
        require_parity(self._plain, path, self.kind, self._inputs[:_PARITY_INPUTS])
        self._progress(f"exporting the {self.kind} tower", 1, 1)
        return graph


class FormEmbeddings:
    """Embeds a split with any form of a tower, from its file and through the runtime.

    Args:
        folder: A bundle with the fp32 variant, whose tokenizer and sizes are used.
        towers: Build the forms.
        split: What is embedded.
        progress: Called with (what is being done, done, total).
    """

    def __init__(
        self,
        folder: Path,
        towers: Mapping[Tower, TowerForms],
        split: RetrievalSplit,
        progress: StageProgress,
    ) -> None:
        self._exact = Bundle.open(folder, EXACT)
        self._towers = towers
        self._split = split
        self._progress = progress
        self._known: dict[tuple[Path, str], SplitEmbeds] = {}

    def __call__(self, tower: Tower, variant: VariantName, rung: str, backend: str) -> SplitEmbeds:
        """Embed the split: a `upperson_export.ladder.EmbedSplit`."""
        path = self._towers[tower].build(variant, rung)
        if backend == SIMULATED:
            backend = VARIANTS[variant].at(rung).measured_on  # Of fp32, nothing is float16.
        if (path, backend) not in self._known:
            on_half = backend == SIMULATED
            loaded = open_simulated(path) if on_half else open_backend(path, backend)
            encoder = Encoder(
                self._exact.manifest, variant, self._exact.tokenizer, lambda _: loaded
            )
            work = f"measuring the {tower} tower, {variant} {rung} on {backend}"
            if tower == "image":
                embeds = encoder.encode_images(
                    list(self._split.image_files),
                    progress=lambda done, total: self._progress(work, done, total),
                )
            else:
                self._progress(work, 0, 1)
                embeds = encoder.encode_texts(list(self._split.captions))
                self._progress(work, 1, 1)
            self._known[path, backend] = SplitEmbeds(
                embeds, "f16" if on_half else float_type_of(loaded)
            )
        return self._known[path, backend]
