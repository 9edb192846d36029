"""Features of an official state dict by the paper's formulas: official names, float64, no modules.

Prefix rows go in after position 0, S multiplies their columns after the softmax, LoRA deltas are
whole matrices, captions have the full context length: nothing here is arranged as in the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_WIDTH = 64

State = dict[str, Tensor]


def official_image_features(
    state: State, image: Tensor, columns: int, head_width: int = HEAD_WIDTH
) -> Tensor:
    """Return features [N, E], not unit norm, of normalised images [N, 3, H, W]."""
    s = _doubles(state)
    kernel = s["base_model.visual.conv1.weight"]
    patch = kernel.shape[-1]
    windows = [
        image[:, :, patch * row : patch * (row + 1), patch * column : patch * (column + 1)]
        for row in range(image.shape[2] // patch)
        for column in range(columns)
    ]
    x = torch.stack(
        [
            s["base_model.visual.class_embedding"].expand(len(image), -1),
            *(window.double().flatten(1) @ kernel.flatten(1).T for window in windows),
        ],
        dim=1,
    )
    x = _layer_norm(s, "base_model.visual.ln_pre", x + s["base_model.visual.positional_embedding"])
    x = _blocks(s, "base_model.visual.transformer", "vit", "image", x, head_width, causal=False)
    return (_layer_norm(s, "base_model.visual.ln_post", x) @ s["base_model.visual.proj"])[:, 0]


def official_text_features(state: State, ids: Tensor, head_width: int = HEAD_WIDTH) -> Tensor:
    """Return features [N, E], not unit norm, of ids [N, L], which are padded with 0 first."""
    s = _doubles(state)
    positions = s["base_model.positional_embedding"]
    padded = torch.zeros(len(ids), len(positions), dtype=torch.long)
    padded[:, : ids.shape[1]] = ids
    x = s["base_model.token_embedding.weight"][padded] + positions
    x = _blocks(s, "base_model.transformer", "text", "text", x, head_width, causal=True)
    x = _layer_norm(s, "base_model.ln_final", x) @ s["base_model.text_projection"]
    return x[torch.arange(len(ids)), padded.argmax(dim=-1)]


def _blocks(
    s: State, stack: str, learner: str, lora: str, x: Tensor, head_width: int, causal: bool
) -> Tensor:
    i = 0
    while (block := f"{stack}.resblocks.{i}") + ".ln_1.weight" in s:
        u = _layer_norm(s, f"{block}.ln_1", x) + _adapter(s, block, "adapter_ln_msa", "scale_1", x)
        x = x + _attention(
            s,
            block,
            f"{learner}_prefix_learner.{learner}_prefix.{i}",
            f"LORA_learner.lora_{lora}.{i}",
            u,
            head_width,
            causal,
        )
        u = _layer_norm(s, f"{block}.ln_2", x) + _adapter(s, block, "adapter_ln_mlp", "scale_2", x)
        z = u @ s[f"{block}.mlp.c_fc.weight"].T + s[f"{block}.mlp.c_fc.bias"]
        z = z * torch.sigmoid(1.702 * z)
        x = x + z @ s[f"{block}.mlp.c_proj.weight"].T + s[f"{block}.mlp.c_proj.bias"]
        i += 1
    return x


def _attention(
    s: State, block: str, prefix: str, lora: str, u: Tensor, head_width: int, causal: bool
) -> Tensor:
    count, length, width = u.shape
    weights = list(s[f"{block}.attn.in_proj_weight"].split(width))
    biases = s[f"{block}.attn.in_proj_bias"].split(width)
    for index in (0, 1):
        if f"{lora}.lora_A.{index}" in s:
            delta = s[f"{lora}.lora_B.{index}"] @ s[f"{lora}.lora_A.{index}"]
            weights[1 + index] = weights[1 + index] + s[f"{lora}.scale.{index}.scale"] * delta
    q, k, v = (u @ weight.T + bias for weight, bias in zip(weights, biases, strict=True))
    mask = torch.zeros(length, length, dtype=torch.float64)
    if causal:
        mask = torch.full_like(mask, float("-inf")).triu(1)
    columns = torch.ones(length, dtype=torch.float64)
    if f"{prefix}.key.tokens" in s:
        keys = s[f"{prefix}.key.scaler.scale"] * s[f"{prefix}.key.tokens"]
        values = s[f"{prefix}.val.scaler.scale"] * s[f"{prefix}.val.tokens"]
        k = torch.cat([k[:, :1], keys.expand(count, -1, -1), k[:, 1:]], dim=1)
        v = torch.cat([v[:, :1], values.expand(count, -1, -1), v[:, 1:]], dim=1)
        mask = torch.cat([mask[:, :1], mask.new_zeros(length, len(keys)), mask[:, 1:]], dim=1)
        columns = torch.ones(length + len(keys), dtype=torch.float64)
        columns[1 : 1 + len(keys)] = s[f"{prefix}.scale_to_grad"]
    heads = []
    for start in range(0, width, head_width):
        head = slice(start, start + head_width)
        scores = q[..., head] @ k[..., head].transpose(1, 2) * head_width**-0.5 + mask
        heads.append((scores.softmax(dim=-1) * columns) @ v[..., head])
    joined = torch.cat(heads, dim=-1)
    return joined @ s[f"{block}.attn.out_proj.weight"].T + s[f"{block}.attn.out_proj.bias"]


def _adapter(s: State, block: str, name: str, scale: str, x: Tensor) -> Tensor | float:
    adapter = f"{block}.{name}"
    if f"{adapter}.down.weight" not in s:
        return 0.0
    hidden = (x @ s[f"{adapter}.down.weight"].T + s[f"{adapter}.down.bias"]).clamp(min=0)
    return s[f"{block}.{scale}"] * (hidden @ s[f"{adapter}.up.weight"].T + s[f"{adapter}.up.bias"])


def _layer_norm(s: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    spread = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * s[f"{name}.weight"] + s[f"{name}.bias"]


def _doubles(state: State) -> State:
    return {key: value.double() for key, value in state.items()}
