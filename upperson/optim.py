"""Optimiser and learning-rate schedule of the paper."""

import math

import torch
from torch import nn

from upperson.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Adam with coupled weight decay over the trained tensors; biases are not decayed."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (exempt if name.endswith("bias") else decayed).append(parameter)
    return torch.optim.Adam(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": exempt, "weight_decay": 0.0},
        ],
        lr=config.lr,
        eps=config.adam_eps,
    )


def learning_rate(epoch: int, config: TrainConfig) -> float:
    """Return the rate of an epoch, counted from 0: linear warm-up from 0.1 lr, then cosine to 0."""
    if epoch < config.warmup_epochs:
        progress = epoch / config.warmup_epochs
        return config.lr * (0.1 * (1 - progress) + progress)
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
