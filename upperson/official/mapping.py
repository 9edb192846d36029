"""Give the tensors of an official checkpoint our names, and account for every one.

Models fine-tuned in full (IRRA and its kin) have ``base_model.`` only, and heads that are used in
training alone: they become a base without trained parts.

The prefix rows come first here and after position 0 there; attention does not see the difference.
The official code rounds the LoRA product to half precision before it adds it to the weight, also
where everything else is float32. Here A, B and their scale are kept as stored and multiplied
exactly, so features differ from those of the official code by that rounding: 6e-6 in a unit feature
of a ViT-B/16 with random weights.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upperson.model.base import build_clip
from upperson.model.encoder import UPPerson, patch_grid
from upperson.model.parts import UPPersonConfig
from upperson.model.weights import require_finite
from upperson.official.names import (
    CLIP,
    HEADS,
    MODEL,
    alias_keys,
    count_blocks,
    read_settings,
    trained_keys,
)
from upperson_rt.errors import InputError, UsageError
from upperson_rt.towers import TOWERS

BASES = ("ViT-B-16-quickgelu", "ViT-B-32-quickgelu", "ViT-L-14-quickgelu")
"""Bases that are recognised: OpenAI's, which is what the official code starts from."""

TEMPERATURE = 0.02
"""Used by the official losses. It is no tensor there, but a CLIP of open_clip has one for it."""

_LOGIT_SCALE = f"{CLIP}logit_scale"
_PATCHES = f"{CLIP}visual.conv1.weight"
_POSITIONS = f"{CLIP}visual.positional_embedding"


@dataclass(frozen=True, slots=True)
class OfficialModel:
    """An official checkpoint in the terms of this toolkit; tensors as stored."""

    base: str
    """Architecture of the frozen CLIP, for :func:`upperson.model.base.load_base`."""

    config: UPPersonConfig

    clip: dict[str, Tensor]
    """Weights of the base by open_clip's names."""

    trained: dict[str, Tensor]
    """Trained tensors by the names of :class:`upperson.model.encoder.UPPerson`."""

    mapped: dict[str, str]
    """Official key to the name in ``clip`` or ``trained``."""

    ignored: dict[str, str]
    """Official key to the reason: ``alias``, ``training head``, ``unused`` or ``unknown``."""

    missing: dict[str, str]
    """Official key that the base has a place for, to what was put there."""


def map_checkpoint(
    state: dict[str, Tensor], image_size: tuple[int, int], base: str | None = None
) -> OfficialModel:
    """Give an official checkpoint's tensors our names.

    Args:
        state: Tensors by official name, without ``module.``.
        image_size: (height_px, width_px) that the model was trained with.
        base: Architecture; None to choose the one of `BASES` that fits.

    Raises:
        InputError: Tensors are missing, of another shape, not finite, or unknown in a place that
            features may depend on; or no single configuration describes the parts of both towers.
        UsageError: The base is unknown or has no QuickGELU, or the image size does not divide into
            its patches.
    """
    if not any(key.startswith(CLIP) for key in state):
        found = ", ".join(sorted(state)[:3]) or "no tensors"
        raise InputError(
            f"expected names such as {_PATCHES}, found {found}: "
            "this is no checkpoint of the official UP-Person or IRRA code",
            code="not_official",
            found=found,
        )
    base, clip, clip_shapes = _fitting_base(state, base)
    activation = type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__
    if activation != "QuickGELU":
        raise UsageError(
            f"base '{base}' has {activation}, the official code QuickGELU: "
            f"pass another --base, such as {BASES[0]}",
            code="activation_contradicts",
            base=base,
            found=activation,
        )
    _check_image_size(state, image_size)
    config = read_settings(state)
    with torch.device("meta"):
        model = UPPerson(clip, config, image_size)
    keys = {
        ours: key
        for tower in TOWERS
        for block in range(count_blocks(state, tower))
        for ours, key in trained_keys(tower, block).items()
    }
    trained = {keys[n]: (n, p.shape) for n, p in model.named_parameters() if p.requires_grad}
    _require_shapes(state, {key: shape for key, (_, shape) in trained.items()})
    mapped = {key: key.removeprefix(CLIP) for key in clip_shapes}
    mapped |= {key: ours for key, (ours, _) in trained.items()}
    for key in mapped:
        require_finite(f"'{key}'", state[key])
    aliases = _find_aliases(state, mapped)
    ignored = {
        key: "alias" if key in aliases else _reason(key) for key in state if key not in mapped
    }
    weights = {mapped[key]: state[key] for key in clip_shapes}
    missing = {}
    if _LOGIT_SCALE not in state:
        weights[_LOGIT_SCALE.removeprefix(CLIP)] = torch.tensor(math.log(1 / TEMPERATURE))
        missing[_LOGIT_SCALE] = f"log(1 / {TEMPERATURE}), on which features do not depend"
    return OfficialModel(
        base,
        config,
        weights,
        {mapped[key]: state[key] for key in trained},
        mapped,
        ignored,
        missing,
    )


