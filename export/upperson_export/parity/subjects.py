"""Who is compared: towers in torch, and ONNX files on a backend."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from upperson_export.fold import TrainedModel, fold_image_tower, fold_text_tower
from upperson_export.graphs import export_onnx, open_simulated
from upperson_export.parity.backend_choice import BackendChoice
from upperson_export.parity.inputs import ParityInputs
from upperson_export.parity.written_file import TOLERANCE
from upperson_export.variants import is_half
from upperson_rt.backends import open_backend
from upperson_rt.towers import TOWERS, Backend, Tower, run_tower

RunTower = Callable[[Tower, npt.NDArray[Any]], npt.NDArray[np.float32]]
"""Embeds prepared inputs, uint8 [N, H, W, 3] or int32 [N, L], as one batch: [N, E]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What still counts as alike: the one or the other, fp32 having the first."""

    max_error: float | None = None
    """Largest absolute difference of a component."""
    min_cosine: float | None = None


FP32_TOLERANCE = Tolerance(max_error=TOLERANCE)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in one form, on one backend."""

    variant: str
    """``run``, ``folded``, or a variant such as ``int8``."""
    backend: str
    """Such as ``onnxruntime 1.23.2 on cpu``."""
    tolerance: Tolerance
    run: RunTower
    encode: Callable[[Tower, ParityInputs, int], npt.NDArray[np.float32]] | None = None
    """Embeds the files or the sentences in batches of a size, as applications do; None if that is
    `run` over prepared inputs."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.variant}, {self.backend}"


@dataclass(frozen=True, kw_only=True, slots=True)
class NotRun:
    """A variant that a backend cannot run."""

    variant: str
    backend: str
    reason: str


def torch_subject(
    variant: str, towers: Mapping[Tower, nn.Module], tolerance: Tolerance = FP32_TOLERANCE
) -> Subject:
    """Return plain towers in torch, which read what the graphs read."""

    @torch.inference_mode()
    def run(tower: Tower, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        embeds: npt.NDArray[np.float32] = towers[tower](torch.from_numpy(inputs)).numpy()
        return embeds

    return Subject(variant=variant, backend=torch_backend(), tolerance=tolerance, run=run)


def torch_backend() -> str:
    """Return what the report calls torch."""
    return f"torch {torch.__version__} on cpu"


def open_subject(
    variant: str,
    paths: Mapping[Tower, Path],
    choice: BackendChoice,
    tolerance: Tolerance = FP32_TOLERANCE,
    threads: int | None = None,
) -> tuple[Subject, dict[Tower, Backend]]:
    """Load two ONNX files and return them also as they were loaded.

    ONNX Runtime on a CPU would compute a float16 variant in float32, which says nothing about what
    float16 does to it: its range and rounding are simulated there, as in the gate.

    Raises:
        UsageError: There is no such backend.
        BackendError: The backend is missing or cannot run them.
    """
    on_half = is_half(variant) and (choice.name, choice.device) == ("onnxruntime", "cpu")
    towers = {
        tower: open_simulated(path, threads)
        if on_half
        else open_backend(path, choice.name, choice.device, threads)
        for tower, path in paths.items()
    }
    backend = towers["image"]
    subject = Subject(
        variant=variant,
        backend=f"{backend.name} {backend.version} on {backend.device}"
        + (", float16 simulated" if on_half else ""),
        tolerance=tolerance,
        run=lambda tower, inputs: run_tower(towers[tower], tower, inputs),
    )
    return subject, towers


def folded_towers(model: TrainedModel) -> dict[Tower, nn.Module]:
    """Fold both towers; raises as `fold_image_tower`."""
    return {"image": fold_image_tower(model), "text": fold_text_tower(model)}


def export_towers(
    towers: Mapping[Tower, nn.Module], inputs: ParityInputs, folder: Path
) -> dict[Tower, Path]:
    """Write plain towers as fp32 ONNX files and return their paths."""
    paths: dict[Tower, Path] = {}
    for tower in TOWERS:
        rows = np.resize(np.arange(inputs.count(tower)), 4)
        example = inputs.batch(tower, rows, width=inputs.context_length)
        if tower == "text":
            example = example[:, :-1]  # The context's own length would become a constant.
        paths[tower] = folder / f"{tower}.fp32.onnx"
        export_onnx(towers[tower], tower, paths[tower], example=torch.from_numpy(example))
    return paths
