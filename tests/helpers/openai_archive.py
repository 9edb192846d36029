"""Weights saved as OpenAI publishes its CLIPs: a scripted module tree in half precision."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

FACTS = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
"""Buffers in OpenAI's archives beside the weights."""


class Bare(nn.Module):
    """A module that only holds tensors and modules."""


def save_openai_archive(state: Mapping[str, Tensor], path: Path) -> None:
    """Script a module with these parameters and OpenAI's facts, and save it."""
    root = Bare()
    for name, tensor in state.items():
        *parents, last = name.split(".")
        module: nn.Module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Bare())
            module = module.get_submodule(parent)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    for name, value in FACTS.items():
        root.register_buffer(name, torch.tensor(value))
    save_scripted(root, path)


def save_scripted(module: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        # torch has no successor that writes this format.
        warnings.filterwarnings("ignore", r".torch\.jit\.\w+. is ", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), path)
