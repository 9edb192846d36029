"""Turn an official checkpoint of unknown origin into a run folder; no code in it ever runs.

    config.yaml          settings read off the checkpoint
    adapter.safetensors  trained tensors, float32, by our names
    base.safetensors     the frozen CLIP by open_clip's names, in the checkpoint's precision
    import.json          where the run comes from, and what became of every tensor

Such a run brings its base along: an official checkpoint holds CLIP with its positions already laid
out for the image size, or fine-tuned in full, and no other file has these weights.
"""

import dataclasses
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from upperson.config import TrainConfig
from upperson.model.base import Base, load_base
from upperson.model.encoder import patch_grid
from upperson.model.weights import is_stored, saved_fault
from upperson.official.mapping import map_checkpoint
from upperson.run import ADAPTER, CONFIG, pack_adapter
from upperson_rt.errors import InputError
from upperson_rt.files import new_folder, sha256_of_file, write_atomically

BASE = "base.safetensors"
REPORT = "import.json"
NO_ROOT = "(pass --root)"
"""Stands for the data set of a run that was imported without one; errors then show it."""

_STATES = ("model", "state_dict")
"""Entries of a checkpoint that hold the model, beside its optimizer and counters."""


def import_checkpoint(
    checkpoint: Path,
    run: Path,
    *,
    dataset: str = "jsonl",
    root: Path | None = None,
    base: str | None = None,
    image_size: tuple[int, int] = (384, 128),
) -> dict[str, Any]:
    """Write a run that evaluates and exports from a checkpoint of the official code.

    Nothing in the file is executed. On an error no folder is left.

    Args:
        checkpoint: UP-Person or IRRA-style file, see `read_checkpoint`.
        run: New run folder.
        dataset: Annotation format of the data set that ``upperson export`` measures on.
        root: Folder of that data set; None leaves it to the commands' own ``--root``.
        base: Architecture of the frozen CLIP; None recognises it.
        image_size: (height_px, width_px) of the training.

    Returns:
        The content of ``import.json``.

    Raises:
        InputError, UsageError: As `read_checkpoint` and `map_checkpoint` raise them, or ``run`` is
            not empty or cannot be written.
    """
    state, other_entries = read_checkpoint(checkpoint)
    model = map_checkpoint(state, image_size, base)
    report = {
        "source": {
            "file": checkpoint.name,
            "bytes": checkpoint.stat().st_size,
            "sha256": sha256_of_file(checkpoint),
        },
        "kind": "fine-tuned CLIP" if model.config.is_plain else "UP-Person",
        "base": model.base,
        "image_size": list(image_size),
        "model": dataclasses.asdict(model.config),
        "mapped": model.mapped,
        "ignored": model.ignored,
        "missing": model.missing,
        "other_entries": other_entries,
    }
    config = TrainConfig(
        dataset=dataset,
        root=NO_ROOT if root is None else str(root.absolute()),
        base=model.base,
        pretrained=BASE,
        height_px=image_size[0],
        width_px=image_size[1],
        model=model.config,
    )
    with new_folder(run) as folder:
        halves = (torch.float16, torch.bfloat16)
        clip = {
            name: _copy(tensor, tensor.dtype if tensor.dtype in halves else torch.float32)
            for name, tensor in model.clip.items()
        }
        write_atomically(folder / BASE, save(clip))
        # Read back as later commands will: what they are going to find is what gets hashed.
        loaded = load_base(model.base, str(folder / BASE), image_size)
        _require_grid(loaded, image_size)
        trained = {name: _copy(tensor, torch.float32) for name, tensor in model.trained.items()}
        write_atomically(folder / ADAPTER, pack_adapter(trained, loaded))
        write_atomically(folder / CONFIG, config.to_yaml())
        write_atomically(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the model's tensors of a checkpoint.

    The file is safetensors, or what ``torch.save`` made of a state dict or of a dict with one under
    ``model`` or ``state_dict``. ``module.`` in front of a name, left by parallel training, goes.

    Returns:
        The tensors by name, on the CPU, shapes and dtypes as stored; and what else is in the file,
        such as ``optimizer``.

    Raises:
        InputError: It is missing, damaged, or needs more than tensors, such as code to run.
    """
    if not path.is_file():
        raise InputError(
            f"expected a checkpoint file at {path}, found none",
            code="checkpoint_not_found",
            path=path,
        )
    content = _load(path)
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path}: expected a dict of tensors, or a dict with one under "
            f"{' or '.join(_STATES)}, found {type(content).__name__}",
            code="not_a_checkpoint",
            path=path,
            found=type(content).__name__,
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
            raise InputError(
                f"{path} holds '{name}' twice, with and without module. in front",
                code="tensor_twice",
                path=path,
                tensor=name,
            )
        if not is_stored(value):
            reason = "more numbers than the file holds"
            raise _unreadable(
                path, reason, f": '{name}' {tuple(value.shape)} has {reason}", tensor=name
            )
        state[name] = value
    return state, others


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, str(error), f": {error}") from error
    try:
        fault = saved_fault(path)
    except (OSError, zipfile.BadZipFile) as error:
        fault = str(error)
    if fault is not None:
        raise _unreadable(path, fault, f": {fault}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What a wrong file is comes as an error, too.
            return torch.load(path, map_location="cpu", weights_only=True)
    # The file decides what its reader does, so that a damaged one fails in any way there is.
    except Exception as error:
        # torch's own message explains how to run the pickle's code: it is not repeated.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is not None:
            raise InputError(
                f"{path} needs more than tensors ({found[1]}) and may run code, so it is refused: "
                "where it was made, save only its state dict:  torch.save(model.state_dict(), ...)",
                code="checkpoint_may_run_code",
                path=path,
                found=found[1],
            ) from error
        reason = type(error).__name__
        raise _unreadable(
            path,
            reason,
            f" ({reason}): expected a whole file of torch.save with nothing but tensors and plain "
            "values, or safetensors",
        ) from error


def _unreadable(path: Path, reason: str, text: str, **fields: Any) -> InputError:
    return InputError(
        f"{path} cannot be read as a checkpoint{text}",
        code="checkpoint_unreadable",
        path=path,
        reason=reason,
        **fields,
    )


def _require_grid(base: Base, image_size: tuple[int, int]) -> None:
    """Refuse positions that would be taken for those of the base's own square images."""
    visual = base.clip.visual
    wanted, found = patch_grid(visual.patch_size, *image_size), tuple(visual.grid_size)
    if found != wanted:
        raise InputError(
            f"{image_size[0]}x{image_size[1]} has {wanted[0]}x{wanted[1]} patches, as many as the "
            f"{found[0]}x{found[1]} of '{base.name}' itself: such a checkpoint cannot be imported",
            code="image_size_ambiguous",
            image_size=image_size,
        )


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a tensor: safetensors refuses those that share memory, and views load as such."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
