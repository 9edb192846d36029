"""Device, precision and processes of training, through Hugging Face accelerate.

One process trains on what is there; several are started by ``torchrun`` or ``accelerate launch``
and find each other through the environment those set.
"""

from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from upperson.model.encoder import UPPerson
from upperson_rt.errors import BackendError, UsageError

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(device: str) -> torch.device:
    """Return the device for ``cpu``, ``cuda``, or ``auto``: CUDA where it is.

    Raises:
        UsageError: Another word.
        BackendError: No CUDA device is there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, found '{device}'")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise BackendError(
            "no CUDA device is available to torch: pass --device cpu, or install a CUDA build of "
            "torch and its driver"
        )
    return torch.device("cuda" if has_cuda and device != "cpu" else "cpu")


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise BackendError where a device cannot train in a precision."""
    if precision == "fp16" and device.type == "cpu":
        raise BackendError("precision fp16 needs a CUDA device: use bf16 or fp32 on a CPU")


def start_engine(precision: Precision, device: str) -> Accelerator:
    """Choose the device and join the other processes, if a launcher started some.

    Args:
        precision: Of the towers.
        device: As for :func:`choose_device`.

    Raises:
        UsageError: No such device.
        BackendError: The device is not there, or cannot train in this precision.
    """
    chosen = choose_device(device)
    check_precision(precision, chosen)
    # accelerate keeps one state a process; a second run in it may have another precision.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=chosen.type == "cpu",
    )


def keep_frozen_matrices_in(model: UPPerson, precision: Precision) -> None:
    """Store what autocast would convert at every step, the frozen matrices, in its type.

    Halves the base in memory and changes no result: norms, embeddings and positions, which
    autocast reads in float32, stay so, and trained tensors are float32 master weights.
    """
    if precision == "fp32":
        return
    matrices = [model.image.proj, model.text.text_projection]
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            matrices += module.parameters(recurse=False)
    for parameter in matrices:
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(_DTYPES[precision])
