"""What folding and smoothing refuse, and where smoothing factors go in a folded tower."""

import numpy as np
import pytest
import torch

from tests.helpers.refused import refused
from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_graphs import graph_of
from upperson_export.blocks import Linear, Site
from upperson_export.fold import fold_image_tower, fold_text_tower, smooth
from upperson_export.parity import require_parity
from upperson_export.plain import PlainTower
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


def factors(channel, value):
    s_D = np.ones(WIDTH, np.float32)
    s_D[channel] = value
    return s_D


def changed(before, after):
    """Return after / before for each tensor that differs."""
    old = before.state_dict()
    return {
        name: value / old[name]
        for name, value in after.state_dict().items()
        if not torch.equal(value, old[name])
    }


def test_a_norms_factor_divides_norm_and_adapter_and_multiplies_the_next_rows(tower):
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    ratios = changed(tower, smooth(tower, {"blocks.0.ln_1": factors(5, 4.0)}))
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    divided = ("ln_1.weight", "ln_1.bias", "adapter_attn.up.weight", "adapter_attn.up.bias")
    assert set(ratios) == {f"blocks.0.{name}" for name in (*divided, "attention.qkv.weight")}
    for name, ratio in ratios.items():
        expected = torch.ones_like(ratio)
        if name.endswith("qkv.weight"):
            expected[5] = 4
        else:
            expected[..., 5] = 0.25
        torch.testing.assert_close(ratio, expected)


@pytest.mark.parametrize(
    ("site", "readers", "adapter"),
    [
        ("ln_1", ["attention.q.weight", "attention.kv.weight"], "adapter_attn"),
        ("ln_2", ["mlp.fc1.weight"], "adapter_mlp"),
    ],
)
def test_all_readers_of_a_site_are_multiplied(tower, site, readers, adapter):
    ratios = changed(tower, smooth(tower, {f"blocks.1.{site}": factors(3, 2.0)}))
    assert {name for name, ratio in ratios.items() if (ratio == 2).any()} == {
        f"blocks.1.{reader}" for reader in readers
    }
    assert f"blocks.1.{adapter}.up.bias" in ratios


@pytest.mark.parametrize(("block", "projection"), [(0, "qkv"), (1, "kv")])
def test_attended_rows_are_divided_through_values_and_prefix_values(tower, block, projection):
    channel = 37  # Second head of 32, its channel 5.
    place = f"blocks.{block}.attention."
    found = changed(tower, smooth(tower, {f"{place}out": factors(channel, 8.0)}))
    ratios = {name.removeprefix(place): ratio for name, ratio in found.items()}
    values = ratios[f"{projection}.weight"]
    assert (values[:, :-WIDTH] == 1).all()
    assert (values[:, -WIDTH + channel] == 0.125).all()
    assert (ratios["prefix_v"][0, 1, :, 5] == 0.125).all()
    assert (ratios["out.weight"][channel] == 8).all()
    assert {name: int((ratio != 1).sum()) for name, ratio in ratios.items()} == {
        f"{projection}.weight": WIDTH, f"{projection}.bias": 1, "prefix_v": 3, "out.weight": WIDTH,
    }  # fmt: skip


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


class GatedBlock(torch.nn.Module):
    """A block of another base: two projections read a norm."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        torch.nn.init.normal_(self.norm.bias)
        self.gate, self.up = (
            Linear(torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)) for _ in range(2)
        )

    def linears(self):
        return (self.gate, self.up)

    def sites(self):
        def divide(s_D):
            self.norm.weight.div_(s_D)
            self.norm.bias.div_(s_D)

        return {"norm": Site(divide, (self.gate, self.up))}

    def forward(self, x):
        u = self.norm(x)
        return x + torch.sigmoid(self.gate(u)) * self.up(u)


class GatedTower(PlainTower):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([GatedBlock(), GatedBlock()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_block_of_another_kind_needs_its_description_alone():
    torch.manual_seed(0)
    tower = GatedTower().eval()
    assert tower.block_linears() == {
        f"blocks.{block}.{name}": f"blocks.{block}.norm"
        for block in (0, 1)
        for name in ("gate", "up")
    }
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        smoothed = smooth(tower, {"blocks.1.norm": factors(7, 16.0)})
        torch.testing.assert_close(smoothed(x), tower(x), atol=1e-4, rtol=1e-5)
    assert set(changed(tower, smoothed)) == {
        f"blocks.1.{name}" for name in ("norm.weight", "norm.bias", "gate.weight", "up.weight")
    }
