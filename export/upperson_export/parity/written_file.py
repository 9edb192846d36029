"""Does a written ONNX file embed like the tower it was written from? Asked at every export."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from upperson_rt.agreement import compare_embeds
from upperson_rt.backends import open_backend
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.towers import Tower, run_tower

TOLERANCE = 1e-5
"""Largest absolute difference of unit-norm embeddings that still is rounding."""


@torch.no_grad()
def require_parity(tower: nn.Module, path: Path, kind: Tower, inputs: npt.NDArray[Any]) -> None:
    """Run a plain tower and its ONNX file at batch 1, 2 and all, and insist on rounding error.

    Raises:
        InputError: The tower itself gives values that are not finite.
        IntegrityError: Names the batch, the worst input and the tolerance that would pass.
    """
    backend = open_backend(path, "onnxruntime")
    for batch in dict.fromkeys((1, 2, len(inputs))):
        expected = tower(torch.from_numpy(inputs[:batch])).numpy()
        if not np.isfinite(expected).all():
            raise InputError(
                f"the {kind} tower embeds calibration samples to values that are not finite: the "
                "training diverged, or the weights are damaged; export another run"
            )
        found = compare_embeds(expected, run_tower(backend, kind, inputs[:batch]))
        if not found.agrees(max_error=TOLERANCE).all():
            raise IntegrityError(
                f"the exported {kind} tower differs from torch by {found.max_error:.2e} at batch "
                f"{batch}, input {found.worst_error} (cosine {found.min_cosine:.6f}); "
                f"expected at most {TOLERANCE:.0e}: report the versions of torch, onnxscript "
                "and onnxruntime"
            )
