"""The run folder: what training leaves behind and everything later steps read.

    config.yaml          resolved TrainConfig
    adapter.safetensors  trained tensors only; metadata names the base they belong to
    metrics.csv          a line an epoch
    results.json         best epoch, its validation and test accuracy, parameter counts
    curves.png, events*  for people

A run is a few megabytes; the frozen base is found again by name or file and checked by hash.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from upperson.config import TrainConfig, read_config
from upperson.model.base import Base, load_base
from upperson.model.encoder import UPPerson
from upperson_rt.atomic import write_atomically
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.metrics import RetrievalMetrics

CONFIG = "config.yaml"
ADAPTER = "adapter.safetensors"
METRICS = "metrics.csv"
RESULTS = "results.json"
CURVES = "curves.png"


class RunWriter:
    """Writes one run folder while training goes on; every file is replaced atomically."""

    def __init__(self, path: Path, config: TrainConfig, base: Base, model: UPPerson) -> None:
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} is not empty: choose another --output for the new run")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the run folder {path}: {error.strerror}") from error
        self._path = path
        self._config = config
        self._rows: list[dict[str, float]] = []
        self._metadata = {"base": base.name, "base_sha256": base.sha256}
        self._counts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        self._events: SummaryWriter | None = None

    def save_adapter(self, state: dict[str, Tensor]) -> None:
        """Write the trained tensors."""
        self._begin()
        write_atomically(self._path / ADAPTER, save(state, metadata=self._metadata))

    def log(self, row: dict[str, float]) -> None:
        """Add an epoch to metrics.csv, TensorBoard and the curves."""
        events = self._begin()
        self._rows.append(row)
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(self._rows)
        write_atomically(self._path / METRICS, text.getvalue())
        for name, value in row.items():
            events.add_scalar(name.replace(" ", "/"), value, int(row["epoch"]))
        events.flush()
        write_atomically(self._path / CURVES, draw_curves(self._rows))

    def finish(
        self,
        best_epoch: int,
        val: RetrievalMetrics | None,
        test: RetrievalMetrics | None,
        seconds: float,
    ) -> None:
        """Write results.json and close the event file."""
        results = {
            "best_epoch": best_epoch,
            "val": val and val.as_dict(),
            "test": test and test.as_dict(),
            **self._metadata,
            **self._counts,
            "seconds": round(seconds, 1),
        }
        write_atomically(self._path / RESULTS, json.dumps(results, indent=2) + "\n")
        self._begin().close()

    def _begin(self) -> SummaryWriter:
        """Write what a run starts with, at its first result: one that fails before leaves none."""
        if self._events is None:
            write_atomically(self._path / CONFIG, self._config.to_yaml())
            self._events = SummaryWriter(str(self._path))
        return self._events


def draw_curves(rows: list[dict[str, float]]) -> bytes:
    """Draw loss and validation R@1/5/10 over epochs; return a PNG."""
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss_axes, recall_axes = figure.subplots(1, 2)
    loss_axes.plot([row["epoch"] for row in rows], [row["loss"] for row in rows], color="#c0392b")
    loss_axes.set(title="SDM loss", xlabel="epoch", ylim=(0, None))
    for name, color in (("R@1", "#1f4e79"), ("R@5", "#2e86c1"), ("R@10", "#85c1e9")):
        points = [(row["epoch"], row[f"val {name}"]) for row in rows if f"val {name}" in row]
        if points:
            recall_axes.plot(*zip(*points, strict=True), color=color, label=name)
    recall_axes.set(title="Validation recall, text to image (%)", xlabel="epoch", ylim=(0, 100))
    if recall_axes.lines:
        recall_axes.legend(frameon=False)
    for axes in (loss_axes, recall_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def load_run(path: Path) -> tuple[TrainConfig, Base, UPPerson]:
    """Rebuild the trained model of a run, in evaluation mode.

    Raises:
        InputError: Not a run folder, or damaged.
        IntegrityError: The base is not the one it was trained on.
    """
    adapter = path / ADAPTER
    if not (path / CONFIG).is_file() or not adapter.is_file():
        raise InputError(
            f"expected a run folder with {CONFIG} and {ADAPTER} at {path}: "
            "pass the folder that  upperson train  printed"
        )
    config = read_config(path / CONFIG)
    try:
        with safe_open(adapter, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{adapter} cannot be read: {error}") from error
    base = load_base(config.base, config.pretrained)
    if metadata.get("base_sha256") != base.sha256:
        raise IntegrityError(
            f"{path} was trained on base '{metadata.get('base')}' with weights "
            f"{str(metadata.get('base_sha256'))[:12]}, found '{base.name}' with "
            f"{base.sha256[:12]}: put the original weights at the path in its {CONFIG}"
        )
    model = UPPerson(base.clip, config.model, (config.height_px, config.width_px))
    expected = {name: tensor.shape for name, tensor in model.trained_state().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    if expected != found:
        odd = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise InputError(
            f"{adapter} does not fit {CONFIG}: {len(odd)} tensors differ, first '{odd[0]}'"
        )
    model.load_state_dict(state, strict=False)
    return config, base, model.eval()
