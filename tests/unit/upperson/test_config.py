"""Recipes, the schedule and the optimiser."""

import pytest
import torch

from tests.helpers.refused import refused
from tests.helpers.toy_clip import toy_model
from upperson.config import TrainConfig, read_config, read_recipe, recipe_names
from upperson.model.base import build_clip
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson.step import build_optimizer, schedule, set_learning_rate
from upperson_rt.errors import InputError, UsageError


def test_a_config_survives_its_file(tmp_path):
    config = read_recipe("synthetic", {"root": "people", "epochs": 7, "lr": None})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), "utf-8")
    assert config.epochs == 7
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("root: p\nlearning_rat: 1.0", "unknown key 'learning_rat'"),
        ("root: p\nepoch: 3", "did you mean 'epochs'"),
        ("root: p\nmodel: {prefix_len: 3}", "did you mean 'prefix_length'"),
        ("root: p\nepochs: many", "epochs: expected an integer"),
        ("root: p\nprecision: fp8", "expected one of fp32, bf16, fp16"),
        ("root: p\nepochs: 0", "epochs must be at least 1"),
        ("root: p\nmodel: {lora_rank: -1}", "lora_rank must be 0"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, text, fact):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match=f"recipe.yaml: .*{fact}"):
        read_config(path)
    for text, code in (
        ("epochs: 3", "root_missing"),
        ("- a list", "not_yaml"),
        ("root: [", "not_yaml"),
        ("root: a\nroot: b", "not_yaml"),
        ("root: a\n1: b", "not_yaml"),
    ):
        path.write_text(text, "utf-8")
        with refused(code, InputError):
            read_config(path)
    with refused("recipe_unknown", UsageError, recipe="sinthetic") as found:
        read_recipe("sinthetic", {"root": "p"})
    assert "synthetic" in found.value.fields["suggestion"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, 0) for name in ("height_px", "epochs", "accumulate", "checkpoint_every", "lr")),
        *((name, -1) for name in ("warmup_epochs", "workers", "seed", "weight_decay")),
        ("batch_size", 1), ("width_px", 4097), ("seed", 2**63), ("adam_eps", 1e30),
        ("prefix_lr", float("nan")), ("temperature", 0.0009), ("temperature", 1.1),
        ("shorten_captions", 1.1), ("kept_share", 0.0), ("kept_share", 1.1),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(setting, value):
    with refused("setting_out_of_range", UsageError, setting=setting) as found:
        TrainConfig(root="p", **{setting: value})
    assert ("upperson export --base" in str(found.value)) == (setting in ("epochs", "lr"))


def test_contradictions_are_refused():
    with refused("warmup_too_long", UsageError, epochs=5, warmup_epochs=6):
        TrainConfig(root="p", epochs=5, warmup_epochs=6)
    with pytest.raises(UsageError, match="kept_share"):
        TrainConfig(root="p", kept_share=0.5, model=PLAIN_CLIP)


def test_the_schedule_has_the_papers_values_prefixes_may_have_their_own_and_biases_no_decay():
    model, config = toy_model(), TrainConfig(root="p", prefix_lr=5e-5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(model.named_parameters(), config)
    for epoch, rate in (
        (0, 1.0e-4), (1, 2.8e-4), (4, 8.2e-4), (20, 8.27e-4), (59, 8.15e-7), (5, 1.0e-3),
    ):  # fmt: skip
        assert config.lr * schedule(epoch, config) == pytest.approx(rate, rel=2e-3)
        assert set_learning_rate(optimizer, epoch, config) == pytest.approx(rate, rel=2e-3)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(trained)
    for name, parameter in trained.items():
        group = groups[id(parameter)]
        assert group["lr"] == (5e-5 if ".prefix." in name else 1e-3), name
        assert group["weight_decay"] == (0 if name.endswith("bias") else 4e-5), name
        assert group["eps"] == 1e-3


@pytest.mark.parametrize(
    ("name", "prefix_length", "rank", "lr", "trained"),
    [
        ("cuhk-pedes", 10, 32, 1e-3, 7_419_816),
        ("icfg-pedes", 14, 32, 1e-3, 7_542_696),
        ("rstpreid", 2, 16, 1e-4, 6_191_016),
    ],
)
def test_named_recipes_have_the_papers_values(name, prefix_length, rank, lr, trained):
    assert read_recipe(f"{name}-vit-l-14", {"root": "p"}).base.startswith("ViT-L-14")
    config = read_recipe(name, {"root": "p"})
    model = config.model
    sizes = (model.prefix_length, model.lora_rank, model.adapter_reduction)
    assert sizes == (prefix_length, rank, 8)
    assert (model.prefix_scale, config.lr, config.adam_eps) == (10.0, lr, 1e-3)
    assert (config.epochs, config.batch_size, config.warmup_epochs) == (60, 128, 5)
    assert (config.loss, config.augment, config.mask_captions) == ("sdm", True, True)
    assert (config.weight_decay, config.prefix_lr) == (4e-5, None)
    with torch.device("meta"):
        clip = build_clip(config.base)
        built = UPPerson(clip, model, (config.height_px, config.width_px))
    assert sum(p.numel() for p in built.parameters() if p.requires_grad) == trained
    frozen = sum(p.numel() for p in built.parameters() if not p.requires_grad)
    assert frozen == 157_037_480 - 7_419_816
    assert (config.height_px, config.width_px) == (384, 128)


def test_settings_replace_any_key():
    assert len(recipe_names()) == 10
    config = read_recipe(
        "rstpreid",
        {"root": "p", "epochs": 9},
        ["model.lora_rank=4", "model.lora_blocks=2", "epochs=8", "prefix_lr=5e-5", "augment=false"],
    )
    assert (config.model.lora_rank, config.model.lora_blocks) == (4, "2")
    assert (config.epochs, config.prefix_lr, config.augment) == (8, 5e-5, False)
    assert config.model.prefix_length == 2
    for setting in ("epochs", "=3", "epochs=[", "epochs.x=3"):
        with refused("setting_malformed", UsageError, setting=setting):
            read_recipe("synthetic", {"root": "p"}, [setting])
    for setting, key in (("model.rank=3", "rank"), ("epochs=three", "epochs")):
        with pytest.raises(UsageError, match=key):
            read_recipe("synthetic", {"root": "p"}, [setting])


def test_a_fault_of_a_recipe_is_its_files_whatever_the_options(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: many\nprecision: fp8")
    for overrides, settings, error, text in (
        ({"lr": float("nan")}, [], UsageError, "options: lr: expected a finite number"),
        ({"lr": 1e-3}, [], InputError, "epochs: expected an integer, found 'many'"),
        ({}, ["epochs=3", "warmup_epochs=1"], InputError, "precision: expected one of"),
    ):
        with pytest.raises(error, match=text):
            read_recipe(str(path), {"root": "p"} | overrides, settings)