def _fitting_base(
    state: dict[str, Tensor], base: str | None
) -> tuple[str, Any, dict[str, torch.Size]]:
    """Return the base that the CLIP tensors fit, without weights, and their official shapes.

    The image tower's positional embedding may have any length: it depends on the image size.
    """
    attempts: list[tuple[int, str, Any, dict[str, torch.Size]]] = []
    for name in BASES if base is None else (base,):
        with torch.device("meta"):
            clip: Any = build_clip(name)
        shapes = {CLIP + key: value.shape for key, value in clip.state_dict().items()}
        found = state.get(_POSITIONS)
        if found is not None and found.ndim == 2 and found.shape[1] == shapes[_POSITIONS][1]:
            shapes[_POSITIONS] = found.shape
        if _LOGIT_SCALE not in state:
            del shapes[_LOGIT_SCALE]
        odd = sum(key not in state or state[key].shape != shape for key, shape in shapes.items())
        attempts.append((odd, name, clip, shapes))
    _, name, clip, shapes = min(attempts, key=lambda attempt: attempt[0])
    try:
        _require_shapes(state, shapes)
    except InputError as error:
        advice = "" if base else "; it is the nearest base, --base takes another"
        raise InputError(
            f"{error} than '{name}'{advice}", code="base_does_not_fit", base=name
        ) from error
    return name, clip, shapes


def _check_image_size(state: dict[str, Tensor], image_size: tuple[int, int]) -> None:
    patch_height, patch_width = state[_PATCHES].shape[2:]
    patches = len(state[_POSITIONS]) - 1
    rows, columns = patch_grid((patch_height, patch_width), *image_size)
    if rows * columns == patches:
        return
    likely = [
        f"{n * patch_height}x{patches // n * patch_width}"
        for n in range(patches, 0, -1)
        if patches % n == 0 and patches <= n * n <= 4 * patches
    ]
    raise InputError(
        f"the checkpoint's images have {patches} patches of {patch_height}x{patch_width} pixels, "
        f"{image_size[0]}x{image_size[1]} (height x width) gives {rows * columns}: pass --height "
        f"and --width of its training{', such as ' * bool(likely)}{' or '.join(likely)}",
        code="image_size_wrong",
        likely=likely,
    )


def _require_shapes(state: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    missing = [key for key in expected if key not in state]
    if missing:
        raise InputError(
            f"the checkpoint lacks {len(missing)} of {len(expected)} tensors, first "
            f"{', '.join(missing[:3])}: it is incomplete, or of another model",
            code="tensors_missing",
            missing=missing,
            expected=len(expected),
        )
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise InputError(
                f"'{key}' must be {list(shape)}, found {list(state[key].shape)}: "
                "the checkpoint is of another model",
                code="tensor_shape",
                tensor=key,
                expected=list(shape),
                found=list(state[key].shape),
            )


def _find_aliases(state: dict[str, Tensor], mapped: dict[str, str]) -> set[str]:
    """Return the second names in a checkpoint; they must say the same as the first."""
    found = set()
    for tower in TOWERS:
        for block in range(count_blocks(state, tower)):
            for alias, original in alias_keys(tower, block).items():
                if alias not in state:
                    continue
                require_finite(f"'{alias}'", state[alias])
                if original not in mapped or not torch.equal(
                    state[alias].float(), state[original].float()
                ):
                    raise InputError(
                        f"'{alias}' must equal '{original}', of which it is another name, and does "
                        "not: the checkpoint is damaged",
                        code="alias_differs",
                        alias=alias,
                        tensor=original,
                    )
                found.add(alias)
    return found


def _reason(key: str) -> str:
    """Say why a tensor may be left out; refuse one that features may depend on."""
    if key.startswith(HEADS):
        return "training head"
    # The scale of an adapter that is left out, and a mask that is built anew.
    if re.fullmatch(r"base_model\..*\.scale_[12]|base_model\.(.*\.)?attn_mask", key):
        return "unused"
    if key.startswith(MODEL):
        raise InputError(
            f"'{key}' is unknown, and features may depend on it: "
            "the checkpoint is of a changed model, which cannot be imported",
            code="tensor_unknown",
            tensor=key,
        )
    return "unknown"
