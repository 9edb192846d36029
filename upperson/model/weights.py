"""Weights of a CLIP from a local file, whatever it was saved as. Loading never executes code."""

import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from upperson.model.torchscript import is_torchscript, read_torchscript
from upperson_rt.errors import InputError

_OPENAI_FACTS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Entries beside the weights in what OpenAI published, and in state dicts taken from it."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name, on the CPU, in the dtypes of the file.

    Args:
        path: safetensors (by its suffix), a TorchScript archive, or a state dict of torch, bare or
            under ``state_dict`` in a checkpoint, with or without ``module.`` before the names.

    Raises:
        InputError: The file is missing, damaged, or holds something other than tensors.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"expected a file of weights at {path}, found {found}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = read_torchscript(path) if is_torchscript(path) else _read_state_dict(path)
    # Hostile or damaged bytes make pickle, zipfile and torch fail in any way they can.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read as weights: {reason}") from error
    if any(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def pop_openai_facts(state: dict[str, Tensor]) -> bool:
    """Remove OpenAI's entries that are not weights; return whether all of them were there."""
    found = _OPENAI_FACTS & state.keys()
    for name in found:
        del state[name]
    return found == _OPENAI_FACTS


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise UnpicklingError("it is empty")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise UnpicklingError("it is cut off: fetch or copy it again")
    try:
        with warnings.catch_warnings():
            # Of pickle protocols other than 2, which load or fail all the same.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch's own message recommends to load with weights_only=False.
        raise UnpicklingError(
            "expected safetensors, TorchScript or a state dict of plain tensors, found something "
            "else, of which nothing was executed"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise UnpicklingError(f"expected a state dict, found {type(state).__name__}")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
