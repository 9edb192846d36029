"""What folding refuses, and what the file of a folded tower is compared with."""

import pytest
import torch

from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_graphs import graph_of
from upperson_export.fold import fold_image_tower, fold_text_tower
from upperson_export.parity import require_parity
from upperson_rt.errors import InputError, IntegrityError, UsageError


@pytest.mark.usefixtures("toy_graphs")
def test_a_file_of_other_weights_fails_parity() -> None:
    pixels = torch.randint(0, 256, (4, 48, 32, 3), dtype=torch.uint8)
    path = graph_of(fold_image_tower(toy_model(seed=1)), "image").file
    require_parity(fold_image_tower(toy_model(seed=1)), path, "image", pixels.numpy())
    with pytest.raises(IntegrityError, match=r"differs from torch by .* at batch 1, input 0"):
        require_parity(fold_image_tower(toy_model(seed=2)), path, "image", pixels.numpy())


@pytest.mark.usefixtures("toy_graphs")
def test_a_run_that_diverged_is_told_apart_from_an_export_that_went_wrong() -> None:
    pixels = torch.randint(0, 256, (4, 48, 32, 3), dtype=torch.uint8)
    model = toy_model()
    with torch.no_grad():
        model.image.blocks[0].mlp.c_fc.weight.mul_(1e30)  # Finite, and its products are not.
    tower = fold_image_tower(model)
    path = graph_of(tower, "image").file
    with pytest.raises(InputError, match=r"image tower embeds .* the training diverged"):
        require_parity(tower, path, "image", pixels.numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model = toy_model()
    with torch.no_grad():
        model.text.blocks[1].lora.key.down[0, 0] = value
    fold_image_tower(model)
    with pytest.raises(InputError, match=r"text tower's tensor 'blocks\.1\.lora\.key\.down'"):
        fold_text_tower(model)


def test_an_unknown_activation_is_refused() -> None:
    model = toy_model()
    model.image.blocks[0].mlp.gelu = torch.nn.Tanh()
    with pytest.raises(UsageError, match="found Tanh"):
        fold_image_tower(model)
