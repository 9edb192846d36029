"""Names, settings and refusals of checkpoints from elsewhere."""

import json
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.official_checkpoint import (
    PLAIN,
    TOY_OFFICIAL,
    Official,
    irra_heads,
    know_toy_base,
    official_state,
    training_checkpoint,
    with_aliases,
)
from tests.helpers.toy_clip import IMAGE_SIZE
from upperson.config import TrainConfig
from upperson.model.parts import PLAIN_CLIP, UPPersonConfig
from upperson.official.importing import NO_ROOT, import_checkpoint, read_checkpoint
from upperson.official.mapping import OfficialModel, map_checkpoint
from upperson.run import load_run
from upperson_rt.errors import InputError, UppersonError, UsageError

LORA = "LORA_learner.lora_image.1.lora_A.0"
TOKENS = "text_prefix_learner.text_prefix.0.key.tokens"
ALIAS = "base_model.transformer.resblocks.0.attn.prefix.key.tokens"
NORM = "base_model.visual.transformer.resblocks.1.ln_2.bias"


@pytest.fixture(autouse=True)
def _toy_base(monkeypatch: pytest.MonkeyPatch) -> None:
    know_toy_base(monkeypatch)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return official_state(TOY_OFFICIAL)


def map_toy(state: dict[str, Tensor]) -> OfficialModel:
    return map_checkpoint(state, IMAGE_SIZE, "toy")


def import_toy(path: Path, **options: Any) -> dict[str, Any]:
    return import_checkpoint(
        path, path.with_name("run"), base="toy", image_size=IMAGE_SIZE, **options
    )


# --- names and settings ---


def test_the_readmes_settings_give_the_official_key_counts() -> None:
    shapes = Official().shapes()
    assert len(shapes) == 805
    trained = [
        key
        for key in shapes
        if not key.startswith("base_model.") or "adapter" in key or "scale_" in key
    ]
    assert len(trained) == 504
    assert len(with_aliases({key: torch.empty(0) for key in shapes})) == 805 + 120


def test_every_tensor_is_accounted_for(state: dict[str, Tensor]) -> None:
    extra = irra_heads() | {"logger.step": torch.zeros(())}
    model = map_toy(with_aliases(state) | extra)
    assert model.mapped.keys() == state.keys()
    assert len(set(model.mapped.values())) == len(state)
    assert {*model.clip, *model.trained} == {*model.mapped.values(), "logit_scale"}
    assert model.clip["logit_scale"].exp().item() == pytest.approx(50)
    assert list(model.missing) == ["base_model.logit_scale"]
    reasons = list(model.ignored.values())
    assert reasons.count("alias") == 2 * 2 * 5
    assert reasons.count("training head") == len(irra_heads())
    assert reasons.count("unknown") == 1


def test_lora_0_is_the_key_and_1_the_value(state: dict[str, Tensor]) -> None:
    trained = map_toy(state).trained
    for index, ours in enumerate(("key", "value")):
        place = f"image.blocks.1.lora.{ours}"
        assert trained[f"{place}.down"] is state[f"LORA_learner.lora_image.1.lora_A.{index}"]
        assert trained[f"{place}.up"] is state[f"LORA_learner.lora_image.1.lora_B.{index}"]
        assert trained[f"{place}.scale"] is state[f"LORA_learner.lora_image.1.scale.{index}.scale"]


SIZES = {"prefix_length": 3, "lora_rank": 4, "adapter_reduction": 4}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"depth_prefix": 1}, {"prefix_blocks": "1-1"}),
        ({"depth_lora": 1}, {"lora_blocks": "1-1"}),
        ({"depth_adapter": 1}, {"adapter_blocks": "2-2"}),
        ({"depth_prefix": 0}, {"prefix_length": 0}),
        ({"depth_lora": 0}, {"lora_rank": 0}),
        ({"depth_adapter": 12}, {"adapter_reduction": 0}),
        ({"prefix_length": 1, "rank": 1}, {"prefix_length": 1, "lora_rank": 1}),
        ({"reduction": 16}, {"adapter_reduction": 16}),
    ],
)
def test_settings_are_read_off_names_and_shapes(
    changes: dict[str, int], expected: dict[str, Any]
) -> None:
    found = map_toy(official_state(replace(TOY_OFFICIAL, **changes))).config
    assert found == UPPersonConfig(**(SIZES | expected))


