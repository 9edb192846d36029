"""Frozen bases: a ViT CLIP that open_clip builds, with weights from a file, a tag or this package.

Shapes of the base are never assumed; everything is read from the module open_clip builds.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from upperson.data.transforms import PixelStatistics
from upperson.data.vocabulary import clip_tokenizer_json, gemma_tokenizer_json
from upperson.model.architecture import image_architecture, text_architecture
from upperson.model.configs import ASSETS, SMALL, BaseConfig, base_config
from upperson.model.encoder import patch_grid
from upperson.model.weights import (
    fetch,
    find_tokenizer,
    pixel_statistics,
    pop_openai_facts,
    published_activation,
    read_weights,
    require_finite,
    tag_facts,
)
from upperson_rt.errors import InputError, UsageError
from upperson_rt.tokenizer import Tokenizer

__all__ = ["SMALL", "Base", "build_clip", "load_base", "weights_sha256"]

_POSITIONS = "visual.positional_embedding"
_TEMPERATURE = ("logit_scale", "logit_bias")
_TINY_CLIP = re.compile(r"^(_image_encoder\.|_text_encoder\.|_logit_scale\.)?(module\.)?")
"""In front of the names in TinyCLIP's checkpoints, which keep each tower in a module of its own."""


@dataclass(frozen=True, slots=True)
class Base:
    """A CLIP with its weights loaded, and what identifies it."""

    clip: Any
    name: str
    sha256: str
    """Hash over names, shapes and values of the weights, whatever file they came from; for a base
    that has them, also over its configuration file and its own tokenizer."""
    statistics: PixelStatistics
    """Mean and std of the pixels it was trained on: images are normalised to (x - mean) / std."""
    tokenizer_json: str = field(default_factory=clip_tokenizer_json, repr=False)
    """Content of ``tokenizer.json``."""

    @property
    def has_clips_vocabulary(self) -> bool:
        """Whether its tokenizer is CLIP's."""
        return self.tokenizer_json == clip_tokenizer_json()

    def tokenizer(self) -> Tokenizer:
        """Return what its text tower was trained with."""
        context_length = len(text_architecture(self.clip).positions)
        return Tokenizer.from_json(self.tokenizer_json, context_length)


def load_base(
    name: str,
    pretrained: str | None,
    image_size: tuple[int, int] | None = None,
    *,
    draw: bool = False,
) -> Base:
    """Build a base in float32 and evaluation mode.

    A tag's activation (QuickGELU or GELU) and pixel statistics are those it was trained with. Of a
    file in OpenAI's format it is known that it has QuickGELU; any other file says neither, so the
    name decides (``ViT-B-16-quickgelu`` or ``ViT-B-16``) and the statistics are CLIP's, or those
    of all published weights of a name whose image tower is timm's. A configuration file says both.

    Args:
        name: ``upperson-small``, a ViT CLIP of open_clip, or a file: see `upperson.model.configs`.
        pretrained: A tag of open_clip or a local file: OpenAI's TorchScript archive, a state dict
            of torch, or safetensors. None for ``upperson-small``, whose weights ship with the
            package.
        image_size: (height_px, width_px) of the person crops. Weights whose positional grid is
            already that of the crops, [1 + rows*columns, D], are accepted with it. It does not
            change weights with the grid of the name: ``UPPerson`` interpolates those.
        draw: Whether first values are drawn before the weights replace them. What is drawn after
            a base, such as what a run trains, depends on it.

    Raises:
        UsageError: Unknown name or tag, or no weights for it.
        InputError: A file is missing, damaged, or of another architecture.
    """
    config = base_config(name)
    if name == SMALL and pretrained is None:
        pretrained = str(ASSETS / f"{SMALL}.safetensors")
    if pretrained is None:
        raise UsageError(
            f"base '{name}' needs weights, found none: pass --pretrained with a local file "
            "or a tag that open_clip knows, for example openai",
            code="weights_missing",
            base=name,
        )
    if config.over_timm:
        _require_describable(config)  # Before anything is fetched.
    path = Path(pretrained)
    facts: dict[str, Any] = {}
    from_tag = not (os.path.isfile(path) or path.suffix or name == SMALL or config.file is not None)
    tokenizer_json = _tokenizer_json(config, None if from_tag else path.parent)
    if from_tag:
        facts = tag_facts(name, pretrained)
        path = fetch(name, pretrained, facts)
    state = read_weights(path)
    model = config.model
    if pop_openai_facts(state):
        if config.file is not None and not model["quick_gelu"]:
            raise InputError(
                f"{path} is in OpenAI's format, whose models have QuickGELU, but {config.file} "
                'says "quick_gelu": false: correct the one that is wrong',
                code="activation_contradicts",
                path=path,
                config=config.file,
            )
        model["quick_gelu"] = True
    elif "quick_gelu" in facts and not config.over_timm:
        model["quick_gelu"] = facts["quick_gelu"]
    elif not from_tag and not config.over_timm:
        _require_activation(config, path)
    if image_size is not None and _has_grid_of_crops(state, model["vision_cfg"], image_size):
        model["vision_cfg"] = model["vision_cfg"] | {"image_size": list(image_size)}
    with nullcontext() if draw else _NoInitialisation():
        clip = _build(config)
    _fill(clip, state, path, config.name)
    statistics = pixel_statistics(facts) if facts or not config.statistics else config.statistics
    identity = _identity(clip, config, tokenizer_json)
    return Base(clip.eval(), config.name, identity, statistics, tokenizer_json)


