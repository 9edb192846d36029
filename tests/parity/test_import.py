"""Imported runs against the paper's formulas, computed from the official names and tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers.official_checkpoint import (
    PLAIN,
    TOY_OFFICIAL,
    Official,
    irra_heads,
    know_toy_base,
    official_state,
    save_official,
)
from tests.helpers.official_formulas import official_image_features, official_text_features
from tests.helpers.toy_clip import IMAGE_SIZE, TOY, toy_ids
from upperson.official.importing import import_checkpoint
from upperson.run import load_run

TOLERANCE = 1e-5
TOY_HEADS = {"image": 32, "text": 16}


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE, rtol=0)


def unit(features):
    return features / features.norm(dim=-1, keepdim=True)


def toy_features(state, image, ids):
    return (
        unit(official_image_features(state, image, IMAGE_SIZE[1] // 16, TOY_HEADS["image"])),
        unit(official_text_features(state, ids, TOY_HEADS["text"])),
    )


def import_toy(path):
    run = path.with_name("run")
    import_checkpoint(path, run, base="toy", image_size=IMAGE_SIZE)
    _, _, model = load_run(run)
    return model


def inputs():
    image = torch.randn(3, 3, *IMAGE_SIZE, generator=torch.Generator().manual_seed(4))
    return image, toy_ids([3, 9, 77, 2]).long()


def require_parity(model, state):
    image, ids = inputs()
    expected_image, expected_text = toy_features(state, image, ids)
    with torch.no_grad():
        found_image, found_text = model.encode_image(image), model.encode_text(ids)
    close(found_image, expected_image)
    close(found_text, expected_text)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"depth_prefix": 1, "depth_lora": 0},
        {"depth_lora": 1, "depth_adapter": 1, "depth_prefix": 0},
        PLAIN,
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()) or "all",
)
def test_features_equal_the_formulas(settings, tmp_path, monkeypatch):
    know_toy_base(monkeypatch)
    official = replace(TOY_OFFICIAL, **settings)
    state = save_official(tmp_path / "best.pth", official)
    if settings is PLAIN:  # Fully tuned models come with heads.
        torch.save({"model": state | irra_heads()}, tmp_path / "best.pth")
    require_parity(import_toy(tmp_path / "best.pth"), state)


def test_every_tensor_of_a_checkpoint_changes_features(tmp_path, monkeypatch):
    """A tensor that did not would make parity hold wherever it was mapped to."""
    know_toy_base(monkeypatch)
    state = official_state(TOY_OFFICIAL)
    torch.save(state, tmp_path / "best.pth")
    model = import_toy(tmp_path / "best.pth").requires_grad_(True)
    image, ids = inputs()
    weights = torch.randn(model.embed_dim, generator=torch.Generator().manual_seed(5))
    (
        (model.encode_image(image) @ weights).sum() + (model.encode_text(ids) @ weights).sum()
    ).backward()
    names = [name for name, parameter in model.named_parameters()]
    assert len(names) == len(state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 1e-6, name


def test_features_equal_the_formulas_at_the_size_of_person_crops(tmp_path, monkeypatch):
    """With the heads, grid, prefix and rank of the official README, in narrow towers."""
    wide = {"width": 128, "layers": 2}
    vision = {"image_size": [384, 128], "patch_size": 16, "head_width": 64}
    text = TOY["text_cfg"] | {"heads": 2}
    config = TOY | {"vision_cfg": vision | wide, "text_cfg": text | wide}
    know_toy_base(monkeypatch, config)
    towers = {"image_width": 128, "text_width": 128, "image_layers": 2, "text_layers": 2}
    state = save_official(
        tmp_path / "best.pth", Official(embed_dim=24, depth_prefix=2, depth_lora=2, **towers)
    )
    import_checkpoint(tmp_path / "best.pth", tmp_path / "run", base="toy")
    model = load_run(tmp_path / "run").model
    image = torch.randn(1, 3, 384, 128, generator=torch.Generator().manual_seed(4))
    ids = toy_ids([12]).long()
    expected_image = unit(official_image_features(state, image, columns=8))
    expected_text = unit(official_text_features(state, ids))
    with torch.no_grad():
        close(model.encode_image(image), expected_image)
        close(model.encode_text(ids), expected_text)
