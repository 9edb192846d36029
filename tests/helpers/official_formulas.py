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
    f = _Formulas(state, head_width)
    kernel = f["visual.conv1.weight"]
    patch = kernel.shape[-1]
    windows = [
        image[:, :, patch * row : patch * (row + 1), patch * column : patch * (column + 1)]
        for row in range(image.shape[2] // patch)
        for column in range(columns)
    ]
    patches = [window.double().flatten(1) @ kernel.flatten(1).T for window in windows]
    x = torch.stack([f["visual.class_embedding"].expand(len(image), -1), *patches], dim=1)
    x = f.layer_norm("visual.ln_pre", x + f["visual.positional_embedding"])
    x = f.blocks("visual.transformer", "vit", "image", x, causal=False)
    return (f.layer_norm("visual.ln_post", x) @ f["visual.proj"])[:, 0]


def official_text_features(state: State, ids: Tensor, head_width: int = HEAD_WIDTH) -> Tensor:
    """Return features [N, E], not unit norm, of ids [N, L], which are padded with 0 first."""
    f = _Formulas(state, head_width)
    positions = f["positional_embedding"]
    padded = torch.zeros(len(ids), len(positions), dtype=torch.long)
    padded[:, : ids.shape[1]] = ids
    x = f["token_embedding.weight"][padded] + positions
    x = f.blocks("transformer", "text", "text", x, causal=True)
    x = f.layer_norm("ln_final", x) @ f["text_projection"]
    return x[torch.arange(len(ids)), padded.argmax(dim=-1)]


class _Formulas:
    def __init__(self, state: State, head_width: int) -> None:
        self.s = {key.removeprefix("base_model."): value.double() for key, value in state.items()}
        self.head_width = head_width

    def __getitem__(self, name: str) -> Tensor:
        return self.s[name]

    def blocks(self, stack: str, learner: str, lora: str, x: Tensor, causal: bool) -> Tensor:
        i = 0
        while f"{stack}.resblocks.{i}.ln_1.weight" in self.s:
            block = f"{stack}.resblocks.{i}"
            u = self.layer_norm(f"{block}.ln_1", x)
            u = u + self.adapter(block, "adapter_ln_msa", "scale_1", x)
            prefix = f"{learner}_prefix_learner.{learner}_prefix.{i}"
            x = x + self.attention(block, prefix, f"LORA_learner.lora_{lora}.{i}", u, causal)
            u = self.layer_norm(f"{block}.ln_2", x)
            u = u + self.adapter(block, "adapter_ln_mlp", "scale_2", x)
            z = self.linear(f"{block}.mlp.c_fc", u)
            x = x + self.linear(f"{block}.mlp.c_proj", z * torch.sigmoid(1.702 * z))
            i += 1
        return x

    def attention(self, block: str, prefix: str, lora: str, u: Tensor, causal: bool) -> Tensor:
        s = self.s
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
        for start in range(0, width, self.head_width):
            head = slice(start, start + self.head_width)
            scores = q[..., head] @ k[..., head].transpose(1, 2) * self.head_width**-0.5 + mask
            heads.append((scores.softmax(dim=-1) * columns) @ v[..., head])
        return self.linear(f"{block}.attn.out_proj", torch.cat(heads, dim=-1))

    def adapter(self, block: str, name: str, scale: str, x: Tensor) -> Tensor | float:
        if f"{block}.{name}.down.weight" not in self.s:
            return 0.0
        hidden = self.linear(f"{block}.{name}.down", x).clamp(min=0)
        return self.s[f"{block}.{scale}"] * self.linear(f"{block}.{name}.up", hidden)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        spread = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * self.s[f"{name}.weight"] + self.s[f"{name}.bias"]
