"""The fastest matrix products torch does on this machine: what towers are measured against.

Shapes: M rows, that is tokens of a batch; K inputs and N outputs of a Linear.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from upperson_rt.backends.measurement import Timing
from upperson_rt.machine import processor

FLOAT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What CPUs are measured in."""


def float_types() -> tuple[str, ...]:
    """Return the keys of ``FLOAT_TYPES`` that this processor multiplies, the fastest one last.

    Where it has no instructions for bf16 a product takes hundreds of times as long.
    """
    return tuple(name for name in FLOAT_TYPES if name == "fp32" or processor().has_bf16)


Shape = tuple[int, int, int]


def gemm_contenders(
    rows: int,
    linears: Iterable[tuple[int, int]],
    flop: int,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    device: str = "cpu",
) -> dict[tuple[str, Shape], Callable[[], object]]:
    """Return runs of products by (float type, (M, K, N)).

    Args:
        rows: M.
        linears: Inputs and outputs of the Linears of a block; equal ones count once.
        flop: What a run comes to, about: as much as that of the tower it is compared with. A short
            run catches bursts of the clock that no tower could hold.
        dtypes: What to multiply in, by name; None: all that this processor multiplies.
        device: Of torch.
    """
    if dtypes is None:
        dtypes = {name: FLOAT_TYPES[name] for name in float_types()}
    generator = torch.Generator().manual_seed(0)
    runs: dict[tuple[str, Shape], Callable[[], object]] = {}
    for inputs, outputs in dict.fromkeys(linears):
        x_MK = torch.randn(rows, inputs, generator=generator)
        weight_NK = torch.randn(outputs, inputs, generator=generator)
        for name, dtype in dtypes.items():
            shape = (rows, inputs, outputs)
            pair = (x_MK.to(device, dtype), weight_NK.to(device, dtype))
            runs[name, shape] = partial(_multiply, [pair] * _repeats(shape, flop))
    return runs


def peaks(timings: Mapping[tuple[str, Shape], Timing], flop: int) -> dict[str, dict[str, float]]:
    """Return the most FLOP a second of `gemm_contenders`, by float type.

    ``flops`` and ``cpu_flops`` are of the best run of any shape, by wall and by processor time;
    ``p50_flops`` of the median run of the best shape.
    """
    best: dict[str, dict[str, float]] = {
        name: {"flops": 0.0, "cpu_flops": 0.0, "p50_flops": 0.0} for name, _ in timings
    }
    for (name, shape), timing in timings.items():
        done = _flop(shape) * _repeats(shape, flop)
        for key, seconds in (
            ("flops", min(timing.seconds)),
            ("cpu_flops", min(timing.cpu_seconds)),
            ("p50_flops", timing.median_s),
        ):
            best[name][key] = max(best[name][key], done / seconds)
    return best


def own_products(rows: int, weights: Iterable[Tensor]) -> tuple[Callable[[], object], int]:
    """Return a run of a tower's own products, one after another, and its FLOP.

    They are in the fastest of `float_types`. Unlike one product again and again, each meets a
    weight that is not in the cache.

    Args:
        rows: M.
        weights: [N, K] of every Linear, in the order in which the tower has them.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = FLOAT_TYPES[float_types()[-1]]
    weights_NK = [weight.detach().to(dtype) for weight in weights]
    widths = {weight.shape[1] for weight in weights_NK}
    x_MK = {k: torch.randn(rows, k, generator=generator).to(dtype) for k in widths}
    pairs = [(x_MK[weight.shape[1]], weight) for weight in weights_NK]
    return partial(_multiply, pairs), sum(2 * rows * weight.numel() for weight in weights_NK)


def _flop(shape: Shape) -> int:
    m, k, n = shape
    return 2 * m * k * n


def _repeats(shape: Shape, flop: int) -> int:
    return max(1, round(flop / _flop(shape)))


@torch.inference_mode()
def _multiply(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for x_MK, weight_NK in pairs:
        torch.nn.functional.linear(x_MK, weight_NK)
    if x_MK.is_cuda:
        torch.cuda.synchronize()
