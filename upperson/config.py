"""A training run as one frozen object. ``upperson/recipe.py`` reads it from YAML."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

import yaml

from upperson.losses import loss_names
from upperson.model.base import SMALL
from upperson.model.block import UPPersonConfig
from upperson_rt.errors import UsageError

LARGEST = 1e30
"""Of a rate or epsilon: beyond it float32 overflows."""

MOST_PX = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides a run's result."""

    dataset: str = "jsonl"
    """Annotation format of the data set."""

    root: str
    """Folder of the data set."""

    base: str = SMALL
    """Frozen CLIP: ``upperson-small`` or a model name of open_clip."""

    pretrained: str | None = None
    """File or open_clip tag with the base's weights; none for ``upperson-small``."""

    height_px: int = 384
    width_px: int = 128

    model: UPPersonConfig = field(default_factory=UPPersonConfig)

    loss: str = "sdm"
    """One or more of sdm, itc, cmpm and id, joined by + (``upperson/losses.py``)."""

    epochs: int = 60
    batch_size: int = 128
    """Pairs of a step, over all processes: the batch the loss sees."""

    accumulate: int = 1
    """Parts in which a batch passes the towers. Exact, since the loss still sees the whole batch:
    less memory for one more forward pass."""

    checkpoint_activations: bool = False
    """Keep only the blocks' inputs for the backward pass and compute the rest again."""

    lr: float = 1e-3
    prefix_lr: float | None = None
    """Peak rate of the prefix tensors alone; none takes lr. See ``docs/decisions.md``."""

    warmup_epochs: int = 5
    """Epochs over which the rate rises from 0.1 lr to lr, before the cosine to 0."""

    weight_decay: float = 4e-5
    """Coupled L2 of Adam; biases are exempt."""

    adam_eps: float = 1e-3
    """The paper's value: large enough that the size of a gradient matters, not only its sign."""

    augment: bool = True
    """Flip, pad and crop, erase."""

    mask_captions: bool = True
    """Mask 15 % of the caption tokens."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run the towers in autocast and keep the frozen matrices in that type. Trained
    tensors, optimiser and loss stay float32."""

    select_on: Literal["val", "test"] = "val"
    """Split that chooses the best epoch. Choosing on test, as published numbers do, is optimistic,
    and results say so. Without a val split, val keeps the last epoch."""

    eval_every: int = 1
    """Epochs between evaluations on the split that selects."""

    checkpoint_every: int = 500
    """Steps between checkpoints; one more is written after every epoch."""

    workers: int = 0
    """Processes that decode images; 0 decodes in the training process."""

    seed: int = 1

    def __post_init__(self) -> None:
        for name in (
            "height_px", "width_px", "epochs", "batch_size", "accumulate", "eval_every",
            "checkpoint_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("warmup_epochs", "workers", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be 0 or more, found {getattr(self, name)}")
        if self.seed >= 2**63:
            raise UsageError(f"seed must be below 2**63, found {self.seed}")
        for name in ("lr", "prefix_lr", "adam_eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < LARGEST:
                raise UsageError(f"{name} must be above 0 and below {LARGEST:g}, found {value}")
        for name in ("height_px", "width_px"):
            if getattr(self, name) > MOST_PX:
                raise UsageError(f"{name} must be at most {MOST_PX}, found {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"weight_decay must be 0 or more, found {self.weight_decay}")
        if self.warmup_epochs > self.epochs:
            raise UsageError(
                f"warmup_epochs ({self.warmup_epochs}) must be at most epochs ({self.epochs}): "
                "set it in the recipe, or with  --set warmup_epochs=N"
            )
        loss_names(self.loss)
        if self.batch_size < 2:
            raise UsageError("batch_size must be at least 2 for a contrastive loss, found 1")

    def to_yaml(self) -> str:
        """Return the object as YAML that :func:`upperson.recipe.read_config` reads back."""
        text: str = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        return text
