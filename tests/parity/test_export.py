"""Folded and smoothed against unfolded, torch against ONNX, at several batches and lengths."""

import numpy as np
import pytest
import torch

from tests.helpers.toy_clip import normalised, toy_ids, toy_model, toy_pixels
from tests.helpers.toy_graphs import FOLD, TOWERS, toy_graph
from upperson.model.parts import PLAIN_CLIP, UPPersonConfig
from upperson_export.fold import fold_image_tower, fold_text_tower, smooth
from upperson_export.graphs import export_onnx, write_with_weights
from upperson_rt.backends import open_backend
from upperson_rt.towers import run_tower

TOLERANCE = 1e-5
BATCHES = [1, 17]
LENGTHS = [2, 23, 77]


PARTS = {"prefix_length": 3, "lora_rank": 4, "adapter_reduction": 4}
CONFIGS = {
    "all parts": PARTS,
    "S 100 alone": PARTS | {"prefix_scale": 100.0, "lora_rank": 0, "adapter_reduction": 0},
    "no prefix": PARTS | {"prefix_length": 0},
    "some blocks": PARTS | {"prefix_blocks": "1", "lora_blocks": "2", "adapter_blocks": "2-2"},
    "plain CLIP": None,
}


def config_of(name):
    fields = CONFIGS[name]
    return PLAIN_CLIP if fields is None else UPPersonConfig(**fields)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_folded_and_smoothed_equal_unfolded(name):
    model = toy_model(config_of(name))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image, text = fold_image_tower(model), fold_text_tower(model)
    with torch.no_grad():
        for batch in BATCHES:
            pixels = toy_pixels(batch)
            assert_equal(image(pixels), model.encode_image(normalised(model, pixels)))
            for length in LENGTHS:
                ids = toy_ids([length] * batch)
                assert_equal(text(ids), model.encode_text(ids.long()))
        assert_equal(smooth(image, at_every_site(image))(pixels), image(pixels))
        ids = toy_ids([5, 9, 23])
        assert_equal(smooth(text, at_every_site(text))(ids), text(ids))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


SITES = {"ln_1": "attention", "ln_2": "mlp.fc1", "attention.out": "attention.out"}
"""A module that reads each site."""


def at_every_site(tower):
    """Factors from 1/64 to 64."""
    width = len(tower.get_parameter("blocks.0.ln_1.weight"))
    names = [f"blocks.{i}.{site}" for i in range(len(tower.blocks)) for site in SITES]
    return {
        name: np.exp2(np.random.default_rng(seed).uniform(-6, 6, width)).astype(np.float32)
        for seed, name in enumerate(names)
    }


def test_each_site_is_exact_by_itself_and_reaches_its_linears():
    """With one site wrong and another making up for it, the test above would be blind."""
    tower = fold_image_tower(toy_model())
    pixels = toy_pixels(3)
    with torch.no_grad():
        for site, s_D in at_every_site(tower).items():
            smoothed = smooth(tower, {site: s_D})
            assert_equal(smoothed(pixels), tower(pixels))
            _, block, name = site.split(".", 2)
            module = f"blocks.{block}.{SITES[name]}"
            before, after = (entering(item, module, pixels) for item in (tower, smoothed))
            torch.testing.assert_close(after * torch.from_numpy(s_D), before, atol=1e-4, rtol=1e-4)


def entering(tower, module, pixels):
    found = []
    handle = tower.get_submodule(module).register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0])
    )
    tower(pixels)
    handle.remove()
    return found[0]


@pytest.mark.usefixtures("toy_graphs")
def test_onnx_equals_the_unfolded_model():
    model = toy_model()
    image, text = (open_backend(toy_graph(tower).file, "onnxruntime") for tower in TOWERS)
    with torch.no_grad():
        for batch in BATCHES:
            pixels = toy_pixels(batch)
            expected = model.encode_image(normalised(model, pixels)).numpy()
            found = run_tower(image, "image", pixels.numpy())
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
            for length in LENGTHS:
                ids = toy_ids([max(2, length - row % 3) for row in range(batch)])
                expected = model.encode_text(ids.long()).numpy()
                found = run_tower(text, "text", ids.numpy())
                np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.usefixtures("toy_graphs")
@pytest.mark.parametrize("tower", TOWERS)
def test_exchanged_weights_give_the_file_that_an_export_gives(tower, tmp_path):
    exported, other = toy_graph(tower), FOLD[tower](toy_model(seed=1))
    exchanged = write_with_weights(exported, other, tmp_path / "exchanged.onnx")
    assert exchanged is not None
    assert exchanged.file.read_bytes() != exported.file.read_bytes()
    back = write_with_weights(exchanged, FOLD[tower](toy_model()), tmp_path / "back.onnx")
    assert back is not None
    assert back.file.read_bytes() == exported.file.read_bytes()
    assert back.linears == exported.linears
    if tower == "image":  # A trace takes seconds: one is enough to see that weights change no more.
        again = export_onnx(other, tower, tmp_path / "again.onnx", example=toy_pixels(3))
        assert exchanged.file.read_bytes() == again.file.read_bytes()
