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
    tree = module_tree(state)
    for name, value in FACTS.items():
        tree.register_buffer(name, torch.tensor(value))
    save_scripted(tree, path)


def module_tree(state: Mapping[str, Tensor]) -> Bare:
    """Build modules and parameters from dotted names."""
    root = Bare()
    for name, tensor in state.items():
        *parents, last = name.split(".")
        module: nn.Module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Bare())
            module = module.get_submodule(parent)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


def save_scripted(module: nn.Module, path: Path) -> None:
    """Write a TorchScript archive."""
    with warnings.catch_warnings():
        # torch has no successor that writes this format.
        warnings.filterwarnings("ignore", r".torch\.jit\.\w+. is ", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), path)


def random_openai_state(clip: nn.Module) -> dict[str, Tensor]:
    """Draw float16 weights with the names and shapes of a CLIP, which may be on the meta device."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.empty(tensor.shape, dtype=torch.float16).uniform_(
            -0.05, 0.05, generator=generator
        )
        for name, tensor in clip.state_dict().items()
    }
