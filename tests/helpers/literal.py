"""UP-Person written literally from the paper's formulas, slow and obvious: the reference.

Differences from the product on purpose: LoRA deltas are built as matrices, the prefix is inserted
after position 0, attention is an explicit matrix, S multiplies its prefix columns after the
softmax, and text always has the full context length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upperson.model.block import Block
from upperson.model.encoder import UPPerson


def literal_block(block: Block, x: Tensor, causal: bool) -> Tensor:
    """Compute one block for x [N, L, D]."""
    width = x.shape[-1]
    u = block.ln_1(x)
    if block.adapter_attn is not None:
        u = u + literal_adapter(block.adapter_attn, x)
    weight_q, weight_k, weight_v = block.attn.in_proj_weight.split(width)
    bias_q, bias_k, bias_v = block.attn.in_proj_bias.split(width)
    if block.lora is not None:
        key, value = block.lora.key, block.lora.value
        weight_k = weight_k + key.scale * (key.up @ key.down)
        weight_v = weight_v + value.scale * (value.up @ value.down)
    q, k, v = u @ weight_q.T + bias_q, u @ weight_k.T + bias_k, u @ weight_v.T + bias_v
    length, prefix_length = x.shape[1], 0
    if block.prefix is not None:
        prefix = block.prefix
        prefix_length = len(prefix.key_tokens)
        tokens_k = (prefix.key_scale * prefix.key_tokens).expand(len(x), -1, -1)
        tokens_v = (prefix.value_scale * prefix.value_tokens).expand(len(x), -1, -1)
        k = torch.cat([k[:, :1], tokens_k, k[:, 1:]], dim=1)
        v = torch.cat([v[:, :1], tokens_v, v[:, 1:]], dim=1)
    mask = torch.zeros(length, length)
    if causal:
        mask = torch.full((length, length), float("-inf")).triu(1)
    mask = torch.cat([mask[:, :1], torch.zeros(length, prefix_length), mask[:, 1:]], dim=1)
    heads = []
    for q_h, k_h, v_h in zip(
        q.chunk(block.heads, -1), k.chunk(block.heads, -1), v.chunk(block.heads, -1), strict=True
    ):
        attention = (q_h @ k_h.transpose(1, 2) * q_h.shape[-1] ** -0.5 + mask).softmax(-1)
        if block.prefix is not None:
            first, columns, rest = attention.split([1, prefix_length, length - 1], dim=-1)
            attention = torch.cat([first, block.prefix.scale * columns, rest], dim=-1)
        heads.append(attention @ v_h)
    x = x + block.attn.out_proj(torch.cat(heads, dim=-1))
    u = block.ln_2(x)
    if block.adapter_mlp is not None:
        u = u + literal_adapter(block.adapter_mlp, x)
    hidden = block.mlp.c_fc(u)
    return x + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))


def literal_adapter(adapter: torch.nn.Module, x: Tensor) -> Tensor:
    """Compute s * (W_up relu(W_down x + b_down) + b_up)."""
    hidden = (x @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    return adapter.scale * (hidden @ adapter.up.weight.T + adapter.up.bias)


def literal_encode_image(model: UPPerson, image: Tensor) -> Tensor:
    """Compute features [N, E] of normalised images, unit norm."""
    tower = model.image
    patch = tower.conv1.weight.shape[-1]
    rows = []
    for y in range(0, image.shape[2], patch):
        for x in range(0, image.shape[3], patch):
            window = image[:, :, y : y + patch, x : x + patch].flatten(1)
            rows.append(window @ tower.conv1.weight.flatten(1).T)
    tokens = torch.stack([tower.class_embedding.expand(len(image), -1), *rows], dim=1)
    tokens = tower.ln_pre(tokens + tower.positional_embedding)
    for block in tower.blocks:
        tokens = literal_block(block, tokens, causal=False)
    features = (tower.ln_post(tokens) @ tower.proj)[:, 0]
    return features / features.norm(dim=-1, keepdim=True)


def literal_encode_text(model: UPPerson, ids: Tensor) -> Tensor:
    """Compute features [N, E] of ids, padded to the context length first, unit norm."""
    tower = model.text
    padded = torch.zeros(len(ids), tower.context_length, dtype=torch.long)
    padded[:, : ids.shape[1]] = ids
    tokens = tower.token_embedding(padded) + tower.positional_embedding
    for block in tower.blocks:
        tokens = literal_block(block, tokens, causal=True)
    features = tower.ln_final(tokens) @ tower.text_projection
    features = features[torch.arange(len(ids)), padded.argmax(dim=-1)]
    return features / features.norm(dim=-1, keepdim=True)


def literal_sdm(image: Tensor, text: Tensor, pids: list[int]) -> float:
    """Compute the loss entry by entry from unit-norm embeddings, temperature 0.02, eps 1e-8."""
    total = 0.0
    for queries, gallery in ((text, image), (image, text)):
        for i, query in enumerate(queries):
            logits = torch.stack([query @ item for item in gallery]) / 0.02
            p = torch.exp(logits - torch.logsumexp(logits, 0))
            same = [float(pids[i] == pid) for pid in pids]
            target = [value / sum(same) for value in same]
            for p_ij, q_ij in zip(p.tolist(), target, strict=True):
                if p_ij > 0:
                    total += p_ij * (math.log(p_ij) - math.log(q_ij + 1e-8)) / len(pids)
    return total
