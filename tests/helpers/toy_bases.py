"""Small bases of each kind: CLIP, SigLIP 2, PE-Core, MobileCLIP-B; and their files.

Two blocks a tower, from the same classes of timm and open_clip as the published ones.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from timm.models.eva import Eva, vit_pe_core_tiny_patch16_384
from timm.models.vision_transformer import VisionTransformer, vit_base_patch16_siglip_256
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from torch import nn

from benchmarks.random_model import ModelSpec, random_base, spread
from tests.helpers.toy_clip import TOY, disturb
from upperson.model.encoder import UPPerson
from upperson.model.parts import UPPersonConfig

SIZE = (48, 32)
"""(height_px, width_px) of crops; the pictures of the towers over timm are 32x32."""

PARTS = UPPersonConfig(prefix_length=3, lora_rank=4, adapter_reduction=4)
CONTEXT = 16
GEMMA_WORDS = (
    "a", "man", "woman", "in", "with", "red", "blue", "green", "coat", "jeans", "bag", "hat",
)  # fmt: skip

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_TEXT = {"context_length": CONTEXT, "width": 48, "heads": 3, "layers": 2}
_SIGLIP_TEXT = {
    "hf_tokenizer_name": "toy/siglip", "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip


def configs() -> dict[str, dict[str, Any]]:
    """Return what open_clip would be given for each, as in an ``open_clip_config.json``."""
    timm_tower = {"image_size": 32, "timm_model_pretrained": False}
    return {
        "clip": TOY,
        "siglip": {
            "embed_dim": 48, "init_logit_bias": -10, "custom_text": True,
            "vision_cfg": timm_tower
            | {"timm_model_name": "toy_siglip", "timm_pool": "map", "timm_proj": "none"},
            "text_cfg": _TEXT | _SIGLIP_TEXT | {"vocab_size": len(gemma_vocabulary())},
        },
        "pecore": {
            "embed_dim": 24, "custom_text": True,
            "vision_cfg": timm_tower
            | {"timm_model_name": "toy_pecore", "timm_pool": "map", "timm_proj": None},
            "text_cfg": _TEXT | {"vocab_size": 49408},
        },
        "mobileclip": {
            "embed_dim": 24, "custom_text": True,
            "vision_cfg": timm_tower
            | {"timm_model_name": "toy_mobileclip", "timm_pool": "token", "timm_proj": None},
            "text_cfg": _TEXT | {"vocab_size": 49408, "no_causal_mask": False},
        },
    }  # fmt: skip


def know_toy_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make timm know the image towers under their names."""
    for tower in (_siglip_tower, _pecore_tower, _mobileclip_tower):
        name = f"toy{tower.__name__.removesuffix('_tower')}"
        monkeypatch.setitem(timm.models._registry._model_entrypoints, name, tower)
        module = "eva" if tower is _pecore_tower else "vision_transformer"
        monkeypatch.setattr(tower, "__module__", f"timm.models.{module}")


def toy_base(kind: str, seed: int = 0) -> Any:
    """Build one with random weights; what starts at 0 or 1 is moved away from it."""
    config = dict(configs()[kind])
    torch.manual_seed(seed)
    clip = (CustomTextCLIP if config.pop("custom_text", False) else CLIP)(**config).eval()
    with torch.no_grad():
        for name, tensor in clip.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif name.endswith("latent"):
                tensor.normal_()
    spread(clip)
    return clip


def shortened_base(name: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a base over timm of real widths, with one block of text, from random weights."""
    known = open_clip.get_model_config(name)
    text = known["text_cfg"] | {"layers": 1}
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: known | {"text_cfg": text})
    clip = random_base(ModelSpec(base=name))
    del clip.visual.trunk.blocks[blocks:]
    spread(clip)
    return clip


def toy_person(kind: str) -> UPPerson:
    statistics = ((0.5, 0.4, 0.3), (0.5, 0.4, 0.6))
    model = UPPerson(toy_base(kind), PARTS, SIZE, statistics).eval()
    disturb(model)
    return model


def random_ids(kind: str, lengths: list[int]) -> torch.Tensor:
    """Return int32 ids, one row a length, EOT last, zero-padded to the longest."""
    eot = 1 if kind == "siglip" else 49407
    most = len(gemma_vocabulary()) if kind == "siglip" else eot
    generator = torch.Generator().manual_seed(2)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(2, most, (length,), dtype=torch.int32, generator=generator)
        row[length - 1] = eot
    return ids


def write_base(folder: Path, kind: str, **changes: Any) -> tuple[Path, Path]:
    """Write configuration, weights and, for SigLIP, the tokenizer; return the first two."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model_cfg": configs()[kind] | changes,
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.4, 0.6]},
    }
    config, weights = folder / f"toy-{kind}.json", folder / f"{kind}.safetensors"
    config.write_text(json.dumps(content), "utf-8")
    save_file(toy_base(kind).state_dict(), weights)
    if kind == "siglip":
        (folder / "tokenizer.json").write_text(json.dumps(gemma_file()), "utf-8")
    return config, weights


def gemma_file() -> dict[str, Any]:
    """Return a small ``tokenizer.json`` as Gemma's is published."""
    vocabulary = gemma_vocabulary()
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": token, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for index, token in enumerate(_SPECIAL)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": vocabulary, "merges": _merges(),
        },
    }  # fmt: skip


def gemma_vocabulary() -> dict[str, int]:
    """Return special tokens, bytes, letters and words, as Gemma's vocabulary has them."""
    pieces = dict.fromkeys(["▁", *"abcdefghijklmnopqrstuvwxyz", *("".join(m) for m in _merges())])
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {token: index for index, token in enumerate(tokens)}


def _merges() -> list[tuple[str, str]]:
    merges = {}
    for word in GEMMA_WORDS:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
        merges["▁", word] = None
    return list(merges)


def _siglip_tower(**options: Any) -> VisionTransformer:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return vit_base_patch16_siglip_256(**options | sizes)


def _pecore_tower(**options: Any) -> Eva:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return vit_pe_core_tiny_patch16_384(
        **options | sizes | {"ref_feat_shape": (4, 4), "head_init_scale": 0}
    )


def _mobileclip_tower(num_classes: int, global_pool: str, **_: Any) -> VisionTransformer:
    """Build it as timm's ``vit_base_mci_224``, whose stem cannot be made smaller."""
    stem = ConvStem(
        channels=(12, 12, 48), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=nn.GELU
    )
    return VisionTransformer(
        img_size=32, patch_size=1, embed_dim=48, depth=2, num_heads=3, num_classes=num_classes,
        global_pool=global_pool, no_embed_class=True,
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False),
    )  # fmt: skip
