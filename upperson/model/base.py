"""Frozen bases: a ViT CLIP of open_clip with weights from a file, a tag or this package.

Shapes of the base are never assumed; everything is read from the module open_clip builds.
"""

import difflib
import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from upperson.data.transforms import PixelStatistics
from upperson.model.encoder import patch_grid
from upperson.model.weights import (
    fetch,
    pixel_statistics,
    pop_openai_facts,
    read_weights,
    require_finite,
    tag_facts,
)
from upperson_rt.errors import InputError, UsageError

SMALL = "upperson-small"
"""Name of the small base that ships with the package, made by ``upperson pretrain-small``."""

ASSETS = Path(__file__).parent.parent / "assets"

_PLAIN = {
    "": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {
        "image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "patch_dropout"
    },
    "text_cfg": {"context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio"},
}  # fmt: skip
"""Entries of open_clip's configurations that give sizes; any other makes it another architecture.

Other towers, tokenizers, poolings, masks and layer scales are all such entries.
"""

_USUAL_CROPS = (384, 128)

_POSITIONS = "visual.positional_embedding"
_LOGIT_SCALE = "logit_scale"


@dataclass(frozen=True, slots=True)
class Base:
    """A CLIP with its weights loaded, and what identifies it."""

    clip: Any
    name: str
    sha256: str
    """Hash over names, shapes and values of the weights, whatever file they came from."""
    statistics: PixelStatistics
    """Mean and std of the pixels it was trained on: images are normalised to (x - mean) / std."""


def load_base(name: str, pretrained: str | None, image_size: tuple[int, int] | None = None) -> Base:
    """Build a base in float32 and evaluation mode.

    A tag's activation (QuickGELU or GELU) and pixel statistics are those it was trained with. Of a
    file in OpenAI's format it is known that it has QuickGELU; any other file says neither, so the
    name decides (``ViT-B-16-quickgelu`` or ``ViT-B-16``) and the statistics are CLIP's.

    Args:
        name: ``upperson-small``, or a ViT CLIP of open_clip, for example ``ViT-B-16``.
        pretrained: A tag of open_clip or a local file: OpenAI's TorchScript archive, a state dict
            of torch, or safetensors. None for ``upperson-small``, whose weights ship with the
            package.
        image_size: (height_px, width_px) of the person crops. Weights whose positional grid is
            already that of the crops, [1 + rows*columns, D], are accepted with it. It does not
            change weights with the grid of the name: ``UPPerson`` interpolates those.

    Raises:
        UsageError: Unknown name or tag, a name without weights, or not a plain ViT CLIP.
        InputError: The file is missing, damaged, cannot be fetched, or belongs to another
            architecture.
    """
    config = _plain_config(name)
    if name == SMALL and pretrained is None:
        pretrained = str(ASSETS / f"{SMALL}.safetensors")
    if pretrained is None:
        raise UsageError(
            f"base '{name}' needs weights, found none: pass --pretrained with a local file "
            "or a tag that open_clip knows, for example openai"
        )
    path = Path(pretrained)
    facts: dict[str, Any] = {}
    if not (path.is_file() or path.suffix or name == SMALL):
        facts = tag_facts(name, pretrained)
        path = fetch(name, pretrained, facts)
    state = read_weights(path)
    if pop_openai_facts(state):
        config["quick_gelu"] = True
    elif "quick_gelu" in facts:
        config["quick_gelu"] = facts["quick_gelu"]
    if image_size is not None and _has_grid_of_crops(state, config["vision_cfg"], image_size):
        config["vision_cfg"]["image_size"] = list(image_size)
    clip = CLIP(**config)
    _fill(clip, state, path, name)
    return Base(clip.eval(), name, weights_sha256(clip), pixel_statistics(facts))


def crop_size(name: str) -> tuple[int, int]:
    """Return (height_px, width_px) of crops for a base: its own, if it was made for people.

    Bases for any picture are square, and crops of people are usually 384x128.

    Raises:
        UsageError: As `load_base`.
    """
    size = _plain_config(name)["vision_cfg"]["image_size"]
    if isinstance(size, int) or size[0] == size[1]:
        return _USUAL_CROPS
    return size[0], size[1]


def build_clip(name: str) -> Any:
    """Build a CLIP with random weights from the package's or open_clip's configuration.

    Raises:
        UsageError: open_clip knows no such model, or it is not a CLIP with two plain towers.
    """
    return CLIP(**_plain_config(name))


def weights_sha256(module: nn.Module) -> str:
    """Hash a module's state by name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _plain_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] | None = None
    if name == SMALL:
        config = json.loads((ASSETS / f"{SMALL}.json").read_text("utf-8"))
    elif ":" not in name:  # open_clip would fetch hf-hub:NAME from the network.
        config = open_clip.get_model_config(name)
    if config is None:
        names = [SMALL, *filter(_is_plain_name, open_clip.list_models())]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        raise UsageError(
            f"base '{name}' is unknown: expected {SMALL} or a ViT CLIP of open_clip, such as "
            + ", ".join(near or ["ViT-B-16", "ViT-B-32", "ViT-L-14"])
        )
    if odd := _what_is_not_plain(config):
        raise UsageError(
            f"base '{name}' is not a plain ViT CLIP ({', '.join(odd)} in its configuration): "
            "choose one such as ViT-B-16"
        )
    return config


def _is_plain_name(name: str) -> bool:
    return not _what_is_not_plain(open_clip.get_model_config(name))


def _what_is_not_plain(config: dict[str, Any]) -> list[str]:
    odd = {
        entry
        for part, known in _PLAIN.items()
        for entry in (config[part] if part else config).keys() - known
    }
    if isinstance(config["vision_cfg"].get("layers"), list):
        odd.add("a ResNet's layers")
    return sorted(odd)


def _has_grid_of_crops(
    state: dict[str, Tensor], vision: dict[str, Any], image_size: tuple[int, int]
) -> bool:
    positions = state.get(_POSITIONS)
    if positions is None or positions.ndim != 2:
        return False
    patch = (vision["patch_size"], vision["patch_size"])
    native = vision["image_size"]
    native = (native, native) if isinstance(native, int) else native
    if len(positions) == 1 + prod(patch_grid(patch, *native)):
        return False
    return len(positions) == 1 + prod(patch_grid(patch, *image_size))


def _fill(clip: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Copy weights of a file into a CLIP of float32, whatever floats they are."""
    expected = clip.state_dict()
    # UP-Person has a fixed temperature: files without this number, or with it as [1], are complete.
    scale = state.get(_LOGIT_SCALE, expected[_LOGIT_SCALE])
    state = state | {_LOGIT_SCALE: scale.reshape(()) if scale.numel() == 1 else scale}
    wrong = [
        f"{key} {tuple(value.shape)}" for key, value in expected.items()
        if key not in state or state[key].shape != value.shape
    ]  # fmt: skip
    if wrong:
        raise InputError(
            f"{path} does not hold a '{name}': {len(wrong)} of {len(expected)} tensors are missing "
            f"or of another shape, first {wrong[0]}: pass the weights of this base"
        )
    with torch.no_grad():
        for key, value in expected.items():
            require_finite(f"{path}: {key}", state[key])
            value.copy_(state[key])
