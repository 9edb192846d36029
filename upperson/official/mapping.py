"""Give the tensors of an official checkpoint our names, and account for every one.

Models fine-tuned in full (IRRA and its kin) have ``base_model.`` only, and heads that are used in
training alone: they become a base without trained parts.

The prefix rows come first here and after position 0 there; attention does not see the difference.
The official code rounds the LoRA product to half precision before it adds it to the weight, also
where everything else is float32. Here A, B and their scale are kept as stored and multiplied
exactly, so features differ from those of the official code by that rounding: 6e-6 in a unit feature
of a ViT-B/16 with random weights.

Official names:

    base_model.<name>                                 frozen CLIP, named as in open_clip
    base_model.{visual.,}transformer.resblocks.i.     L-Adapters and their scales
    {vit,text}_prefix_learner.{vit,text}_prefix.i.    S-Prefix
    LORA_learner.lora_{image,text}.i.                 LoRA; index 0 is K, 1 is V
    <block>.attn.prefix.                              the S-Prefix again, once a forward attached it

i counts blocks from 0. With the settings of the official README there are 301 + 504 tensors, and
120 of them again under their second name.

The official ``depth_lora`` and ``depth_prefix`` D mean the blocks 1 to D, counted from 1 at the
input; ``depth_adapter`` D means the blocks after D. Its files hold no other trace of them than the
names and shapes of the parts.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from upperson.model.base import build_clip
from upperson.model.encoder import UPPerson, patch_grid
from upperson.model.parts import UPPersonConfig
from upperson.model.weights import require_finite
from upperson_rt.errors import InputError, UsageError
from upperson_rt.towers import TOWERS, Tower

Part: TypeAlias = Literal["prefix", "lora", "adapter"]

CLIP = "base_model."
MODEL = (CLIP, "LORA_learner.", "vit_prefix_learner.", "text_prefix_learner.")
"""What is in front of every tensor that features may depend on."""

HEADS = (
    "classifier", "cross_attn.", "cross_modal_transformer.", "ln_post.", "ln_pre_i.", "ln_pre_t.",
    "mlm_head.",
)  # fmt: skip
"""What is in front of tensors that only losses other than SDM use; IRRA has all of them."""

_BLOCK = {
    "image": "base_model.visual.transformer.resblocks.",
    "text": "base_model.transformer.resblocks.",
}
_PREFIX = {
    "image": "vit_prefix_learner.vit_prefix.",
    "text": "text_prefix_learner.text_prefix.",
}
_LORA = {"image": "LORA_learner.lora_image.", "text": "LORA_learner.lora_text."}

_PREFIX_TENSORS = {
    "prefix.key_tokens": "key.tokens",
    "prefix.key_scale": "key.scaler.scale",
    "prefix.value_tokens": "val.tokens",
    "prefix.value_scale": "val.scaler.scale",
    "prefix.scale": "scale_to_grad",
}
_LORA_TENSORS = {
    f"lora.{projection}.{ours}": official
    for index, projection in enumerate(("key", "value"))
    for ours, official in (
        ("down", f"lora_A.{index}"), ("up", f"lora_B.{index}"), ("scale", f"scale.{index}.scale")
    )
}  # fmt: skip
_ADAPTER_TENSORS = {
    f"{ours}.{tensor}": f"{official}.{tensor}"
    for ours, official in (("adapter_attn", "adapter_ln_msa"), ("adapter_mlp", "adapter_ln_mlp"))
    for tensor in ("down.weight", "down.bias", "up.weight", "up.bias")
}
_ADAPTER_SCALES = {"adapter_attn.scale": "scale_1", "adapter_mlp.scale": "scale_2"}

_SIZE_SETTINGS: dict[Part, str] = {
    "prefix": "prefix_length", "lora": "lora_rank", "adapter": "adapter_reduction"
}  # fmt: skip
_PART_NAMES: dict[Part, str] = {"prefix": "S-Prefix", "lora": "LoRA", "adapter": "L-Adapters"}
_SIZE_TENSOR: dict[Part, str] = {
    "prefix": "prefix.key_tokens",
    "lora": "lora.key.down",
    "adapter": "adapter_attn.down.weight",
}
"""The tensor [rows, width] whose shape gives the size of a part."""

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
        InputError: The tensors are not those of a model that can be imported.
        UsageError: The base or the image size does not fit them.
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
    parts = {mapped[key]: state[key] for key in trained}
    return OfficialModel(base, config, weights, parts, mapped, ignored, missing)


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
        unfit = sum(key not in state or state[key].shape != shape for key, shape in shapes.items())
        attempts.append((unfit, name, clip, shapes))
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
    """Return the second names in a checkpoint; their tensors must equal those of the first."""
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
    """Return why a tensor may be left out; refuse one that features may depend on."""
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


# --- Names, and the settings they stand for


def part_keys(part: Part, tower: Tower, block: int) -> dict[str, str]:
    """Return the official key of each tensor of a part, by our name inside the block."""
    places, tensors = {
        "prefix": (_PREFIX, _PREFIX_TENSORS),
        "lora": (_LORA, _LORA_TENSORS),
        "adapter": (_BLOCK, _ADAPTER_TENSORS | _ADAPTER_SCALES),
    }[part]
    where = f"{places[tower]}{block}."
    return {ours: where + official for ours, official in tensors.items()}


def trained_keys(tower: Tower, block: int) -> dict[str, str]:
    """Return the official key of each tensor a block may train, by its name in ``UPPerson``."""
    return {
        f"{tower}.blocks.{block}.{ours}": key
        for part in _PART_NAMES
        for ours, key in part_keys(part, tower, block).items()
    }


def alias_keys(tower: Tower, block: int) -> dict[str, str]:
    """Return the second name of each tensor of a block's S-Prefix, to its first."""
    return {
        f"{_BLOCK[tower]}{block}.attn.prefix.{official}": f"{_PREFIX[tower]}{block}.{official}"
        for official in _PREFIX_TENSORS.values()
    }


