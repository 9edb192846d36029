"""Turn an official checkpoint into a run folder.

    config.yaml          settings read off the checkpoint
    adapter.safetensors  trained tensors, float32, by our names
    base.safetensors     the frozen CLIP by open_clip's names, in the checkpoint's precision
    import.json          where the run comes from, and what became of every tensor

Such a run brings its base along: an official checkpoint holds CLIP with its positions already laid
out for the image size, or fine-tuned in full, and no other file has these weights.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from upperson.config import TrainConfig
from upperson.model.base import Base, load_base
from upperson.model.block import PLAIN_CLIP
from upperson.model.encoder import patch_grid
from upperson.official.mapping import OfficialModel, map_checkpoint
from upperson.official.reading import read_checkpoint
from upperson.run import ADAPTER, CONFIG, pack_adapter
from upperson_rt.errors import InputError
from upperson_rt.files import new_folder, sha256_of_file, write_atomically

BASE = "base.safetensors"
REPORT = "import.json"
NO_ROOT = "(pass --root)"
"""Stands for the data set of a run that was imported without one; errors then show it."""


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
        checkpoint: UP-Person or IRRA-style file, see `reading`.
        run: New run folder.
        dataset: Annotation format of the data set that ``upperson export`` measures on.
        root: Folder of that data set; None leaves it to the commands' own ``--root``.
        base: Architecture of the frozen CLIP; None recognises it.
        image_size: (height_px, width_px) of the training.

    Returns:
        The content of ``import.json``: ``source`` (file, bytes, sha256), ``kind``, ``base``,
        ``image_size``, ``model``, ``mapped`` (official key to our name), ``ignored`` (key to
        reason), ``missing`` (key to what was put there), ``other_entries`` of the file.

    Raises:
        InputError: The file is not usable, see `reading` and `mapping`, or ``run`` is not empty
            or cannot be written.
        UsageError: Unknown base, or an image size that its patches do not divide.
    """
    state, other_entries = read_checkpoint(checkpoint)
    model = map_checkpoint(state, image_size, base)
    report = {
        "source": {
            "file": checkpoint.name,
            "bytes": checkpoint.stat().st_size,
            "sha256": sha256_of_file(checkpoint),
        },
        "kind": "fine-tuned CLIP" if _is_plain(model) else "UP-Person",
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
        _write_tensors(folder / BASE, model.clip)
        # Read back as later commands will: what they are going to find is what gets hashed.
        loaded = load_base(model.base, str(folder / BASE), image_size)
        _require_grid(loaded, image_size)
        trained = {name: _copy(tensor, torch.float32) for name, tensor in model.trained.items()}
        write_atomically(folder / ADAPTER, pack_adapter(trained, loaded))
        write_atomically(folder / CONFIG, config.to_yaml())
        write_atomically(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _is_plain(model: OfficialModel) -> bool:
    sizes = ("prefix_length", "lora_rank", "adapter_reduction")
    return all(getattr(model.config, size) == getattr(PLAIN_CLIP, size) for size in sizes)


def _require_grid(base: Base, image_size: tuple[int, int]) -> None:
    """Refuse positions that would be taken for those of the base's own square images."""
    visual = base.clip.visual
    wanted, found = patch_grid(visual.patch_size, *image_size), tuple(visual.grid_size)
    if found != wanted:
        raise InputError(
            f"{image_size[0]}x{image_size[1]} has {wanted[0]}x{wanted[1]} patches, as many as the "
            f"{found[0]}x{found[1]} of '{base.name}' itself: such a checkpoint cannot be imported"
        )


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    halves = (torch.float16, torch.bfloat16)
    copies = {
        name: _copy(tensor, tensor.dtype if tensor.dtype in halves else torch.float32)
        for name, tensor in tensors.items()
    }
    write_atomically(path, save(copies))


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a tensor: safetensors refuses those that share memory, and views load as such."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
