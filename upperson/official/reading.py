"""Read a checkpoint that somebody else made: tensors only, no code in it ever runs."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from upperson_rt.errors import InputError

_STATES = ("model", "state_dict")
"""Entries of a checkpoint that hold the model, beside its optimizer and counters."""


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the model's tensors of a checkpoint.

    The file is safetensors, or what ``torch.save`` made of a state dict or of a dict with one under
    ``model`` or ``state_dict``. ``module.`` in front of a name, left by parallel training, goes.

    Args:
        path: The file.

    Returns:
        The tensors by name, on the CPU, shapes and dtypes as stored; and what else is in the file,
        such as ``optimizer``.

    Raises:
        InputError: No such file, not a checkpoint, damaged, or it needs more than tensors, such as
            a pickle that would run code.
    """
    if not path.is_file():
        raise InputError(f"expected a checkpoint file at {path}, found none")
    content = _load(path)
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path}: expected a dict of tensors, or a dict with one under "
            f"{' or '.join(_STATES)}, found {type(content).__name__}"
        )
    entry = next((name for name in _STATES if isinstance(content.get(name), Mapping)), None)
    others = [] if entry is None else [str(name) for name in content if name != entry]
    state: dict[str, Tensor] = {}
    for key, value in (content if entry is None else content[entry]).items():
        if not isinstance(value, Tensor):
            others.append(str(key))
            continue
        name = re.sub(r"^(module\.)+", "", str(key))
        if name in state:
            raise InputError(f"{path} holds '{name}' twice, with and without module. in front")
        state[name] = value
    return state, others


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What a wrong file is comes as an error, too.
            return torch.load(path, map_location="cpu", weights_only=True)
    # The file decides what its reader does, so that a damaged one fails in any way there is.
    except Exception as error:
        # torch's own text tells how to run the pickle's code: not something to hand on.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is not None:
            raise InputError(
                f"{path} needs more than tensors ({found[1]}) and may run code, so it is refused: "
                "where it was made, save its state dict alone,  torch.save(model.state_dict(), ...)"
            ) from error
        raise InputError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): expected a whole "
            "file of torch.save with nothing but tensors and plain values, or safetensors"
        ) from error
