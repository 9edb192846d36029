"""Checkpoints of a run: everything that decides how it goes on, in one checked file.

``last/step_<n>.safetensors`` holds tensors (trained parameters, optimiser moments, the best epoch)
and, as JSON in the metadata, the rest, with a hash over both. A file is written under another name
and renamed, and older ones go when it is on disk; the newest two stay, so that one damaged file
never ends a run.

Batches and augmentation depend on seed, epoch and step alone (``data/batches.py``) and no layer
draws random numbers, so this is all there is.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from upperson.config import TrainConfig
from upperson.data.records import Record, Split
from upperson.model.base import tensors_sha256
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.files import remove_unfinished, write_atomically

KEPT = 2

_CHANGEABLE_SETTINGS = {
    "root", "rehearse", "pretrained", "workers", "checkpoint_every", "allow_partial",
    "load_truncated", "init_from", "cache", "compile",
}  # fmt: skip
"""May change between a run and its resumption: they decide where and how, not what. Where a run
began is in its checkpoints."""

_DEFAULTS = {each.name: repr(each.default) for each in fields(TrainConfig)}
"""Settings of a run that began before there was a setting."""


@dataclass(kw_only=True, slots=True)
class RunState:
    """How far a run is; the trained tensors and the optimiser hold the rest of its state."""

    epoch: int = 0
    """Epochs done."""

    step: int = 0
    """Steps done in the epoch after those."""

    loss_sum: float = 0.0
    """Over these steps."""

    best_epoch: int = 0
    """From 1; 0 before the first."""

    best_r1: float = -1.0

    seconds: float = 0.0
    """Spent by this process and the ones it goes on from."""

    left_out: list[int] = field(default_factory=list)
    """Training pairs that the epoch in progress leaves out as noisy."""

    rows: list[dict[str, float]] = field(default_factory=list)
    """Lines of metrics.csv so far."""

    best: dict[str, Tensor] = field(default_factory=dict)
    """Trained tensors of the best epoch; empty before the first."""


class Checkpointer:
    """Writes what a run goes on from into a folder, and brings a run back to it.

    Args:
        folder: Holds the checkpoints.
        trained: Modules whose parameters that need a gradient are trained.
        optimizer: Their optimiser.
        scaler: Of fp16 training, else None.
        identity: From `identity_of`; a checkpoint must have the same.
    """

    def __init__(
        self,
        folder: Path,
        trained: nn.Module,
        optimizer: Any,
        scaler: Any,
        identity: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._parameters = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        self._optimizer = optimizer
        self._scaler = scaler
        self._identity = dict(identity)

    def save(self, state: RunState, step: int) -> None:
        """Write ``step_<step>.safetensors`` and remove all but the newest two.

        InputError if a trained tensor is not finite or the folder cannot be written to; the
        checkpoints before this one stay.
        """
        for name, tensor in self._parameters.items():
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"the run diverged: '{name}' is not finite; start a new run with a lower lr or "
                    "prefix_scale",
                    code="run_diverged",
                    tensor=name,
                )
        tensors = {f"trained/{name}": tensor.data for name, tensor in self._parameters.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in state.best.items()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
        facts = {
            "progress": {f.name: getattr(state, f.name) for f in fields(state) if f.name != "best"},
            "identity": self._identity,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(facts)  # JSON keeps numbers, text and lists exactly.
        metadata = {"state": text, "sha256": tensors_sha256(tensors, text.encode())}
        path = self._folder / f"step_{step:08d}.safetensors"
        write_atomically(path, save(tensors, metadata=metadata))
        for path in _files(self._folder)[KEPT:]:
            path.unlink(missing_ok=True)
        remove_unfinished(self._folder, "step_*.safetensors")

    def load(self) -> tuple[RunState | None, list[str]]:
        """Go back to the newest checkpoint that is whole.

        Returns the run's state, or None where there is no checkpoint, and a line for each damaged
        one that was skipped. IntegrityError if all are damaged, or the newest is of another run.
        """
        problems: list[str] = []
        for path in _files(self._folder):
            found = _read(path)
            if not isinstance(found, str):
                return self._restore(*found), problems
            problems.append(found)
        if problems:
            raise IntegrityError(
                f"no checkpoint in {self._folder} is whole: {'; '.join(problems)}; remove the "
                "folder to start the run from its beginning",
                code="checkpoints_damaged",
                path=self._folder,
                problems=problems,
            )
        return None, problems

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> RunState:
        if set(facts) != {"progress", "identity", "scaler"}:
            raise IntegrityError(
                "the checkpoint is of another version: start a new run", code="checkpoint_version"
            )
        began = _DEFAULTS | facts["identity"]
        for fact, value in self._identity.items():
            found = began.get(fact)
            if found != value:
                raise IntegrityError(
                    f"the run to resume began with other {fact} ({str(found)[:40]}, now "
                    f"{value[:40]}): put the original in place, or start a new run",
                    code="run_changed",
                    fact=fact,
                    before=found,
                    now=value,
                )
        groups: dict[str, dict[str, Tensor]] = {"trained": {}, "best": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            group, name = key.split("/", 1)
            groups[group][name] = tensor
        expected = {name: tensor.shape for name, tensor in self._parameters.items()}
        if expected != {name: tensor.shape for name, tensor in groups["trained"].items()}:
            raise IntegrityError(
                "the checkpoint holds other trained tensors than this configuration has: "
                "config.yaml was changed after the run began",
                code="checkpoint_tensors",
            )
        with torch.no_grad():
            for name, tensor in groups["trained"].items():
                self._parameters[name].copy_(tensor)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in groups["optimizer"].items():
            index, name = key.split("/")
            moments.setdefault(int(index), {})[name] = tensor
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})
        if self._scaler is not None and facts["scaler"] is not None:
            self._scaler.load_state_dict(facts["scaler"])
        return RunState(**facts["progress"], best=groups["best"])


def identity_of(
    config: TrainConfig, base_sha256: str, splits: Mapping[Split, Sequence[Record]]
) -> dict[str, str]:
    """Return what identifies a run: data, base, and every setting that decides its result.

    Of the data, which image, identity and captions stand in which place of which split; not the
    images' content.
    """
    digest = hashlib.sha256()
    for split, records in splits.items():
        for record in records:
            image = os.path.relpath(record.image, config.root)
            digest.update(repr((split, image, record.pid, record.captions)).encode())
    return {"data": digest.hexdigest(), "base": base_sha256} | {
        name: repr(value)
        for name, value in asdict(config).items()
        if name not in _CHANGEABLE_SETTINGS
    }


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | str:
    """Return a checkpoint's tensors and facts, or what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return f"{path} is damaged: {error}"
    state = metadata.get("state", "")
    if metadata.get("sha256") != tensors_sha256(tensors, state.encode()):
        return f"{path} is damaged: its content does not have the hash it was saved with"
    try:
        facts = json.loads(state)
    except (ValueError, RecursionError) as error:
        return f"{path} is damaged: {error}"
    if not isinstance(facts, dict):
        return f"{path} is damaged: its state is no object"
    return tensors, facts


def _files(folder: Path) -> list[Path]:
    """Return the checkpoint files, newest first."""
    return sorted(folder.glob("step_*.safetensors"), reverse=True)
