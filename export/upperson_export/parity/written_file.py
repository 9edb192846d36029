"""Does a written ONNX file embed like the tower it was written from? Asked at every export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from upperson_rt.backends import open_backend
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.towers import Tower, run_tower

TOLERANCE = 1e-5
"""Largest absolute difference of unit-norm embeddings that still is rounding."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two embeddings of the same inputs are apart."""

    max_abs: float
    min_cosine: float
    worst: int
    """Index of the input with the largest difference."""


def compare(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> Difference:
    """Compare unit-norm embeddings [N, E]."""
    apart_N = np.abs(expected - found).max(axis=1)
    return Difference(
        max_abs=float(apart_N.max()),
        min_cosine=float((expected * found).sum(axis=1).min()),
        worst=int(apart_N.argmax()),
    )


@torch.no_grad()
def require_parity(
    tower: nn.Module, path: Path, kind: Tower, inputs: npt.NDArray[Any]
) -> Difference:
    """Run a plain tower and its ONNX file at batch 1, 2 and all, and insist on rounding error.

    Raises:
        InputError: The tower itself gives values that are not finite.
        IntegrityError: Names the batch, the worst input and the tolerance that would pass.
    """
    backend = open_backend(path, "onnxruntime")
    worst = Difference(0.0, 1.0, 0)
    for batch in dict.fromkeys((1, 2, len(inputs))):
        expected = tower(torch.from_numpy(inputs[:batch])).numpy()
        if not np.isfinite(expected).all():
            raise InputError(
                f"the {kind} tower embeds calibration samples to values that are not finite: the "
                "training diverged, or the weights are damaged; export another run"
            )
        found = compare(expected, run_tower(backend, kind, inputs[:batch]))
        if not found.max_abs <= TOLERANCE:
            raise IntegrityError(
                f"the exported {kind} tower differs from torch by {found.max_abs:.2e} at batch "
                f"{batch}, input {found.worst} (cosine {found.min_cosine:.6f}); expected at most "
                f"{TOLERANCE:.0e}: report the versions of torch, onnxscript and onnxruntime"
            )
        worst = max(worst, found, key=lambda difference: difference.max_abs)
    return worst
