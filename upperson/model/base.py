"""Frozen bases: a ViT CLIP of open_clip with weights from a file, a tag or this package.

Shapes of the base are never assumed; everything is read from the module open_clip builds.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
from open_clip.model import CLIP
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from upperson_rt.errors import InputError, UsageError

SMALL = "upperson-small"
"""Name of the small base that ships with the package, made by ``upperson pretrain-small``."""

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True, slots=True)
class Base:
    """A CLIP with its weights loaded, and what identifies it."""

    clip: Any
    name: str
    sha256: str
    """Hash over names, shapes and values of the weights, whatever file they came from."""


def load_base(name: str, pretrained: str | None) -> Base:
    """Build a base in float32 and evaluation mode.

    Args:
        name: ``upperson-small``, or a ViT CLIP of open_clip, for example ``ViT-B-16``.
        pretrained: A local file (safetensors or state dict) or a tag of open_clip. None for
            ``upperson-small``, whose weights ship with the package.

    Raises:
        UsageError: Unknown name, or a name without weights.
        InputError: The file is missing, damaged, or belongs to another architecture.
    """
    if name == SMALL and pretrained is None:
        pretrained = str(ASSETS / f"{SMALL}.safetensors")
    if pretrained is None:
        raise UsageError(
            f"base '{name}' needs weights, found none: pass --pretrained with a local file "
            "or a tag that open_clip knows, for example openai"
        )
    clip = build_clip(name)
    state = _read_weights(name, pretrained)
    expected = clip.state_dict()
    wrong = [
        f"{key} {tuple(value.shape)}" for key, value in expected.items()
        if key not in state or state[key].shape != value.shape
    ]  # fmt: skip
    if wrong:
        raise InputError(
            f"{pretrained} does not hold a '{name}': {len(wrong)} of {len(expected)} tensors are "
            f"missing or of another shape, first {wrong[0]}: pass the weights of this base"
        )
    clip.load_state_dict({key: state[key].float() for key in expected})
    return Base(clip.eval(), name, weights_sha256(clip))


def build_clip(name: str) -> Any:
    """Build a CLIP with random weights from the package's or open_clip's configuration.

    Raises:
        UsageError: open_clip knows no such model, or it is not a CLIP with two plain towers.
    """
    path = ASSETS / f"{SMALL}.json"
    config = (
        json.loads(path.read_text("utf-8")) if name == SMALL else open_clip.get_model_config(name)
    )
    if config is None:
        raise UsageError(
            f"base '{name}' is unknown: expected {SMALL} or a model of open_clip such as ViT-B-16; "
            "see  python -c 'import open_clip; print(open_clip.list_models())'"
        )
    if {"custom_text", "multimodal_cfg"} & config.keys() or "hf_model_name" in config["text_cfg"]:
        raise UsageError(f"base '{name}' is not a plain ViT CLIP: choose one such as ViT-B-16")
    return CLIP(**config)


def weights_sha256(module: nn.Module) -> str:
    """Hash a module's state by name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_weights(name: str, pretrained: str) -> dict[str, Tensor]:
    path = Path(pretrained)
    if not path.is_file():
        if path.suffix or name == SMALL:
            raise InputError(f"expected weights of '{name}' at {path}, found no such file")
        path = Path(_download(name, pretrained))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: dict[str, Tensor] = open_clip.factory.load_state_dict(str(path), weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as weights: {reason}") from error
    return state


def _download(name: str, tag: str) -> str:
    config = open_clip.get_pretrained_cfg(name, tag)
    if not config:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UsageError(
            f"--pretrained '{tag}' is neither a file nor a tag of '{name}': its tags are {tags}"
        )
    logging.getLogger(__name__).info("fetching weights '%s' of %s", tag, name)
    try:
        path: str = open_clip.download_pretrained(config)
    except (OSError, RuntimeError) as error:
        source = config.get("url") or config.get("hf_hub") or tag
        raise InputError(
            f"weights '{tag}' of '{name}' could not be fetched ({type(error).__name__}): get "
            f"{source} on a machine with network and pass the file with --pretrained FILE"
        ) from error
    return path
