"""Where smoothing factors go in a folded tower, and what is refused."""

import numpy as np
import pytest
import torch

from tests.helpers.toy_clip import toy_model
from upperson_export.blocks import Linear, Site
from upperson_export.fold import fold_image_tower, smooth
from upperson_export.plain import PlainImageTower, PlainTower
from upperson_rt.errors import InputError

WIDTH = 64


@pytest.fixture
def tower() -> PlainImageTower:
    return fold_image_tower(toy_model())


def factors(channel: int, value: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    s_D = np.ones(WIDTH, np.float32)
    s_D[channel] = value
    return s_D


def changed(before: torch.nn.Module, after: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return after / before for each tensor that differs."""
    old = before.state_dict()
    return {
        name: value / old[name]
        for name, value in after.state_dict().items()
        if not torch.equal(value, old[name])
    }


def test_a_norms_factor_divides_norm_and_adapter_and_multiplies_the_next_rows(
    tower: PlainImageTower,
) -> None:
    ratios = changed(tower, smooth(tower, {"blocks.0.ln_1": factors(5, 4.0)}))
    place = "blocks.0."
    assert set(ratios) == {
        place + name
        for name in (
            "ln_1.weight",
            "ln_1.bias",
            "adapter_attn.up.weight",
            "adapter_attn.up.bias",
            "attention.qkv.weight",
        )
    }
    for name, ratio in ratios.items():
        expected = torch.ones_like(ratio)
        if name.endswith("qkv.weight"):
            expected[5] = 4
        else:
            expected[..., 5] = 0.25
        torch.testing.assert_close(ratio, expected)


def test_the_last_blocks_query_and_key_value_are_both_multiplied(tower: PlainImageTower) -> None:
    ratios = changed(tower, smooth(tower, {"blocks.1.ln_1": factors(3, 2.0)}))
    assert {name for name, ratio in ratios.items() if (ratio == 2).any()} == {
        "blocks.1.attention.q.weight",
        "blocks.1.attention.kv.weight",
    }


def test_the_second_norm_goes_into_fc1(tower: PlainImageTower) -> None:
    ratios = changed(tower, smooth(tower, {"blocks.1.ln_2": factors(3, 2.0)}))
    assert {name for name, ratio in ratios.items() if (ratio == 2).any()} == {
        "blocks.1.mlp.fc1.weight"
    }
    assert "blocks.1.adapter_mlp.up.bias" in ratios


@pytest.mark.parametrize(("block", "projection"), [(0, "qkv"), (1, "kv")])
def test_attended_rows_are_divided_through_values_and_prefix_values(
    tower: PlainImageTower, block: int, projection: str
) -> None:
    channel = 37  # Second head of 32, its channel 5.
    place = f"blocks.{block}.attention."
    ratios = changed(tower, smooth(tower, {f"{place}out": factors(channel, 8.0)}))
    assert set(ratios) == {
        f"{place}{projection}.weight",
        f"{place}{projection}.bias",
        f"{place}prefix_v",
        f"{place}out.weight",
    }
    values = ratios[f"{place}{projection}.weight"]
    assert (values[:, :-WIDTH] == 1).all()
    assert (values[:, -WIDTH + channel] == 0.125).all()
    assert (ratios[f"{place}prefix_v"][0, 1, :, 5] == 0.125).all()
    assert (ratios[f"{place}out.weight"][channel] == 8).all()
    touched = {name.removeprefix(place): int((ratio != 1).sum()) for name, ratio in ratios.items()}
    assert touched == {
        f"{projection}.weight": WIDTH,
        f"{projection}.bias": 1,
        "prefix_v": 3,
        "out.weight": WIDTH,
    }


def test_the_tower_and_the_model_behind_it_stay(tower: PlainImageTower) -> None:
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    smooth(tower, {"blocks.0.ln_1": factors(5, 4.0), "blocks.1.attention.out": factors(0, 2.0)})
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())


@pytest.mark.parametrize(
    ("site", "values", "message"),
    [
        ("blocks.2.ln_1", np.ones(WIDTH, np.float32), "no such site"),
        ("blocks.0.mlp.fc2", np.ones(WIDTH, np.float32), "no such site"),
        ("blocks.0.ln_1", np.ones(WIDTH - 1, np.float32), "64 positive numbers, found shape"),
        ("blocks.0.ln_1", np.zeros(WIDTH, np.float32), "64 positive numbers"),
        ("blocks.0.ln_2", np.full(WIDTH, np.nan, np.float32), "64 positive numbers"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    tower: PlainImageTower,
    site: str,
    values: np.ndarray[tuple[int], np.dtype[np.float32]],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        smooth(tower, {site: values})


class GatedBlock(torch.nn.Module):
    """A block of another base: what a norm gives is read by two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        torch.nn.init.normal_(self.norm.bias)
        self.gate, self.up = (
            Linear(torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)) for _ in range(2)
        )

    def linears(self) -> tuple[Linear, ...]:
        return (self.gate, self.up)

    def sites(self) -> dict[str, Site]:
        def divide(s_D: torch.Tensor) -> None:
            self.norm.weight.div_(s_D)
            self.norm.bias.div_(s_D)

        return {"norm": Site(divide, (self.gate, self.up))}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.norm(x)
        return x + torch.sigmoid(self.gate(u)) * self.up(u)


class GatedTower(PlainTower):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([GatedBlock(), GatedBlock()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_block_of_another_shape_says_itself_where_factors_go() -> None:
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
