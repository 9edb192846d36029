"""Files of a base with random weights, and a run whose trained tensors matter: real sizes."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from upperson.data.records import read_dataset
from upperson.model.base import build_clip
from upperson.model.configs import base_config

_NOISE = 0.02


def write_weights(name: str, weights: str, people: str) -> bool:
    """Write random weights of a base, and beside them its tokenizer if it is not CLIP's.

    Returns:
        Whether its vocabulary is CLIP's.
    """
    torch.manual_seed(0)
    state = build_clip(name).state_dict()
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, weights)
    config = base_config(name)
    if config.tokenizer is None:
        return True
    captions = [
        caption
        for records in read_dataset("jsonl", Path(people)).values()
        for record in records
        for caption in record.captions
    ]
    content = gemma_tokenizer(captions, config.model["text_cfg"]["vocab_size"])
    (Path(weights).parent / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return False


def gemma_tokenizer(captions: list[str], size: int) -> dict[str, Any]:
    """Return a byte-pair vocabulary of Gemma's kind and a size that knows the words of captions."""
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({word for caption in captions for word in caption.lower().split()}):
        merges |= {(word[:end], word[end]): None for end in range(1, len(word))}
        merges["▁", word] = None
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = {letter for pair in merges for token in pair for letter in token}
    tokens += dict.fromkeys([*sorted(letters), *("".join(pair) for pair in merges)])
    tokens += [f"<unused{number}>" for number in range(size - len(tokens))]
    model = {
        "type": "BPE", "unk_token": "<unk>", "merges": list(merges),
        "vocab": {token: index for index, token in enumerate(tokens)},
    }  # fmt: skip
    return {"model": model}


def move_trained(file: str) -> None:
    """Move the trained tensors of a run away from where they start and change nothing."""
    torch.manual_seed(0)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    moved = {
        name: tensor + _NOISE * torch.randn_like(tensor) if tensor.ndim else tensor * 1.1
        for name, tensor in tensors.items()
    }
    save_file(moved, file, metadata)
