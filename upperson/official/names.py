"""Names of the official state dict, and ours for the trained ones.

    base_model.<name>                                 frozen CLIP, named as in open_clip
    base_model.{visual.,}transformer.resblocks.i.     L-Adapters and their scales
    {vit,text}_prefix_learner.{vit,text}_prefix.i.    S-Prefix
    LORA_learner.lora_{image,text}.i.                 LoRA; index 0 is K, 1 is V
    <block>.attn.prefix.                              the S-Prefix again, once a forward attached it

i counts blocks from 0. With the settings of the official README there are 301 + 504 tensors, and
120 of them again under their second name.
"""

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias

Tower: TypeAlias = Literal["image", "text"]
Part: TypeAlias = Literal["prefix", "lora", "adapter"]

TOWERS: tuple[Tower, Tower] = ("image", "text")
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
