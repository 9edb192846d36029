"""Names of the official state dict, ours for the trained ones, and the settings they stand for.

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

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias

from torch import Tensor

from upperson.model.parts import UPPersonConfig
from upperson_rt.errors import InputError
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
    f"lora.{projection}.{ours}": official.format(index)
    for index, projection in enumerate(("key", "value"))
    for ours, official in (("down", "lora_A.{}"), ("up", "lora_B.{}"), ("scale", "scale.{}.scale"))
}
_ADAPTER_TENSORS = {
    f"{ours}.{tensor}": official.format(tensor)
    for ours, official in (
        ("adapter_attn", "adapter_ln_msa.{}"),
        ("adapter_mlp", "adapter_ln_mlp.{}"),
    )
    for tensor in ("down.weight", "down.bias", "up.weight", "up.bias")
}
_ADAPTER_SCALES = {"adapter_attn.scale": "scale_1", "adapter_mlp.scale": "scale_2"}

_PART_NAMES: dict[Part, str] = {"prefix": "S-Prefix", "lora": "LoRA", "adapter": "L-Adapters"}
_TELLS_SIZE: dict[Part, str] = {
    "prefix": "prefix.key_tokens",
    "lora": "lora.key.down",
    "adapter": "adapter_attn.down.weight",
}
"""The tensor [rows, width] that gives the size of a part."""


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
    parts: tuple[Part, ...] = ("prefix", "lora", "adapter")
    return {
        f"{tower}.blocks.{block}.{ours}": key
        for part in parts
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

    Args:
        state: Tensors by official name, without ``module.``.

    Raises:
        InputError: A part differs between blocks or towers, or the tensor that gives its size is
            missing.
    """
    sizes: dict[Part, int] = {}
    places: dict[Part, str] = {}
    for part in _PART_NAMES:
        found = {tower: _blocks_with(part, tower, state) for tower in TOWERS}
        sizes[part] = _common_size(part, found, state)
        places[part] = _common_place(part, found, state)
    return UPPersonConfig(
        prefix_length=sizes["prefix"],
        lora_rank=sizes["lora"],
        adapter_reduction=sizes["adapter"],
        prefix_blocks=places["prefix"],
        lora_blocks=places["lora"],
        adapter_blocks=places["adapter"],
    )


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
            key = part_keys(part, tower, block)[_TELLS_SIZE[part]]
            tensor = state.get(key)
            if tensor is None or tensor.ndim != 2 or not tensor.numel():
                raise InputError(
                    f"expected a tensor '{key}' [rows, width], found "
                    f"{'none' if tensor is None else list(tensor.shape)}: "
                    "the checkpoint is incomplete, or of another model",
                    code="tensor_missing",
                    tensor=key,
                )
            sizes = _sizes(part, *tensor.shape)
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


def _sizes(part: Part, rows: int, width: int) -> range:
    """Return the sizes that lead to such a tensor; several reductions give one bottleneck."""
    if part == "adapter":
        return range(width // (rows + 1) + 1, width // rows + 1)
    return range(rows, rows + 1)


def _common_place(part: Part, found: dict[Tower, list[int]], state: dict[str, Tensor]) -> str:
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
