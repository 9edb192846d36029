"""What a run needs before its first step, built from its configuration: data, base, model, loss."""

from dataclasses import dataclass
from pathlib import Path

import torch

from upperson.config import TrainConfig
from upperson.data.batches import identity_labels
from upperson.data.records import Record, Split, read_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.engine import keep_frozen_matrices_in
from upperson.losses import Objective, loss_names
from upperson.model.base import Base, load_base
from upperson.model.encoder import UPPerson
from upperson_rt.errors import InputError, UsageError
from upperson_rt.tokenizer import Tokenizer

Splits = dict[Split, list[Record]]


@dataclass(frozen=True, slots=True)
class Setup:
    """The parts of a run, on the CPU, with fresh trained tensors drawn from its seed."""

    splits: Splits
    base: Base
    model: UPPerson
    objective: Objective
    tokenizer: Tokenizer


def set_up(config: TrainConfig) -> Setup:
    """Read the data and build the model.

    Raises:
        UsageError, InputError: The base, the recipe or the data cannot be used.
    """
    splits = read_dataset(config.dataset, Path(config.root))
    if not splits["train"]:
        raise InputError(f"{config.root} has no image in split 'train': check 'split' in its lines")
    if config.select_on == "test" and not splits["test"]:
        raise InputError(f"{config.root} has no image in split 'test' to select on")
    image_size = (config.height_px, config.width_px)
    torch.manual_seed(config.seed)
    base = load_base(config.base, config.pretrained, image_size)
    model = UPPerson(base.clip, config.model, image_size, (base.mean, base.std))
    if not model.trained_state():
        raise UsageError("no part is trained: set prefix_length, lora_rank or adapter_reduction")
    model.checkpoint_activations = config.checkpoint_activations
    keep_frozen_matrices_in(model, config.precision)
    identities = len(identity_labels(splits["train"]))
    objective = Objective(loss_names(config.loss), model.embed_dim, identities)
    tokenizer = clip_tokenizer(model.text.context_length)
    return Setup(splits, base, model, objective, tokenizer)
