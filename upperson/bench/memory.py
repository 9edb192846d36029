"""Peak memory of a training step on top of the loaded model, measured in a process of its own.

What is measured is what the machine has to have: resident memory of the process, at its peak during
two steps, minus resident memory just before the first. So it counts activations, gradients, the
optimiser's state, and the work space of the matrix libraries. The kernel keeps the peak (VmHWM) and
forgets it on request (clear_refs). The C library is told to hand back every freed block of 64 KiB
or more at once; otherwise it keeps some, and the peak depends on the order of allocations.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from upperson.bench.training_step import StepSpec, TrainingStep, random_base
from upperson_rt.errors import InputError

STEPS = 2
"""The first step allocates gradients and the optimiser's state, the second has all of them."""

_STATUS = Path("/proc/self/status")
_FORGET_PEAK = Path("/proc/self/clear_refs")
_RETURN_FREED = "glibc.malloc.mmap_threshold=65536"


def peak_extra_bytes(spec: StepSpec, contender: str, threads: int) -> int | None:
    """Measure one contender; None where the system does not tell (Linux does).

    Raises:
        InputError: The process ended with an error, for example for want of memory.
    """
    if not _FORGET_PEAK.exists():
        return None
    task = json.dumps({"spec": asdict(spec), "contender": contender, "threads": threads})
    found = subprocess.run(
        [sys.executable, "-m", __name__, task],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GLIBC_TUNABLES": _RETURN_FREED},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(
            f"the memory of '{contender}' could not be measured: its process ended with code "
            f"{found.returncode} ({last}): free memory or lower --batch-size"
        )
    return int(found.stdout)


def _measure(task: str) -> int:
    """Run the steps in this process and return their peak in bytes."""
    values = json.loads(task)
    torch.set_num_threads(values["threads"])
    spec = StepSpec(**values["spec"])
    step = TrainingStep(spec, values["contender"], random_base(spec))
    gc.collect()
    _FORGET_PEAK.write_text("5", "ascii")
    before = _status_bytes("VmRSS")
    for _ in range(STEPS):
        step.run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text("ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise InputError(f"expected a line {field} in {_STATUS}, found none: this is no usual Linux")


if __name__ == "__main__":
    sys.stdout.write(f"{_measure(sys.argv[1])}\n")
