"""Folded against unfolded, torch against ONNX, at several batches and text lengths."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.toy_clip import normalised, toy_ids, toy_model, toy_pixels
from tests.helpers.toy_graphs import FOLD, TOWERS, toy_graph
from upperson.model.parts import PLAIN_CLIP, UPPersonConfig
from upperson_export.fold import fold_image_tower, fold_text_tower
from upperson_export.graphs import export_onnx, write_with_weights
from upperson_rt.backends import open_backend
from upperson_rt.towers import Tower, run_tower

TOLERANCE = 1e-5
BATCHES = [1, 2, 17]
LENGTHS = [2, 5, 23, 77]


@pytest.mark.parametrize(
    "config",
    [
        UPPersonConfig(prefix_length=3, lora_rank=4, adapter_reduction=4),
        UPPersonConfig(prefix_length=3, prefix_scale=100.0, lora_rank=0, adapter_reduction=0),
        UPPersonConfig(prefix_length=0, lora_rank=4, adapter_reduction=4),
        UPPersonConfig(
            prefix_length=3,
            prefix_blocks="1",
            lora_blocks="2",
            adapter_blocks="2-2",
            lora_rank=4,
            adapter_reduction=4,
        ),
        UPPersonConfig(prefix_length=3, prefix_blocks="2", lora_rank=4, adapter_reduction=4),
        PLAIN_CLIP,
    ],
    ids=["all parts", "S 100", "no prefix", "some blocks", "prefix in one", "plain CLIP"],
)
def test_folded_equals_unfolded(config: UPPersonConfig) -> None:
    model = toy_model(config)
    image, text = fold_image_tower(model), fold_text_tower(model)
    with torch.no_grad():
        for batch in BATCHES:
            pixels = toy_pixels(batch)
            torch.testing.assert_close(
                image(pixels),
                model.encode_image(normalised(model, pixels)),
                atol=TOLERANCE,
                rtol=0,
            )
            for length in LENGTHS:
                ids = toy_ids([length] * batch)
                torch.testing.assert_close(
                    text(ids), model.encode_text(ids.long()), atol=TOLERANCE, rtol=0
                )


def test_folding_leaves_the_model_as_it_was() -> None:
    model = toy_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold_image_tower(model)
    fold_text_tower(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("toy_graphs")
def test_onnx_equals_the_unfolded_model() -> None:
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
def test_exchanged_weights_give_the_file_that_an_export_gives(tower: Tower, tmp_path: Path) -> None:
    other = FOLD[tower](toy_model(seed=1))
    example = toy_pixels(3) if tower == "image" else toy_ids([4, 9])
    exported = export_onnx(other, tower, tmp_path / "exported.onnx", example=example)
    exchanged = write_with_weights(toy_graph(tower), other, tmp_path / "exchanged.onnx")
    assert exchanged is not None
    assert exchanged.linears == exported.linears
    assert exchanged.file.read_bytes() == exported.file.read_bytes()
