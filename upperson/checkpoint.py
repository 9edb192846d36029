"""Checkpoints of a run: everything that decides how it goes on, in one checked file.

``last/step_<n>.safetensors`` holds tensors (trained parameters, optimiser moments, the best epoch)
and, as JSON in the metadata, the rest, with a hash over both. A file is written under another name
and renamed; the newest two stay, so that one damaged file never ends a run.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upperson_rt.errors import IntegrityError
from upperson_rt.files import write_atomically

KEPT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run goes on from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    """Values that JSON keeps exactly: numbers, text, lists."""


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write ``step_<step>.safetensors`` and remove all but the newest two.

    Raises:
        InputError: The folder cannot be written to, for example on a full disk; the checkpoints
            before this one stay.
    """
    state = json.dumps(checkpoint.state)
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()
    }
    content = save(tensors, metadata={"state": state, "sha256": _digest(tensors, state)})
    write_atomically(folder / f"step_{step:08d}.safetensors", content)
    for path in _paths(folder)[KEPT:]:
        path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint that is whole.

    Returns:
        The checkpoint, or None where there is none, and a line for each damaged one skipped.

    Raises:
        IntegrityError: There are checkpoints, and all of them are damaged.
    """
    problems: list[str] = []
    for path in _paths(folder):
        found = _read(path)
        if isinstance(found, Checkpoint):
            return found, problems
        problems.append(found)
    if problems:
        raise IntegrityError(
            f"no checkpoint in {folder} is whole: {'; '.join(problems)}; remove the folder to "
            "start the run from its beginning"
        )
    return None, problems


def _read(path: Path) -> Checkpoint | str:
    """Return a checkpoint, or what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return f"{path} is damaged: {error}"
    state = metadata.get("state", "")
    if metadata.get("sha256") != _digest(tensors, state):
        return f"{path} is damaged: its content does not have the hash it was saved with"
    content = json.loads(state)
    if not isinstance(content, dict):
        return f"{path} is damaged: its state is no object"
    return Checkpoint(tensors, content)


def _paths(folder: Path) -> list[Path]:
    """Return the checkpoint files, newest first."""
    return sorted(folder.glob("step_*.safetensors"), reverse=True)


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
