"""The towers in every form that the ladder may try: built once, embedded once, when asked for.

A rung says how a tower is made: ``plain`` int8, ``smoothed``, ``mixed-1/n`` (smoothed, with that
share of the Linears, the most harmful ones, left in float), or the name of a float variant.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from upperson_calibration.calibration_file import Smoothness
from upperson_calibration.graph import TowerGraph
from upperson_calibration.sensitivity import LayerDamage
from upperson_export.calibrator import CalibrationTask, StageProgress, TowerCalibrator
from upperson_export.fold import smooth
from upperson_export.graphs import (
    build_variant,
    export_onnx,
    float_type_of,
    open_simulated,
    write_with_weights,
)
from upperson_export.half_sums import HalfSums, with_safe_sums
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
from upperson_rt.towers import Tower

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
