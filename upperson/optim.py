"""Optimiser and learning-rate schedule of the paper."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from upperson.config import TrainConfig


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig
) -> torch.optim.Adam:
    """Adam with coupled weight decay over the trained tensors; biases are not decayed.

    Every group has its peak rate under ``peak_lr``: the prefixes may have one of their own.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            decay = 0.0 if name.endswith("bias") else config.weight_decay
            is_prefix = "prefix" in name.split(".")
            peak = config.prefix_lr if is_prefix and config.prefix_lr is not None else config.lr
            groups.setdefault((decay, peak), []).append(parameter)
    return torch.optim.Adam(
        [
            {"params": parameters, "weight_decay": decay, "lr": peak, "peak_lr": peak}
            for (decay, peak), parameters in groups.items()
        ],
        eps=config.adam_eps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, epoch: int, config: TrainConfig) -> float:
    """Set the rate of an epoch, counted from 0, in every group; return the common one."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * schedule(epoch, config)
    return config.lr * schedule(epoch, config)


def schedule(epoch: int, config: TrainConfig) -> float:
    """Return an epoch's share of the peak rate: linear warm-up from 0.1, then cosine to 0."""
    if epoch < config.warmup_epochs:
        progress = epoch / config.warmup_epochs
        return 0.1 * (1 - progress) + progress
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * progress))