def count_blocks(keys: Iterable[str], tower: Tower) -> int:
    """Count the transformer blocks of a tower that names occur of."""
    pattern = re.compile(re.escape(_BLOCK[tower]) + r"(\d+)\.")
    return len({match[1] for key in keys if (match := pattern.match(key))})


def read_settings(state: dict[str, Tensor]) -> UPPersonConfig:
    """Return the settings that a checkpoint was trained with.

    ``prefix_scale``, the initial S, is not in it: the learned S are.

    Raises:
        InputError: A part differs between blocks or towers, or the tensor that gives its size is
            missing.
    """
    settings: dict[str, Any] = {}
    for part, setting in _SIZE_SETTINGS.items():
        found = {tower: _blocks_with(part, tower, state) for tower in TOWERS}
        settings[setting] = _common_size(part, found, state)
        settings[f"{part}_blocks"] = _common_blocks(part, found, state)
    return UPPersonConfig(**settings)


def _blocks_with(part: Part, tower: Tower, state: dict[str, Tensor]) -> list[int]:
    """Return the blocks of a tower, from 0, that have a tensor of a part.

    A scale alone makes no adapter: where the adapter is left out, it scales nothing.
    """
    return [
        block
        for block in range(count_blocks(state, tower))
        if any(
            key in state
            for ours, key in part_keys(part, tower, block).items()
            if not (part == "adapter" and ours.endswith(".scale"))
        )
    ]


def _common_size(part: Part, found: dict[Tower, list[int]], state: dict[str, Tensor]) -> int:
    """Return the one size of a part that fits everywhere, 0 if it is nowhere."""
    fitting: range | None = None
    for tower, blocks in found.items():
        for block in blocks:
            key = part_keys(part, tower, block)[_SIZE_TENSOR[part]]
            tensor = state.get(key)
            if tensor is None or tensor.ndim != 2 or not tensor.numel():
                raise InputError(
                    f"expected a tensor '{key}' [rows, width], found "
                    f"{'none' if tensor is None else list(tensor.shape)}: "
                    "the checkpoint is incomplete, or of another model",
                    code="tensor_missing",
                    tensor=key,
                )
            rows, width = tensor.shape
            sizes = range(rows, rows + 1)
            if part == "adapter":  # Several reductions give one bottleneck.
                sizes = range(width // (rows + 1) + 1, width // rows + 1)
            if fitting is not None:
                sizes = range(max(fitting.start, sizes.start), min(fitting.stop, sizes.stop))
            if not sizes:
                raise InputError(
                    f"{_PART_NAMES[part]} must have one size in all blocks of both towers: "
                    f"'{key}' {list(tensor.shape)} has another one than those before it",
                    code="sizes_differ",
                    part=_PART_NAMES[part],
                    tensor=key,
                )
            fitting = sizes
    return 0 if fitting is None else fitting[-1]


def _common_blocks(part: Part, found: dict[Tower, list[int]], state: dict[str, Tensor]) -> str:
    """Return the blocks with a part as ``UPPersonConfig`` names them, the same in both towers."""
    everywhere = {t: len(blocks) == count_blocks(state, t) for t, blocks in found.items()}
    if all(everywhere.values()) or not any(found.values()):
        return "all"
    ranges = {t: f"{blocks[0] + 1}-{blocks[-1] + 1}" for t, blocks in found.items() if blocks}
    if len(ranges) < len(found) or len(set(ranges.values())) > 1:
        places = ", ".join(f"{tower} {ranges.get(tower, 'none')}" for tower in found)
        raise InputError(
            f"{_PART_NAMES[part]} must be in the same blocks of both towers, found {places}: "
            "the checkpoint is incomplete, or of another model",
            code="blocks_differ",
            part=_PART_NAMES[part],
            places=places,
        )
    return ranges["image"]
