"""The state of a run between two steps, and how a checkpoint keeps it.

Batches and augmentation depend on seed, epoch and step alone (``data/sampler.py``) and no layer
draws random numbers, so this is all there is.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from upperson.checkpoint import Checkpoint
from upperson.config import TrainConfig
from upperson.data.records import Record, Split
from upperson_rt.errors import InputError, IntegrityError


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is."""

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

    rows: list[dict[str, float]] = field(default_factory=list)
    """Lines of metrics.csv so far."""


class RunState:
    """What changes while a run goes on.

    Args:
        trained: Modules whose parameters that need a gradient are trained.
        optimizer: Their optimiser.
        scaler: Of fp16 training, else None.
        identity: Facts a checkpoint must share with the run that reads it: data and base.
    """

    def __init__(
        self,
        trained: nn.Module,
        optimizer: Any,
        scaler: Any,
        identity: Mapping[str, str],
    ) -> None:
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        """Trained tensors of the best epoch; empty before the first."""
        self._parameters = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        self._optimizer = optimizer
        self._scaler = scaler
        self._identity = dict(identity)

    def checkpoint(self) -> Checkpoint:
        """Return everything as tensors and JSON values.

        Raises:
            InputError: A trained tensor is not finite: such a state is not worth keeping.
        """
        for name, tensor in self._parameters.items():
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"the run diverged: '{name}' is not finite; start a new run with a lower lr or "
                    "prefix_scale"
                )
        tensors: dict[str, Tensor] = {}
        tensors |= {f"trained/{name}": tensor for name, tensor in self._parameters.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
        state = {
            "progress": asdict(self.progress),
            "identity": self._identity,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }
        return Checkpoint(tensors, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint.

        Raises:
            IntegrityError: It belongs to other data, another base, or another configuration.
        """
        if set(checkpoint.state) != {"progress", "identity", "scaler"}:
            raise IntegrityError("the checkpoint is of another version: start a new run")
        for fact, value in self._identity.items():
            found = checkpoint.state["identity"].get(fact)
            if found != value:
                raise IntegrityError(
                    f"the run to resume began with other {fact} ({str(found)[:40]}, now "
                    f"{value[:40]}): put the original in place, or start a new run"
                )
        groups: dict[str, dict[str, Tensor]] = {"trained": {}, "best": {}, "optimizer": {}}
        for key, tensor in checkpoint.tensors.items():
            group, name = key.split("/", 1)
            groups[group][name] = tensor
        expected = {name: tensor.shape for name, tensor in self._parameters.items()}
        if expected != {name: tensor.shape for name, tensor in groups["trained"].items()}:
            raise IntegrityError(
                "the checkpoint holds other trained tensors than this configuration has: "
                "config.yaml was changed after the run began"
            )
        with torch.no_grad():
            for name, tensor in groups["trained"].items():
                self._parameters[name].copy_(tensor)
        self.best = groups["best"]
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in groups["optimizer"].items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = tensor
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})
        if self._scaler is not None and checkpoint.state["scaler"] is not None:
            self._scaler.load_state_dict(checkpoint.state["scaler"])
        self.progress = Progress(**checkpoint.state["progress"])


_FREE_SETTINGS = {"root", "pretrained", "workers", "checkpoint_every"}
"""May change between a run and its resumption: they decide where and how, not what."""


def identity_of(
    config: TrainConfig, base_sha256: str, splits: Mapping[Split, Sequence[Record]]
) -> dict[str, str]:
    """Name what makes a run what it is: data, base, and every setting that decides its result.

    Of the data, which image, identity and captions stand in which place of which split; not the
    images' content.
    """
    digest = hashlib.sha256()
    for split, records in splits.items():
        for record in records:
            image = os.path.relpath(record.image, config.root)
            digest.update(repr((split, image, record.pid, record.captions)).encode())
    settings = {
        name: repr(value) for name, value in asdict(config).items() if name not in _FREE_SETTINGS
    }
    return {"data": digest.hexdigest(), "base": base_sha256, **settings}
