"""Graphs of a random model for the benchmark of towers, made as an export makes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from upperson.model.encoder import UPPerson
from upperson_calibration.observe import observe
from upperson_calibration.ranges import estimate
from upperson_export.fold import fold_image_tower, fold_text_tower
from upperson_export.graphs import build_variant, export_onnx
from upperson_export.parity import require_parity
from upperson_export.plain import PlainTower
from upperson_rt.towers import Tower


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerGraphs:
    """One tower in the forms that run on a CPU."""

    folded: PlainTower
    fp32: Path
    int8: Path


def write_graphs(
    model: UPPerson,
    samples: Mapping[Tower, NDArray[Any]],
    folder: Path,
    *,
    threads: int,
    progress: Callable[[str, int, int], None],
) -> dict[Tower, TowerGraphs]:
    """Fold, export, calibrate by min-max and quantize both towers.

    Args:
        model: In evaluation mode.
        samples: At least two of each tower: uint8 [N, H, W, 3], and int32 [N, L] zero-padded. They
            set the int8 ranges.
        folder: Where files go.
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
        fp32, int8 = (folder / f"{kind}.{variant}.onnx" for variant in ("fp32", "int8"))
        inputs = samples[kind]
        # Twice: the exporter takes a batch of one for a constant.
        example = torch.from_numpy(np.concatenate([inputs[:1]] * 2))
        graph = export_onnx(tower, kind, fp32, example=example)
        require_parity(tower, fp32, kind, inputs[:2])
        amax = estimate(observe(graph, inputs, batch_size=4, threads=threads), "min-max")
        ir.save(build_variant(graph, "int8", amax), int8)
        graphs[kind] = TowerGraphs(folded=tower, fp32=fp32, int8=int8)
    return graphs
