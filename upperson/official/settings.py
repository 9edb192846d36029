"""Read sizes and places of the trained parts off the names and shapes of an official checkpoint.

The official ``depth_lora`` and ``depth_prefix`` D mean the blocks 1 to D, counted from 1 at the
input; ``depth_adapter`` D means the blocks after D. Its files hold no other trace of them.
"""

from torch import Tensor

from upperson.model.block import UPPersonConfig
from upperson.official.names import TOWERS, Part, Tower, count_blocks, part_keys
from upperson_rt.errors import InputError

_NAMES: dict[Part, str] = {"prefix": "S-Prefix", "lora": "LoRA", "adapter": "L-Adapters"}
_MEASURE: dict[Part, str] = {
    "prefix": "prefix.key_tokens",
    "lora": "lora.key.down",
    "adapter": "adapter_attn.down.weight",
}
"""The tensor [rows, width] that tells the size of a part."""


def read_settings(state: dict[str, Tensor]) -> UPPersonConfig:
    """Return the settings that a checkpoint was trained with.

    ``prefix_scale``, the initial S, is not in it: the learned S are.

    Args:
        state: Tensors by official name, without ``module.``.

    Raises:
        InputError: A part differs between blocks or towers, or the tensor that tells its size is
            missing.
    """
    sizes: dict[Part, int] = {}
    places: dict[Part, str] = {}
    for part in _NAMES:
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
            key = part_keys(part, tower, block)[_MEASURE[part]]
            tensor = state.get(key)
            if tensor is None or tensor.ndim != 2 or not tensor.numel():
                raise InputError(
                    f"expected a tensor '{key}' [rows, width], found "
                    f"{'none' if tensor is None else list(tensor.shape)}: "
                    "the checkpoint is incomplete, or of another model"
                )
            sizes = _sizes(part, *tensor.shape)
            if fitting is not None:
                sizes = range(max(fitting.start, sizes.start), min(fitting.stop, sizes.stop))
            if not sizes:
                raise InputError(
                    f"{_NAMES[part]} must have one size in all blocks of both towers: "
                    f"'{key}' {list(tensor.shape)} has another one than those before it"
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
            f"{_NAMES[part]} must be in the same blocks of both towers, found {places}: "
            "the checkpoint is incomplete, or of another model"
        )
    return ranges["image"]
