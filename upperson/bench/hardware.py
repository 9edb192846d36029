"""What a measurement ran on: processor, instruction sets, threads, versions."""

from typing import Any

import open_clip
import torch

from upperson_rt.machine import describe_machine


def describe_hardware() -> dict[str, Any]:
    """Return the machine, see `describe_machine`, and what torch makes of it, as plain values."""
    return describe_machine() | {
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "open_clip": str(open_clip.__version__),
    }
