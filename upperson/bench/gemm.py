"""The fastest matrix products torch does on this machine: what towers are measured against.

Shapes: M rows, that is tokens of a batch; K inputs and N outputs of a Linear.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from upperson_rt.timing import Timing

REPEATS = 4
"""Products in a run: the first one may find its operands pushed out of the cache."""

FLOAT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Shape = tuple[int, int, int]


def gemm_contenders(
    rows: int, linears: Iterable[tuple[int, int]]
) -> dict[tuple[str, Shape], Callable[[], object]]:
    """Return runs of ``REPEATS`` products by (float type, (M, K, N)).

    Args:
        rows: M.
        linears: Inputs and outputs of the Linears of a block; equal ones count once.
    """
    generator = torch.Generator().manual_seed(0)
    runs: dict[tuple[str, Shape], Callable[[], object]] = {}
    for inputs, outputs in dict.fromkeys(linears):
        x_MK = torch.randn(rows, inputs, generator=generator)
        weight_NK = torch.randn(outputs, inputs, generator=generator)
        for name, dtype in FLOAT_TYPES.items():
            runs[name, (rows, inputs, outputs)] = partial(
                _multiply, x_MK.to(dtype), weight_NK.to(dtype)
            )
    return runs


def peaks(timings: Mapping[tuple[str, Shape], Timing]) -> dict[str, dict[str, float]]:
    """Return the best FLOP a second of any run, by float type: of wall time, of processor time."""
    best: dict[str, dict[str, float]] = {
        name: {"flops": 0.0, "cpu_flops": 0.0} for name in FLOAT_TYPES
    }
    for (name, (m, k, n)), timing in timings.items():
        flop = 2 * m * k * n * REPEATS
        for key, seconds in (("flops", timing.seconds), ("cpu_flops", timing.cpu_seconds)):
            best[name][key] = max(best[name][key], flop / min(seconds))
    return best


@torch.inference_mode()
def _multiply(x_MK: Tensor, weight_NK: Tensor) -> None:
    for _ in range(REPEATS):
        torch.nn.functional.linear(x_MK, weight_NK)
