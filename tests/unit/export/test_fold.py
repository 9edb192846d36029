"""What folding and smoothing refuse, and where smoothing factors go in a folded tower."""

import numpy as np
import pytest
import torch

from tests.helpers.refused import refused
from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_graphs import graph_of
from upperson_export.fold import fold_image_tower, fold_text_tower, smooth
from upperson_export.parity import require_parity
from upperson_rt.errors import InputError, IntegrityError, UsageError

WIDTH = 64


@pytest.mark.usefixtures("toy_graphs")
def test_a_file_of_other_weights_and_a_run_that_diverged_are_told_apart():
    pixels = torch.randint(0, 256, (4, 48, 32, 3), dtype=torch.uint8).numpy()
    tower = fold_image_tower(toy_model(seed=1))
    path = graph_of(tower, "image").file
    require_parity(tower, path, "image", pixels)
    with refused("export_differs", IntegrityError, tower="image", batch=1, input=0):
        require_parity(fold_image_tower(toy_model(seed=2)), path, "image", pixels)
    model = toy_model()
    with torch.no_grad():
        model.image.blocks[0].mlp.c_fc.weight.mul_(1e30)  # Finite; its products are not.
    tower = fold_image_tower(model)
    with refused("embedding_not_finite", InputError, tower="image"):
        require_parity(tower, graph_of(tower, "image").file, "image", pixels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = toy_model()
    with torch.no_grad():
        model.text.blocks[1].lora.key.down[0, 0] = value
    fold_image_tower(model)
    with refused("weight_not_finite", InputError, tower="text", tensor="blocks.1.lora.key.down"):
        fold_text_tower(model)


def test_an_unknown_activation_is_refused():
    model = toy_model()
    model.image.blocks[0].mlp.gelu = torch.nn.Tanh()
    with refused("activation_unknown", UsageError, found="Tanh"):
        fold_image_tower(model)


# --- Smoothing: tests/parity/test_export.py checks that a tower computes the same


@pytest.fixture
def tower():
    return fold_image_tower(toy_model())


@pytest.mark.parametrize(
    ("site", "values", "code"),
    [
        ("blocks.2.ln_1", np.ones(WIDTH), "site_unknown"),
        ("blocks.0.mlp.fc2", np.ones(WIDTH), "site_unknown"),
        ("blocks.0.ln_1", np.ones(WIDTH - 1), "factors_unusable"),
        ("blocks.0.ln_1", np.zeros(WIDTH), "factors_unusable"),
        ("blocks.0.ln_2", np.full(WIDTH, np.nan), "factors_unusable"),
    ],
)
def test_factors_that_do_not_fit_are_refused(tower, site, values, code):
    with refused(code, InputError, site=site):
        smooth(tower, {site: values.astype(np.float32)})
