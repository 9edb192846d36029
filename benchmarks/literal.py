"""UP-Person written literally from the formulas: the reference of parity tests and benchmarks.

It reads the tensors of a :class:`~upperson.model.encoder.UPPerson` and trains through them, so both
can be compared step by step. What it does differently is what the paper's formulas say
(arXiv 2504.10084) and what an implementation that follows them costs:

- LoRA updates are built as matrices, padded with zero rows for the query, for all blocks of a tower
  at each call, and added to the frozen weights.
- Prefix rows are inserted after position 0.
- Rotary embeddings are products of complex numbers.
- Attention is an explicit matrix for each sample and head. S multiplies its prefix columns after
  the softmax, without normalising again.
- The causal mask is materialised for each sample and head, in every block.
- Text always has the full context length, and every token passes the whole tower; one is picked at
  the end.

Where the formulas leave a choice the cheaper way is taken: tokens come first, as in CLIP, so that
heads are views; scale and mask are part of the product of queries and keys.

Shapes: N batch, L tokens, D width, H heads, d head width, P prefix length, R rank, E embedding.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from upperson.model.encoder import UPPerson
from upperson.model.parts import Block, KVLora, LAdapter, SPrefix


def encode_image(model: UPPerson, image_N3HW: Tensor) -> Tensor:
    """Encode normalised images [N, 3, H, W] to unit-norm [N, E]."""
    tower: Any = model.image
    x_NLD = tower.stem(image_N3HW).flatten(2).transpose(1, 2)
    if tower.class_embedding is not None:
        cls_N1D = tower.class_embedding.expand(len(x_NLD), 1, -1)
        x_NLD = torch.cat([cls_N1D, x_NLD], dim=1)
    x_NLD = tower.ln_pre(x_NLD + tower.positional_embedding)
    x_NLD = tower.ln_post(_blocks(tower.blocks, x_NLD, causal=False, rotary_2Ld=tower.rotary))
    x_ND = x_NLD[:, 0] if tower.pool is None else tower.pool(x_NLD)
    return F.normalize(_projected(x_ND, tower.proj, tower.proj_bias), dim=-1)


def encode_text(model: UPPerson, ids_NL: Tensor) -> Tensor:
    """Encode token ids [N, L], padded to the context length here, to unit-norm [N, E]."""
    tower = model.text
    ids_NL = F.pad(ids_NL, (0, tower.context_length - ids_NL.shape[1]))
    x_NLD = tower.token_embedding(ids_NL) + tower.positional_embedding
    x_NLD = tower.ln_final(_blocks(tower.blocks, x_NLD, causal=tower.mask is not None))
    if tower.pools_last:
        x_ND = x_NLD[:, -1]
    else:
        x_ND = x_NLD[torch.arange(len(ids_NL)), ids_NL.argmax(dim=-1)]
    return F.normalize(_projected(x_ND, tower.text_projection, tower.text_projection_bias), dim=-1)


def _projected(x_ND: Tensor, matrix: Tensor | None, bias: Tensor | None) -> Tensor:
    x_ND = x_ND if matrix is None else x_ND @ matrix
    return x_ND if bias is None else x_ND + bias


def sdm_loss(image_NE: Tensor, text_NE: Tensor, pids: Sequence[int]) -> float:
    """Compute SDM entry by entry from unit-norm embeddings, temperature 0.02, eps 1e-8."""
    total = 0.0
    for queries, gallery in ((text_NE, image_NE), (image_NE, text_NE)):
        for i, query in enumerate(queries):
            logits = torch.stack([query @ item for item in gallery]) / 0.02
            p = torch.exp(logits - torch.logsumexp(logits, 0))
            same = [float(pids[i] == pid) for pid in pids]
            target = [value / sum(same) for value in same]
            for p_ij, q_ij in zip(p.tolist(), target, strict=True):
                if p_ij > 0:
                    total += p_ij * (math.log(p_ij) - math.log(q_ij + 1e-8)) / len(pids)
    return total


def _blocks(
    blocks: nn.ModuleList, x_NLD: Tensor, causal: bool, rotary_2Ld: Tensor | None = None
) -> Tensor:
    deltas = [_lora_delta(block) for block in blocks]
    x_LND = x_NLD.transpose(0, 1)
    for block, delta_3DD in zip(blocks, deltas, strict=True):
        x_LND = _block(block, x_LND, delta_3DD, causal, rotary_2Ld)
    return x_LND.transpose(0, 1)


def _lora_delta(block: nn.Module) -> Tensor | None:
    """Return c * B A of key and value under zero rows for the query, [3D, D]."""
    lora = block.lora
    if lora is None:
        return None
    assert isinstance(lora, KVLora)
    key_DD = lora.key.scale * (lora.key.up @ lora.key.down)
    value_DD = lora.value.scale * (lora.value.up @ lora.value.down)
    return torch.cat([torch.zeros_like(key_DD), key_DD, value_DD])


def _block(
    block: nn.Module,
    x_LND: Tensor,
    delta_3DD: Tensor | None,
    causal: bool,
    rotary_2Ld: Tensor | None,
) -> Tensor:
    assert isinstance(block, Block)
    mlp: Any = block.mlp
    u_LND = _normed(x_LND, block.ln_1, block.adapter_attn)
    x_LND = x_LND + _attention(block, u_LND, delta_3DD, causal, rotary_2Ld)
    u_LND = _normed(x_LND, block.ln_2, block.adapter_mlp)
    hidden = F.linear(u_LND, mlp.c_fc.weight, mlp.c_fc.bias)
    quick = isinstance(mlp.gelu, QuickGELU)
    hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else mlp.gelu(hidden)
    return x_LND + F.linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias)


def _normed(x_LND: Tensor, norm: nn.Module, adapter: LAdapter | None) -> Tensor:
    out: Tensor = norm(x_LND)
    if adapter is None:
        return out
    hidden = F.linear(x_LND, adapter.down.weight, adapter.down.bias).relu()
    return out + adapter.scale * F.linear(hidden, adapter.up.weight, adapter.up.bias)


def _attention(
    block: Block,
    u_LND: Tensor,
    delta_3DD: Tensor | None,
    causal: bool,
    rotary_2Ld: Tensor | None,
) -> Tensor:
    length, batch, width = u_LND.shape
    weight_3DD: Tensor = block.attn.in_proj_weight
    if delta_3DD is not None:
        weight_3DD = weight_3DD + delta_3DD
    q, k, v = F.linear(u_LND, weight_3DD, block.attn.in_proj_bias).chunk(3, dim=-1)
    if rotary_2Ld is not None:
        q, k = (_rotated(x_LND, rotary_2Ld) for x_LND in (q, k))
    prefix_length = 0
    if block.prefix is not None:
        prefix_length = len(block.prefix.key_tokens)
        k, v = _insert_prefix(block.prefix, k, v)
    samples_and_heads = batch * block.heads
    q_BLd, k_BSd, v_BSd = (
        x.reshape(len(x), samples_and_heads, width // block.heads).transpose(0, 1)
        for x in (q, k, v)
    )
    head_scale = q_BLd.shape[-1] ** -0.5
    if causal:
        mask_BLS = _causal_mask(length, prefix_length, samples_and_heads).to(q_BLd)
        scores_BLS = torch.baddbmm(mask_BLS, q_BLd, k_BSd.transpose(1, 2), alpha=head_scale)
    else:
        scores_BLS = torch.bmm(q_BLd, k_BSd.transpose(1, 2)) * head_scale
    attention_BLS = scores_BLS.softmax(dim=-1)
    if block.prefix is not None:
        first, columns, rest = attention_BLS.tensor_split([1, 1 + prefix_length], dim=-1)
        attention_BLS = torch.cat([first, block.prefix.scale * columns, rest], dim=-1)
    out_LND = torch.bmm(attention_BLS, v_BSd).transpose(0, 1).reshape(length, batch, width)
    return F.linear(out_LND, block.attn.out_proj.weight, block.attn.out_proj.bias)


def _rotated(x_LND: Tensor, rotary_2Ld: Tensor) -> Tensor:
    """Multiply each pair of channels, as a complex number, with that of its position's angle."""
    cosine_Ld, sine_Ld = rotary_2Ld
    turns = torch.complex(cosine_Ld[:, ::2], sine_Ld[:, 1::2].contiguous())[:, None, None]
    pairs = torch.unflatten(x_LND, -1, (-1, cosine_Ld.shape[1] // 2, 2)).contiguous()
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(2)


def _insert_prefix(prefix: SPrefix, k_LND: Tensor, v_LND: Tensor) -> tuple[Tensor, Tensor]:
    """Put the prefix rows, without S, after position 0."""
    rows = []
    for scale, tokens_PD, x_LND in (
        (prefix.key_scale, prefix.key_tokens, k_LND),
        (prefix.value_scale, prefix.value_tokens, v_LND),
    ):
        tokens_PND = (scale * tokens_PD)[:, None].expand(-1, x_LND.shape[1], -1)
        rows.append(torch.cat([x_LND[:1], tokens_PND, x_LND[1:]]))
    return rows[0], rows[1]


def _causal_mask(length: int, prefix_length: int, copies: int) -> Tensor:
    """Return what is added to the scores, [copies, L, L + P]: every prefix row is visible."""
    mask_LL = torch.full((length, length), float("-inf")).triu(1)
    prefix_LP = torch.zeros(length, prefix_length)
    mask_LS = torch.cat([mask_LL[:, :1], prefix_LP, mask_LL[:, 1:]], dim=1)
    return mask_LS[None].repeat(copies, 1, 1)
