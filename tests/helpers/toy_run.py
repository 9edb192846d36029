"""A toy base on disk and a tiny data set: what a training run needs, in seconds."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.helpers.official_checkpoint import know_toy_base
from tests.helpers.toy_bases import PARTS, write_base
from tests.helpers.toy_clip import IMAGE_SIZE, disturb, toy_clip
from upperson import run_writer
from upperson.config import TrainConfig
from upperson.model.base import load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import UPPersonConfig
from upperson.observer import Observer, Step
from upperson.run import ADAPTER, CONFIG, pack_adapter
from upperson_scores.metrics import RetrievalMetrics
from upperson_synthetic import SyntheticSpec, write_dataset

_FOLDER = tempfile.TemporaryDirectory(prefix="toy_run.")
_WEIGHTS, _PEOPLE = "toy.safetensors", "people"
know_toy = know_toy_base


class Recorder(Observer):
    """Keeps what an observer gets; ``stop_after`` so many steps it raises `StoppedError`."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.taught: list[tuple[int, int]] = []
        self.expected: list[tuple[float, int]] = []
        self.losses: list[float] = []
        self.steps: list[Step] = []
        self.metrics: list[tuple[int, str, RetrievalMetrics]] = []
        self._stop_after = stop_after

    def note(self, text: str) -> None:
        self.notes.append(text)

    def teaching(self, done: int, total: int) -> None:
        self.taught.append((done, total))

    def expecting(self, step_s: float, steps: int) -> None:
        assert not self.losses, "the time comes before the first step"
        self.expected.append((step_s, steps))

    def step(self, step: Step) -> None:
        self.steps.append(step)
        self.losses.append(step.loss)
        if len(self.losses) == self._stop_after:  # The worst moment: nothing is saved then.
            raise StoppedError

    def evaluated(self, epoch: int, split: str, metrics: RetrievalMetrics) -> None:
        self.metrics.append((epoch, split, metrics))

    def measured(self, best_epoch: int, split: str, metrics: RetrievalMetrics) -> None:
        self.metrics.append((best_epoch - 1, split, metrics))


class StoppedError(Exception):
    """What a `Recorder` stops a run with."""


@cache
def _made() -> Path:
    """Write base and people once a process, for all runs to copy: that takes half a second."""
    folder = Path(_FOLDER.name)
    save_file(toy_clip().state_dict(), folder / _WEIGHTS)
    spec = SyntheticSpec(look="street", train_ids=6, val_ids=4, test_ids=5, views=2)
    write_dataset(folder / _PEOPLE, spec)
    return folder


def toy_config(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> TrainConfig:
    """Write a toy base and people into a folder; return the configuration of a run over them."""
    know_toy(monkeypatch)
    monkeypatch.setattr(run_writer, "draw_curves", lambda rows: b"not drawn")
    if not (folder / _WEIGHTS).exists():
        shutil.copytree(_made(), folder, dirs_exist_ok=True)
    values: dict[str, Any] = {
        "root": str(folder / _PEOPLE),
        "base": "toy",
        "pretrained": str(folder / _WEIGHTS),
        "height_px": IMAGE_SIZE[0],
        "width_px": IMAGE_SIZE[1],
        "model": UPPersonConfig(prefix_length=2, lora_rank=4, adapter_reduction=4),
        "epochs": 2,
        "warmup_epochs": 1,
        "batch_size": 8,
        "augment": False,
        "mask_captions": False,
    }
    return TrainConfig(**(values | changes))


def write_toy_run(folder: Path, root: Path) -> Path:
    """Write an untrained run that any process can load, beside its base in a file."""
    base_file, weights = write_base(folder / "base", "clip")
    base = load_base(str(base_file), str(weights), IMAGE_SIZE)
    model = UPPerson(base.clip, PARTS, IMAGE_SIZE, base.statistics)
    disturb(model)
    config = TrainConfig(
        root=str(root), base=str(base_file), pretrained=str(weights),
        height_px=IMAGE_SIZE[0], width_px=IMAGE_SIZE[1], model=PARTS,
    )  # fmt: skip
    run = folder / "run"
    run.mkdir()
    (run / CONFIG).write_text(config.to_yaml(), "utf-8")
    (run / ADAPTER).write_bytes(pack_adapter(model.trained_state(), base))
    return run
