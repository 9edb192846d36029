"""Recipes, the schedule and the optimiser."""

from pathlib import Path

import pytest

from tests.helpers.toy_clip import toy_model
from upperson.config import TrainConfig
from upperson.optim import build_optimizer, learning_rate
from upperson.recipe import read_config, read_recipe
from upperson_rt.errors import InputError, UsageError


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = read_recipe("synthetic", {"root": "people", "epochs": 7, "lr": None})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), "utf-8")
    assert config.epochs == 7
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("root: p\nlearning_rat: 1.0", "unknown key 'learning_rat'"),
        ("root: p\nepoch: 3", "did you mean 'epochs'"),
        ("root: p\nmodel: {prefix_len: 3}", "did you mean 'prefix_length'"),
        ("root: p\nepochs: many", "epochs: expected int, found 'many'"),
        ("root: p\nprecision: fp8", "expected one of fp32, bf16"),
        ("epochs: 3", "'root' is missing"),
        ("- a list", "found list"),
        ("root: [", "cannot be read as YAML"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match=message):
        read_config(path)


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="warmup_epochs"):
        TrainConfig(root="p", epochs=5, warmup_epochs=6)
    with pytest.raises(UsageError, match="contrastive"):
        TrainConfig(root="p", batch_size=1)
    with pytest.raises(UsageError, match=r"unknown: .*synthetic"):
        read_recipe("sinthetic", {"root": "p"})


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 1.0e-4), (1, 2.8e-4), (4, 8.2e-4), (5, 1.0e-3), (20, 8.27e-4), (32, 5.14e-4)],
)
def test_the_schedule_has_the_papers_values(epoch: int, rate: float) -> None:
    assert learning_rate(epoch, TrainConfig(root="p")) == pytest.approx(rate, rel=2e-3)


def test_the_optimiser_holds_the_trained_tensors_and_spares_biases() -> None:
    model = toy_model()
    decayed, exempt = build_optimizer(model, TrainConfig(root="p")).param_groups
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(exempt["params"]) == len(trained)
    assert len(exempt["params"]) == sum(name.endswith("bias") for name in trained) > 0
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (4e-5, 0.0)
    assert decayed["eps"] == 1e-3
