"""Smoothed towers compute what the towers before computed, whatever parts they have."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.stress_models import with_loud_channels
from tests.helpers.toy_clip import normalised, toy_ids, toy_model, toy_pixels
from upperson.model.parts import PLAIN_CLIP, UPPersonConfig
from upperson_export.fold import fold_image_tower, fold_text_tower, smooth
from upperson_export.plain import PlainImageTower, PlainTextTower

TOLERANCE = 1e-5
SITES = ("ln_1", "ln_2", "attention.out")


def strong_factors(width: int, seed: int) -> NDArray[np.float32]:
    """Factors from 1/64 to 64."""
    return np.exp2(np.random.default_rng(seed).uniform(-6, 6, width)).astype(np.float32)


def at_every_site(tower: PlainImageTower | PlainTextTower) -> dict[str, NDArray[np.float32]]:
    width = len(tower.get_parameter("blocks.0.ln_1.weight"))
    names = [f"blocks.{i}.{site}" for i in range(len(tower.blocks)) for site in SITES]
    return {name: strong_factors(width, seed) for seed, name in enumerate(names)}


@pytest.mark.parametrize(
    "config",
    [
        UPPersonConfig(prefix_length=3, lora_rank=4, adapter_reduction=4),
        UPPersonConfig(prefix_length=3, prefix_scale=100.0, lora_rank=4, adapter_reduction=4),
        UPPersonConfig(prefix_length=3, lora_rank=4, adapter_reduction=0),
        UPPersonConfig(prefix_length=0, lora_rank=4, adapter_reduction=4),
        UPPersonConfig(
            prefix_length=3,
            prefix_blocks="1",
            lora_blocks="2",
            adapter_blocks="2-2",
            lora_rank=4,
            adapter_reduction=4,
        ),
        PLAIN_CLIP,
    ],
    ids=["all parts", "S 100", "no adapter", "no prefix", "some blocks", "plain CLIP"],
)
def test_smoothing_changes_nothing_in_float32(config: UPPersonConfig) -> None:
    model = toy_model(config)
    pixels = toy_pixels(5)
    image, text = fold_image_tower(model), fold_text_tower(model)
    ids = toy_ids([5, 9, 23])
    with torch.no_grad():
        smoothed = smooth(image, at_every_site(image))(pixels)
        torch.testing.assert_close(smoothed, image(pixels), atol=TOLERANCE, rtol=0)
        smoothed = smooth(text, at_every_site(text))(ids)
        torch.testing.assert_close(smoothed, text(ids), atol=TOLERANCE, rtol=0)


def test_each_site_is_exact_by_itself_and_reaches_its_linears() -> None:
    """With one site wrong and another making up for it, the test above would be blind."""
    tower = fold_image_tower(toy_model())
    pixels = toy_pixels(3)
    with torch.no_grad():
        expected = tower(pixels)
        for site, s_D in at_every_site(tower).items():
            smoothed = smooth(tower, {site: s_D})
            torch.testing.assert_close(smoothed(pixels), expected, atol=TOLERANCE, rtol=0)
            linear = {"ln_1": "attention", "ln_2": "mlp.fc1", "attention.out": "attention.out"}
            block, _, name = site.partition(".")[2].partition(".")
            module = f"blocks.{block}.{linear[name]}"
            before, after = (_entering(item, module, pixels) for item in (tower, smoothed))
            torch.testing.assert_close(after * torch.from_numpy(s_D), before, atol=1e-4, rtol=1e-4)


def test_loud_channels_do_not_change_the_model_and_are_loud() -> None:
    """The stress test's own model: it must differ in nothing but the size of activations."""
    model = toy_model()
    loud = with_loud_channels(model)
    pixels, ids = toy_pixels(3), toy_ids([5, 9])
    with torch.no_grad():
        for tested, reference in (
            (loud.encode_image(normalised(model, pixels)),
             model.encode_image(normalised(model, pixels))),
            (loud.encode_text(ids.long()), model.encode_text(ids.long())),
        ):  # fmt: skip
            torch.testing.assert_close(tested, reference, atol=TOLERANCE, rtol=0)
        for module in ("blocks.0.attention", "blocks.1.mlp.fc1"):
            before, after = (
                _entering(fold_image_tower(item), module, pixels).abs().amax(dim=(0, 1))
                for item in (model, loud)
            )
            ratio, _ = (after / before).sort(descending=True)
            torch.testing.assert_close(ratio[0], torch.tensor(64.0), atol=0.1, rtol=0)
            torch.testing.assert_close(ratio[3:], torch.ones(61), atol=1e-3, rtol=0)


def _entering(tower: torch.nn.Module, module: str, pixels: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = tower.get_submodule(module).register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0])
    )
    tower(pixels)
    handle.remove()
    return found[0]
