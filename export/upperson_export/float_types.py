"""What a backend computes floats in, and one that computes typed graphs on a CPU as GPUs do."""

import tempfile
from pathlib import Path

import onnx

from upperson_export.variants import simulated
from upperson_rt.backends import open_backend
from upperson_rt.towers import Backend


def float_type_of(backend: Backend) -> str:
    """Return such as ``f32`` or ``bf16``; ONNX Runtime on a CPU has float32 kernels alone."""
    return str(getattr(backend, "float_type", "f32"))


def open_simulated(path: Path, threads: int | None = None) -> Backend:
    """Open a typed graph in ONNX Runtime with float16's range and rounding."""
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder, path.name)
        onnx.save(simulated(onnx.load(path)), half)
        return open_backend(half, "onnxruntime", threads=threads)
