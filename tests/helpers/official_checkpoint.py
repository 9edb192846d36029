"""Checkpoints as the official code writes them, with random weights: toys, and the real size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from tests.helpers.toy_clip import TOY

HALF = ("weight", "bias", "in_proj_weight", "in_proj_bias", "tokens", "proj", "text_projection")
"""Last parts of the names that are half precision after training on a GPU, LayerNorms aside."""


@dataclass(frozen=True)
class Official:
    """Shapes and settings of an official model; the defaults are those of its README."""

    embed_dim: int = 512
    image_width: int = 768
    text_width: int = 512
    image_layers: int = 12
    text_layers: int = 12
    patch: int = 16
    patches: int = 24 * 8
    vocabulary: int = 49408
    context: int = 77
    prefix_length: int = 10
    rank: int = 32
    reduction: int = 8
    depth_prefix: int = 12
    depth_lora: int = 12
    depth_adapter: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every key of the state dict with its shape, without aliases."""
        image, text = self.image_width, self.text_width
        clip: dict[str, tuple[int, ...]] = {
            "positional_embedding": (self.context, text),
            "text_projection": (text, self.embed_dim),
            "token_embedding.weight": (self.vocabulary, text),
            "visual.class_embedding": (image,),
            "visual.positional_embedding": (1 + self.patches, image),
            "visual.proj": (image, self.embed_dim),
            "visual.conv1.weight": (image, 3, self.patch, self.patch),
            **_layer("ln_final", text),
            **_layer("visual.ln_pre", image),
            **_layer("visual.ln_post", image),
        }
        parts: dict[str, tuple[int, ...]] = {}
        for tower, learner, stack, width, layers in (
            ("image", "vit", "visual.transformer", image, self.image_layers),
            ("text", "text", "transformer", text, self.text_layers),
        ):
            for i in range(layers):
                block = self._block(width, adapters=i >= self.depth_adapter)
                clip |= {f"{stack}.resblocks.{i}.{key}": shape for key, shape in block.items()}
            for i in range(self.depth_prefix):
                place = f"{learner}_prefix_learner.{learner}_prefix.{i}"
                parts |= {f"{place}.scale_to_grad": ()}
                for side in ("key", "val"):
                    parts[f"{place}.{side}.tokens"] = (self.prefix_length, width)
                    parts[f"{place}.{side}.scaler.scale"] = ()
            for i in range(self.depth_lora):
                place = f"LORA_learner.lora_{tower}.{i}"
                for index in (0, 1):
                    parts[f"{place}.lora_A.{index}"] = (self.rank, width)
                    parts[f"{place}.lora_B.{index}"] = (width, self.rank)
                    parts[f"{place}.scale.{index}.scale"] = ()
        return {f"base_model.{key}": shape for key, shape in clip.items()} | parts

    def _block(self, width: int, *, adapters: bool) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            **_layer("attn.out_proj", width, width),
            **_layer("mlp.c_fc", 4 * width, width),
            **_layer("mlp.c_proj", width, 4 * width),
            **_layer("ln_1", width),
            **_layer("ln_2", width),
        }
        if adapters:
            bottleneck = width // self.reduction
            for name in ("adapter_ln_msa", "adapter_ln_mlp"):
                shapes |= _layer(f"{name}.down", bottleneck, width)
                shapes |= _layer(f"{name}.up", width, bottleneck)
            shapes |= {"scale_1": (), "scale_2": ()}
        return shapes


def _layer(name: str, rows: int, *columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, *columns), f"{name}.bias": (rows,)}


TOY_OFFICIAL = Official(
    embed_dim=24, image_width=64, text_width=48, image_layers=2, text_layers=2, patches=3 * 2,
    prefix_length=3, rank=4, reduction=4, depth_prefix=2, depth_lora=2,
)  # fmt: skip
"""The toy of `toy_clip`, with images of 48x32."""

PLAIN = {"depth_prefix": 0, "depth_lora": 0, "depth_adapter": 12}
"""Settings without any trained part, as IRRA's models are."""


def official_state(official: Official, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights, every one away from 0 and 1, in the dtypes of training on a GPU.

    Weights are as large as keeps activations of order 1, so that no part is drowned by another.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in official.shapes().items():
        value = torch.randn(shape, generator=generator)
        if "ln_" in key and ".adapter_" not in key:
            value = (1.0 if key.endswith("weight") else 0.0) + 0.2 * value
        elif key.endswith("scale_to_grad"):
            value = 10 + value
        elif key.endswith(("scale", "scale_1", "scale_2")):
            value = 1 + 0.3 * value
        elif key.endswith("conv1.weight"):
            value *= (3 * official.patch**2) ** -0.5
        elif key.endswith(("tokens", "bias")) or "embedding" in key:
            value *= 0.3
        else:  # Matrices: [out, in], the projections and LoRA included.
            value *= max(shape) ** -0.5
        half = key.rsplit(".", 1)[-1] in HALF or key.endswith(
            ("scaler.scale", "0.scale", "1.scale")
        )
        if half and ".ln_" not in key and "embedding" not in key:
            value = value.half()
        state[key] = value
    return state


def with_aliases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the second name that each prefix tensor gets once a forward attached it."""
    places = {
        "vit_prefix_learner.vit_prefix.": "base_model.visual.transformer.resblocks.",
        "text_prefix_learner.text_prefix.": "base_model.transformer.resblocks.",
    }
    aliases = {}
    for key, value in state.items():
        for place, stack in places.items():
            if key.startswith(place):
                block, tensor = key.removeprefix(place).split(".", 1)
                aliases[f"{stack}{block}.attn.prefix.{tensor}"] = value
    return state | aliases


def irra_heads(width: int = 24) -> dict[str, Tensor]:
    """Return tensors that IRRA trains beside CLIP and no feature depends on."""
    shapes: dict[str, tuple[int, ...]] = {
        **_layer("classifier", 5, width), "cross_attn.in_proj_weight": (3 * width, width),
        "cross_modal_transformer.resblocks.0.ln_1.weight": (width,), "ln_pre_t.weight": (width,),
        "ln_pre_i.bias": (width,), "ln_post.weight": (width,),
        "mlm_head.dense.weight": (width, width), "mlm_head.fc.bias": (7,),
    }  # fmt: skip
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the official training saves around a state dict."""
    moments = {"step": 3, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    return {
        "model": state,
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "scheduler": {"milestones": (20, 50), "last_epoch": 7},
        "num_epoch": 60,
        "iteration": 0,
        "epoch": 7,
    }


def save_official(
    path: Path, official: Official = TOY_OFFICIAL, seed: int = 0
) -> dict[str, Tensor]:
    """Write the checkpoint of a finished training, aliases included; return its state dict."""
    state = with_aliases(official_state(official, seed))
    torch.save(training_checkpoint(state), path)
    return state


def know_toy_base(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any] = TOY) -> None:
    """Make open_clip know a configuration, that of `TOY_OFFICIAL`, under the name ``toy``."""
    known = open_clip.get_model_config
    monkeypatch.setattr(
        open_clip, "get_model_config", lambda name: config if name == "toy" else known(name)
    )
