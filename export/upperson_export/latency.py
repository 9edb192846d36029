"""Milliseconds an item of a variant takes on this machine, by backend: a hint, not a benchmark."""

import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from upperson_calibration.samples import CalibrationSet
from upperson_export.float_types import float_type_of
from upperson_export.variants import Variant
from upperson_rt.backends import open_backend
from upperson_rt.machine import describe_machine
from upperson_rt.tokenizer import token_lengths
from upperson_rt.towers import Tower, run_tower

BATCH = 8
REPEATS = 3


class Stopwatch:
    """Times towers on every CPU backend that is installed, all under the same conditions.

    Args:
        calibration: Its first samples are what is embedded.
    """

    def __init__(self, calibration: CalibrationSet) -> None:
        captions = calibration.input_ids[:BATCH]
        self._inputs: dict[Tower, Any] = {
            "image": calibration.images[:BATCH],
            "text": captions[:, : token_lengths(captions).max()],
        }
        self._machine = describe_machine()
        self._threads: int = self._machine["cpus_available"]
        self._versions: dict[str, str] = {}

    def measure(
        self, files: Mapping[Tower, Path], variant: Variant
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Return ``ms_per_item`` (median) and ``float_type`` by backend and tower.

        Variants with float16 are made for GPUs and are not timed on a CPU.
        """
        if "fp16" in variant:
            return {}
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name in ("onnxruntime", "openvino"):
            if find_spec(name) is None:
                continue
            found[name] = {}
            for tower, path in files.items():
                backend = open_backend(path, name, threads=self._threads)
                self._versions[name] = backend.version
                inputs = self._inputs[tower]
                times = []
                for _ in range(REPEATS + 1):  # The first is for warming up.
                    started = time.perf_counter()
                    run_tower(backend, tower, inputs)
                    times.append((time.perf_counter() - started) / len(inputs))
                found[name][tower] = {
                    "ms_per_item": round(1000 * median(times[1:]), 3),
                    "float_type": float_type_of(backend),
                }
        return found

    def conditions(self) -> dict[str, Any]:
        """Return what the times so far depend on."""
        return {
            "machine": self._machine,
            "threads": self._threads,
            "backends": self._versions,
            "batch": {tower: len(inputs) for tower, inputs in self._inputs.items()},
            "caption_tokens": self._inputs["text"].shape[1],
            "repeats": REPEATS,
        }