def _require_activation(config: BaseConfig, path: Path) -> None:
    """Refuse a published file whose activation is not the base's: nothing else would show it."""
    published, own = published_activation(path), bool(config.model.get("quick_gelu"))
    if published is None or published == own:
        return
    names = {True: "QuickGELU", False: "GELU"}
    raise InputError(
        f"{path} was trained with {names[published]}, base '{config.name}' has {names[own]}: "
        f"choose the base {'with' if published else 'without'} -quickgelu in its name",
        code="activation_contradicts",
        path=path,
        base=config.name,
    )


def build_clip(name: str) -> Any:
    """Build a CLIP with random weights; raises as `base_config` does."""
    return _build(base_config(name))


def _build(config: BaseConfig) -> Any:
    return (CustomTextCLIP if config.custom_text else CLIP)(**config.model)


class _NoInitialisation(TorchFunctionMode):
    """Skips the initialisation of modules, which takes most of the time to build them."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _require_describable(config: BaseConfig) -> None:
    with torch.device("meta"):
        clip = _build(config)
    image_architecture(clip)
    text = text_architecture(clip)
    if config.tokenizer is not None and text.pooled == "eot":
        raise UsageError(
            f"base '{config.name}' pools the end token as the one with the largest id, which "
            f"{config.tokenizer} does not have: its pool_type is wrong, or it is unsupported"
        )


def _tokenizer_json(config: BaseConfig, beside: Path | None) -> str:
    if config.tokenizer is None:
        return clip_tokenizer_json()
    path = find_tokenizer(config.tokenizer, beside)
    text = config.model["text_cfg"]
    clean = text.get("tokenizer_kwargs", {}).get("clean", "whitespace")
    return gemma_tokenizer_json(path, text["vocab_size"], clean)


def _identity(clip: nn.Module, config: BaseConfig, tokenizer_json: str) -> str:
    weights = weights_sha256(clip)
    own = [json.dumps(config.model, sort_keys=True)] if config.file is not None else []
    if config.tokenizer is not None:
        own.append(tokenizer_json)
    # Names of open_clip stand for their sizes and CLIP's tokenizer.
    return hashlib.sha256("\n".join([weights, *own]).encode()).hexdigest() if own else weights


def weights_sha256(module: nn.Module) -> str:
    """Hash a module's state by name, dtype, shape and bytes."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor], start: bytes = b"") -> str:
    """Hash some bytes, then tensors by name, dtype, shape and bytes."""
    digest = hashlib.sha256(start)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().numpy().data)
    return digest.hexdigest()


def _has_grid_of_crops(
    state: dict[str, Tensor], vision: dict[str, Any], image_size: tuple[int, int]
) -> bool:
    positions = state.get(_POSITIONS)
    if positions is None or positions.ndim != 2 or "patch_size" not in vision:
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
    state = {_TINY_CLIP.sub("", name): tensor for name, tensor in state.items()}
    state = convert_state_dict(clip, state)
    # UP-Person has a fixed temperature: files without these numbers, or with them as [1], are
    # complete. Batch norms are constants, whatever they have counted.
    for key in _TEMPERATURE:
        if key in expected:
            number = state.get(key, expected[key])
            state = state | {key: number.reshape(()) if number.numel() == 1 else number}
    expected = {key: x for key, x in expected.items() if not key.endswith("num_batches_tracked")}
    wrong = [
        f"{key} {tuple(value.shape)}" for key, value in expected.items()
        if key not in state or state[key].shape != value.shape
    ]  # fmt: skip
    if wrong:
        raise InputError(
            f"{path} does not hold a '{name}': {len(wrong)} of {len(expected)} tensors are missing "
            f"or of another shape, first {wrong[0]}: pass the weights of this base",
            code="weights_of_another_base",
            path=path,
            base=name,
            tensor=wrong[0],
            wrong=len(wrong),
        )
    with torch.no_grad():
        for key, value in expected.items():
            require_finite(f"{path}: {key}", state[key])
            value.copy_(state[key])
