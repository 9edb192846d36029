"""Towers with the sizes of UP-Person on ViT-B/16 at 384x128, for what compilers make of them.

Random weights are enough: fusion looks at structure.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from upperson_calibration.graph import TowerGraph
from upperson_export.blocks import Adapter, Attention, Linear, Mlp, PlainBlock
from upperson_export.graphs import build_variant, export_onnx
from upperson_export.plain import (
    PatchProjection,
    PlainImageTower,
    PlainTextTower,
    PlainTower,
    Projection,
)
from upperson_export.variants import VariantName
from upperson_rt.towers import Tower
from upperson_tensorrt.builder import InputProfile

VOCABULARY = 512
PREFIX = 10
PROFILES = {
    "image": InputProfile("image", (1, 384, 128, 3), (8, 384, 128, 3), (32, 384, 128, 3)),
    "text": InputProfile("input_ids", (1, 2), (8, 32), (32, 77)),
}


def int8_gemms(layers: int) -> int:
    """Count qkv, out, fc1 and fc2 in each block; in the last one queries are a product apart."""
    return 4 * layers + 1


def random(*shape: int) -> Tensor:
    return 0.03 * torch.randn(*shape)


def linear(inputs: int, outputs: int) -> Linear:
    return Linear(random(inputs, outputs), random(outputs))


def adapter(width: int) -> Adapter:
    return Adapter(linear(width, width // 8), linear(width // 8, width))


def vit_block(width: int, heads: int, packed: bool) -> PlainBlock:
    projections = linear(width, width), linear(width, 2 * width), linear(width, width)
    prefix = random(PREFIX, width), random(PREFIX, width)
    attention = Attention(*projections, prefix, heads, packed=packed)
    mlp = Mlp(linear(width, 4 * width), linear(4 * width, width), "quick_gelu")
    norms = nn.LayerNorm(width), nn.LayerNorm(width)
    return PlainBlock(norms[0], adapter(width), attention, norms[1], adapter(width), mlp)


def vit_blocks(layers: int, width: int, heads: int) -> list[PlainBlock]:
    return [vit_block(width, heads, packed=index < layers - 1) for index in range(layers)]


def vit_b16(kind: Tower, layers: int) -> PlainTower:
    """Build a folded tower; ViT-B/16 has twelve blocks, and more words."""
    torch.manual_seed(0)
    if kind == "image":
        tower: PlainTower = PlainImageTower(
            patch=PatchProjection(random(768, 768), random(1, 192, 768), (16, 16)),
            class_row=random(1, 1, 768),
            ln_pre=nn.LayerNorm(768),
            blocks=vit_blocks(layers, 768, 12),
            head=nn.LayerNorm(768),
            projection=Projection(random(768, 512)),
        )
    else:
        tower = PlainTextTower(
            embedding=random(VOCABULARY, 512),
            positions=random(77, 512),
            visible=torch.ones(77, PREFIX + 77).tril(PREFIX).bool(),
            prefix_length=PREFIX,
            blocks=vit_blocks(layers, 512, 8),
            ln_final=nn.LayerNorm(512),
            projection=Projection(random(512, 512)),
        )
    return tower.eval().requires_grad_(False)


def export_vit_b16(folder: Path, layers: int) -> dict[Tower, TowerGraph]:
    examples: dict[Tower, Tensor] = {
        "image": torch.zeros(3, 384, 128, 3, dtype=torch.uint8),
        "text": torch.ones(3, 20, dtype=torch.int32),
    }
    return {
        kind: export_onnx(vit_b16(kind, layers), kind, folder / f"{kind}.onnx", example=example)
        for kind, example in examples.items()
    }


def vit_b16_variant(graph: TowerGraph, variant: VariantName) -> ir.Model:
    return build_variant(graph, variant, {linear.activation: 8.0 for linear in graph.linears})