def test_a_reduction_must_fit_both_towers(state: dict[str, Tensor]) -> None:
    """64 // 5 and 48 // 5 are 12 and 9: neither width alone tells the reduction by a division."""
    found = map_toy(official_state(replace(TOY_OFFICIAL, reduction=5))).config
    assert (64 // found.adapter_reduction, 48 // found.adapter_reduction) == (12, 9)
    other = official_state(replace(TOY_OFFICIAL, reduction=2))
    mixed = state | {key: value for key, value in other.items() if "visual" not in key}
    with pytest.raises(InputError, match="L-Adapters must have one size in all blocks of both"):
        map_toy(mixed)


def test_all_blocks_of_a_shallow_tower_may_be_the_first_of_a_deep_one() -> None:
    from upperson.official.names import read_settings

    deep = replace(TOY_OFFICIAL, image_layers=4, depth_lora=4, depth_prefix=2)
    state = official_state(deep)
    state = {key: value for key, value in state.items() if "lora_text.2" not in key}
    state = {key: value for key, value in state.items() if "lora_text.3" not in key}
    config = read_settings(state)
    assert (config.lora_blocks, config.prefix_blocks) == ("all", "1-2")


def test_a_scale_without_its_adapter_is_unused() -> None:
    state = official_state(replace(TOY_OFFICIAL, depth_adapter=1))
    scale = "base_model.transformer.resblocks.0.scale_1"
    model = map_toy(state | {scale: torch.tensor(1.0)})
    assert model.ignored == {scale: "unused"}


def test_a_fully_tuned_clip_has_no_trained_parts() -> None:
    state = official_state(replace(TOY_OFFICIAL, **PLAIN)) | irra_heads()
    model = map_toy(state)
    assert model.config == replace(PLAIN_CLIP, prefix_scale=model.config.prefix_scale)
    assert model.trained == {}
    assert set(model.ignored.values()) == {"training head"}


def test_a_stored_logit_scale_is_kept(state: dict[str, Tensor]) -> None:
    model = map_toy(state | {"base_model.logit_scale": torch.tensor(4.0)})
    assert model.clip["logit_scale"].item() == 4.0
    assert model.missing == {}


# --- refusals ---


def dropped(key: str) -> Any:
    return lambda state: {name: value for name, value in state.items() if name != key}


def replaced(key: str, value: Tensor) -> Any:
    return lambda state: state | {key: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dropped(NORM), f"lacks 1 of 61 tensors, first {NORM}: .* than 'toy'"),
        (dropped(LORA), f"expected a tensor '{LORA}' .* found none"),
        (dropped(LORA.replace("A.0", "B.1")), r"lacks 1 of 84 tensors, first LORA_learner.*lora_B"),
        (replaced(NORM, torch.zeros(5)), rf"'{NORM}' must be \[64\], found \[5\]"),
        (replaced(LORA, torch.zeros(4, 5)), rf"'{LORA}' must be \[4, 64\], found \[4, 5\]"),
        (replaced(LORA, torch.zeros(5, 64)), "LoRA must have one size in all blocks of both"),
        (replaced(LORA, torch.zeros(())), rf"'{LORA}' \[rows, width\], found \[\]"),
        (replaced(NORM, torch.full((64,), float("nan"))), f"'{NORM}' has NaN or infinite values"),
        (replaced(TOKENS, torch.full((3, 48), float("inf"))), f"'{TOKENS}' has NaN or inf"),
        (replaced(NORM, torch.zeros(64, dtype=torch.int8)), "of 16 to 64 bits, found .*int8"),
        (replaced(NORM, torch.zeros(64).to_sparse()), "floats .*, found .*float32 in layout"),
        (replaced(NORM, torch.zeros(64, device="meta")), r"floats .*float32 without values"),
        (replaced(NORM, torch.zeros(64).to(torch.float8_e5m2)), "floats of 16 to 64 bits, found"),
        (replaced(NORM, torch.full((64,), 1e300, dtype=torch.float64)), "NaN or infinite values"),
        (replaced(ALIAS, torch.zeros(3, 48)), f"'{ALIAS}' must equal '{TOKENS}'"),
        (replaced("base_model.visual.prompt", torch.zeros(3)), "'base_model.visual.prompt' is unk"),
        (
            replaced("LORA_learner.lora_text.7.lora_A.0", torch.zeros(4, 48)),
            "'LORA_learner.lora_text.7.lora_A.0' is unknown",
        ),
        (
            lambda state: {k: v for k, v in state.items() if "lora_text" not in k},
            "LoRA must be in the same blocks of both towers, found image 1-2, text none",
        ),
        (
            lambda state: {k: v for k, v in state.items() if "vit_prefix.1." not in k},
            "S-Prefix must be in the same blocks of both towers, found image 1-1, text 1-2",
        ),
        (lambda state: {"fc.weight": torch.zeros(2)}, "found fc.weight: this is no checkpoint"),
        (lambda state: {}, "found no tensors"),
    ],
)
def test_a_checkpoint_that_is_not_right_is_refused(
    state: dict[str, Tensor], change: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        map_toy(change(with_aliases(state) if ALIAS in str(message) else state))


def test_an_alias_without_its_original_is_refused(state: dict[str, Tensor]) -> None:
    """With every prefix gone but its second names, a model without prefix must not come out."""
    state = {
        key: value for key, value in with_aliases(state).items() if "prefix_learner" not in key
    }
    with pytest.raises(InputError, match="of which it is another name"):
        map_toy(state)


def test_an_unrecognised_base_names_the_nearest(state: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=r"than 'ViT-\S+'; it is the nearest base, --base takes"):
        map_checkpoint(state, IMAGE_SIZE)


def test_a_base_with_another_activation_is_refused() -> None:
    """Its tensors fit: the features would be quietly wrong."""
    with pytest.raises(UsageError, match=r"'ViT-B-16' has GELU, .* such as ViT-B-16-quickgelu"):
        map_checkpoint(
            {key: torch.empty(shape) for key, shape in Official().shapes().items()},
            (384, 128),
            "ViT-B-16",
        )


def test_another_image_size_is_refused_with_those_that_fit(state: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=r"6 patches of 16x16 pixels, 384x128 .* such as 48x32"):
        map_checkpoint(state, (384, 128), "toy")
    with pytest.raises(UsageError, match="does not divide into patches"):
        map_checkpoint(state, (50, 32), "toy")


def test_a_size_with_as_many_patches_as_the_base_itself_is_refused(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    """The file cannot tell 2x3 from 3x2 patches, and loading would interpolate."""
    torch.save(state, tmp_path / "best.pth")
    with pytest.raises(InputError, match="32x48 has 2x3 patches, as many as the 3x2 of 'toy'"):
        import_checkpoint(tmp_path / "best.pth", tmp_path / "run", base="toy", image_size=(32, 48))
    assert list(tmp_path.iterdir()) == [tmp_path / "best.pth"]


# --- files ---


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        training_checkpoint,
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["bare", "state_dict", "training", "parallel"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_form_of_file_gives_the_same_tensors(
    state: dict[str, Tensor], wrap: Any, zipped: bool, tmp_path: Path
) -> None:
    path = tmp_path / "best.pth"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    found, others = read_checkpoint(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert "model" not in others
    assert ("optimizer" in others) == ("optimizer" in wrap(state))


def test_safetensors_are_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "best.safetensors")
    found, others = read_checkpoint(tmp_path / "best.safetensors")
    assert found.keys() == state.keys()
    assert others == []


class Malicious:
    """Pickles as a call of os.system."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "optimizer"])
def test_code_in_a_checkpoint_never_runs(
    state: dict[str, Tensor], form: str, tmp_path: Path
) -> None:
    path, victim = tmp_path / "best.pth", tmp_path / "victim"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"model": Malicious(victim)}))
    elif form == "optimizer":
        torch.save({"model": state, "optimizer": Malicious(victim)}, path)
    else:
        torch.save({"model": Malicious(victim)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError) as caught:
        import_toy(path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert {item.name for item in tmp_path.iterdir()} == {"best.pth"}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    state: dict[str, Tensor], suffix: str, keep: float, tmp_path: Path
) -> None:
    path = tmp_path / f"best.{suffix}"
    if suffix == "pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(InputError, match=r"cannot be read as"):
        import_toy(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "found list"),
        ({"model": {"a": torch.zeros(1), "module.a": torch.zeros(1)}}, "holds 'a' twice"),
        ({"epoch": 3}, "found no tensors"),
    ],
)
def test_another_content_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "best.pth")
    with pytest.raises(InputError, match=message):
        import_toy(tmp_path / "best.pth")


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; such files are around.
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "best.pth"))
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        import_toy(tmp_path / "best.pth")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a checkpoint file at"):
        import_toy(tmp_path / "best.pth")


# --- the run ---


@pytest.fixture
def checkpoint(state: dict[str, Tensor], tmp_path: Path) -> Path:
    torch.save(training_checkpoint(with_aliases(state)), tmp_path / "best.pth")
    return tmp_path / "best.pth"


def test_the_run_folder_is_complete_and_loads_anywhere(checkpoint: Path, tmp_path: Path) -> None:
    report = import_toy(checkpoint, dataset="cuhk-pedes", root=tmp_path / "data")
    run = checkpoint.with_name("run")
    names = {"config.yaml", "adapter.safetensors", "base.safetensors", "import.json"}
    assert {path.name for path in run.iterdir()} == names
    assert len({path.stat().st_mode for path in run.iterdir()}) == 1
    assert json.loads((run / "import.json").read_text("utf-8")) == report
    assert report["kind"] == "UP-Person"
    assert report["other_entries"] == [
        "optimizer", "scheduler", "num_epoch", "iteration", "epoch"
    ]  # fmt: skip
    moved = run.rename(tmp_path / "elsewhere")
    config, base, _ = load_run(moved)
    assert isinstance(config, TrainConfig)
    assert (config.dataset, config.root) == ("cuhk-pedes", str(tmp_path / "data"))
    assert base.name == "toy"


def test_stored_values_and_precisions_are_kept(checkpoint: Path, state: dict[str, Tensor]) -> None:
    import_toy(checkpoint)
    base = load_file(checkpoint.with_name("run") / "base.safetensors")
    adapter = load_file(checkpoint.with_name("run") / "adapter.safetensors")
    assert base["visual.proj"].dtype == torch.float16
    mapped = map_toy(state).mapped
    for key, value in state.items():
        ours = mapped[key]
        found = base[ours] if ours in base else adapter[ours]
        assert torch.equal(found.float(), value.float()), key
    assert {value.dtype for value in adapter.values()} == {torch.float32}


def test_double_precision_and_views_are_stored(state: dict[str, Tensor], tmp_path: Path) -> None:
    flat = torch.cat([value.double().flatten() for value in state.values()])
    views, start = {}, 0
    for key, value in state.items():
        views[key] = flat[start : start + value.numel()].reshape(value.shape)
        start += value.numel()
    torch.save(views, tmp_path / "best.pth")
    import_toy(tmp_path / "best.pth")
    base = load_file(tmp_path / "run" / "base.safetensors")
    assert {value.dtype for value in base.values()} == {torch.float32}


def test_without_a_data_set_the_commands_ask_for_one(checkpoint: Path) -> None:
    import_toy(checkpoint)
    config, _, _ = load_run(checkpoint.with_name("run"))
    assert config.root == NO_ROOT
    assert "--root" in NO_ROOT


def test_a_folder_with_something_in_it_is_refused(checkpoint: Path) -> None:
    import_toy(checkpoint)
    before = (checkpoint.with_name("run") / "import.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="choose another output"):
        import_toy(checkpoint)
    assert (checkpoint.with_name("run") / "import.json").stat().st_mtime_ns == before


def test_an_import_that_fails_late_leaves_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upperson.official import importing

    def fail(*arguments: Any) -> Any:
        raise InputError("no space")

    monkeypatch.setattr(importing, "load_base", fail)
    with pytest.raises(UppersonError, match="no space"):
        import_toy(checkpoint)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
