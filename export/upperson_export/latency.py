"""Milliseconds an item of a variant takes on this machine, by backend: a hint, not a benchmark."""

import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from upperson_calibration.samples import CalibrationSet
from upperson_export.variants import Variant
from upperson_rt.backends import open_backend
from upperson_rt.canaries import Tower
from upperson_rt.encoder import run_tower

BATCH = 8
REPEATS = 3


def latencies(
    files: Mapping[Tower, Path], variant: Variant, calibration: CalibrationSet
) -> dict[str, dict[str, float]]:
    """Time both towers on every CPU backend that is installed, at batch 8.

    Variants with float16 are made for GPUs and are not timed on a CPU.

    Returns:
        Median milliseconds an item, by backend and tower.
    """
    if "fp16" in variant:
        return {}
    inputs: dict[Tower, Any] = {
        "image": calibration.images[:BATCH],
        "text": calibration.input_ids[:BATCH],
    }
    found: dict[str, dict[str, float]] = {}
    for name in ("onnxruntime", "openvino"):
        if find_spec(name) is None:
            continue
        found[name] = {}
        for tower, path in files.items():
            backend = open_backend(path, name)
            times = []
            for _ in range(REPEATS + 1):  # The first is for warming up.
                started = time.perf_counter()
                run_tower(backend, tower, np.asarray(inputs[tower]))
                times.append((time.perf_counter() - started) / len(inputs[tower]))
            found[name][tower] = round(1000 * median(times[1:]), 3)
    return found
