"""Graphs of a random model for the benchmarks of towers, made as an export makes them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from upperson.model.encoder import UPPerson
from upperson_calibration.ranges import estimate, observe
from upperson_export.fold import fold_image_tower, fold_text_tower
from upperson_export.graphs import build_variant, export_onnx
from upperson_export.parity import require_parity
from upperson_export.plain import PlainTower
from upperson_export.variants import VariantName
from upperson_rt.towers import Tower


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerGraphs:
    """One tower in the forms that are timed."""

    folded: PlainTower
    files: Mapping[VariantName, Path]
    """fp32, and what was asked for."""


def write_graphs(
    model: UPPerson,
    samples: Mapping[Tower, NDArray[Any]],
    folder: Path,
    *,
    variants: Iterable[VariantName] = ("int8",),
    threads: int,
    progress: Callable[[str, int, int], None],
) -> dict[Tower, TowerGraphs]:
    """Fold, export, calibrate by min-max and quantize both towers.

    Args:
        model: In evaluation mode.
        samples: At least two of each tower: uint8 [N, H, W, 3], and int32 [N, L] zero-padded. They
            set the int8 ranges.
        folder: Where files go.
        variants: Beside fp32.
        threads: CPU threads of calibration.
        progress: Called with what is being done, how many are done and how many there are.

    Raises:
        IntegrityError: A float32 file does not embed as its tower does.
    """
    folded: dict[Tower, PlainTower] = {
        "image": fold_image_tower(model),
        "text": fold_text_tower(model),
    }
    graphs: dict[Tower, TowerGraphs] = {}
    for done, (kind, tower) in enumerate(folded.items()):
        progress("exporting", done, len(folded))
        fp32 = folder / f"{kind}.fp32.onnx"
        inputs = samples[kind]
        # Twice: the exporter takes a batch of one for a constant.
        example = torch.from_numpy(np.concatenate([inputs[:1]] * 2))
        graph = export_onnx(tower, kind, fp32, example=example)
        require_parity(tower, fp32, kind, inputs[:2])
        amax = estimate(observe(graph, inputs, batch_size=4, threads=threads), "min-max")
        files: dict[VariantName, Path] = {"fp32": fp32}
        for variant in variants:
            files[variant] = folder / f"{kind}.{variant}.onnx"
            ir.save(build_variant(graph, variant, amax), files[variant])
        graphs[kind] = TowerGraphs(folded=tower, files=files)
    return graphs
