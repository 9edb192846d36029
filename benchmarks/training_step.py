"""One training step, literally from the formulas or ours: its loss, and the memory it takes.

What counts as memory is what the machine has to have on top of the loaded model: resident memory of
a process at its peak during two steps, minus resident memory just before the first. So it counts
activations, gradients, the optimiser's state, and the work space of the matrix libraries.
"""

import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import literal
from benchmarks.random_model import ModelSpec, random_base, random_batch, random_model
from upperson.components import fold_quick_gelu, keep_frozen_matrices_in
from upperson.losses import same_identity, sdm_loss
from upperson_bench.processes import call_in_fresh_process
from upperson_machine.description import resident_bytes
from upperson_rt.errors import BackendError, InputError
from upperson_rt.machine import processor

LITERAL = "literal fp32"
OURS = "ours fp32"
OURS_BF16 = "ours bf16"
OURS_CHECKPOINTED = "ours fp32, checkpointed"
CONTENDERS = (
    LITERAL,
    OURS,
    *((OURS_BF16,) if processor().has_bf16 else ()),
    OURS_CHECKPOINTED,
)
"""The step written literally from the formulas, and this package's: in float32, under bf16
autocast (where the processor has instructions for it: without, a step takes minutes), and in
float32 with every block's activations computed again in the backward pass."""

_LR = 1e-4
_MEMORY_STEPS = 2  # The first allocates gradients and the optimiser's state, the second has all.
_FORGET_PEAK = Path("/proc/self/clear_refs")
_RETURN_FREED = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
"""The C library is to hand back every freed block of 64 KiB or more at once. Otherwise it keeps
some, and the peak depends on the order of allocations."""


class TrainingStep:
    """A model, a batch and an optimiser.

    Args:
        spec: What is trained.
        contender: One of ``CONTENDERS``.
        clip: A frozen base of :func:`random_base` that no other contender has.
    """

    def __init__(self, spec: ModelSpec, contender: str, clip: Any) -> None:
        self._literal = contender == LITERAL
        self._bf16 = contender == OURS_BF16
        self._model = random_model(spec, clip)
        if not self._literal:
            fold_quick_gelu(self._model)
            keep_frozen_matrices_in(self._model, "bf16" if self._bf16 else "fp32")
        self._model.checkpoint_activations = contender == OURS_CHECKPOINTED
        self._image_N3HW, self._ids_NL, self._pids_N = random_batch(spec)
        # The paper's eps, and biases are not decayed.
        named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": 4e-5},
            {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
        ]
        # Ours as upperson.step builds it, the literal one as torch does unless told.
        fused = None if self._literal else True
        self._optimizer = torch.optim.Adam(groups, lr=_LR, eps=1e-3, fused=fused)

    def run(self) -> float:
        """Take one step and return its loss, computed before the update."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            if self._literal:
                image_NE = literal.encode_image(self._model, self._image_N3HW)
                text_NE = literal.encode_text(self._model, self._ids_NL)
            else:
                image_NE, text_NE = (
                    F.normalize(features_NE.float(), dim=-1)
                    for features_NE in self._model(self._image_N3HW, self._ids_NL)
                )
        loss = sdm_loss(image_NE, text_NE, same_identity(self._pids_N))
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.item()


def peak_extra_bytes(spec: ModelSpec, contender: str, threads: int) -> int | None:
    """Measure a contender's memory in a process of its own; None if the system reports none.

    Raises:
        InputError: The process ended with an error, for example for want of memory.
    """
    if not _FORGET_PEAK.exists():
        return None
    try:
        found: int | None = call_in_fresh_process(
            _peak_extra_bytes, asdict(spec), contender, threads, environment=_RETURN_FREED
        )
    except BackendError as error:
        raise InputError(
            f"the memory of '{contender}' could not be measured: {error}: free memory, or "
            "lower --batch-size"
        ) from error
    return found


def _peak_extra_bytes(spec_values: dict[str, Any], contender: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    spec = ModelSpec(**spec_values)
    step = TrainingStep(spec, contender, random_base(spec))
    gc.collect()
    _FORGET_PEAK.write_text("5", "ascii")
    before = resident_bytes("VmRSS")
    for _ in range(_MEMORY_STEPS):
        step.run()
    peak = resident_bytes("VmHWM")
    return None if peak is None or before is None else peak - before
