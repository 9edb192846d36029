"""Training on a GPU as ``upperson train`` does it: how fast, and how much of the time is the step.

A run on rendered people is timed with all that belongs to it, loading included; the step alone on a
batch that lies on the GPU already.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.random_model import ModelSpec, random_base, random_batch
from upperson.components import build_components, start_accelerator
from upperson.config import MixedPrecision, TrainConfig
from upperson.data.batches import Batch
from upperson.model.base import SMALL
from upperson.observer import Observer, Step
from upperson.step import backward_through_batch, build_optimizer
from upperson.train import train
from upperson_synthetic import SyntheticSpec, write_dataset

PRECISIONS: tuple[MixedPrecision, ...] = ("fp32", "bf16", "fp16")
"""What is trained in on a GPU."""

_VIEWS, _CAPTIONS = 2, 2
_LR = 1e-5  # The weights are random: a loss that falls would say nothing.


class _Speeds(Observer):
    """Records what the trainer reports of each step."""

    def __init__(self) -> None:
        self.images_per_s: list[float] = []

    def step(self, step: Step) -> None:
        """Keep the speed."""
        self.images_per_s.append(step.images_per_s)


def write_people(spec: ModelSpec, steps: int, folder: Path) -> TrainConfig:
    """Render people for so many steps, write a base with random weights, and return the settings.

    Args:
        spec: What is trained; its batch size is that of a step.
        steps: Of the one epoch.
        folder: Where all of it goes.
    """
    people = math.ceil(spec.batch_size * steps / (_VIEWS * _CAPTIONS))
    dataset = SyntheticSpec(
        look="street",
        train_ids=people,
        val_ids=0,
        test_ids=0,
        views=_VIEWS,
        captions_per_image=_CAPTIONS,
    )
    pretrained = None
    if spec.base != SMALL:
        pretrained = str(folder / "base.safetensors")
        save_file(random_base(spec).state_dict(), pretrained)
    return TrainConfig(
        root=str(write_dataset(folder / "people", dataset)),
        base=spec.base,
        pretrained=pretrained,
        height_px=spec.height_px,
        width_px=spec.width_px,
        epochs=1,
        warmup_epochs=0,
        batch_size=spec.batch_size,
        lr=_LR,
    )


def measure_training(
    config: TrainConfig, spec: ModelSpec, run: Path, *, device: str, warmup: int
) -> dict[str, Any]:
    """Train into a run folder, then take steps alone; return plain values.

    ``share_in_step`` is the time of a step alone over that of a step of the run: what is missing to
    1 went into loading.

    Args:
        config: As `write_people` gave it, with precision and workers.
        spec: What is trained.
        run: Where the run goes.
        device: ``cuda``, or ``cpu`` for tests.
        warmup: Steps at the beginning that do not count.
    """
    speeds = _Speeds()
    train(config, run, speeds, device=device)
    images_per_s = float(np.median(speeds.images_per_s[warmup:]))
    steps = len(speeds.images_per_s) - warmup
    step_s, memory = _time_steps(config, spec, device, steps, warmup)
    return {
        "images_per_s": images_per_s,
        "step_ms": 1000 * step_s,
        "share_in_step": step_s * images_per_s / config.batch_size,
        "peak_memory_bytes": memory,
        "steps": steps,
        "workers": config.workers,
    }


def _time_steps(
    config: TrainConfig, spec: ModelSpec, device: str, steps: int, warmup: int
) -> tuple[float, int | None]:
    """Return the median time of the steps of `upperson.train`, and the memory at their peak."""
    accelerator = start_accelerator(config.precision, device)
    components = build_components(config)
    trained = nn.ModuleDict({"model": components.model, "objective": components.objective})
    trained.to(accelerator.device)
    optimizer = build_optimizer(trained.named_parameters(), config)
    towers, optimizer = accelerator.prepare(components.model, optimizer)
    components.model.train()
    batch = Batch(*(tensor.to(accelerator.device) for tensor in random_batch(spec)))
    on_gpu = accelerator.device.type == "cuda"
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(warmup + steps):
        wait()
        started = time.perf_counter()
        optimizer.zero_grad()
        backward_through_batch(
            accelerator, towers, components.objective, batch, [len(batch.labels_N)], 1
        )
        optimizer.step()
        wait()
        seconds.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() if on_gpu else None
    return float(np.median(seconds[warmup:])), memory
