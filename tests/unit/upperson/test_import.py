"""Names, settings and refusals of checkpoints from elsewhere."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

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
from tests.helpers.openai_archive import save_openai_archive
from tests.helpers.refused import refused
from tests.helpers.toy_clip import IMAGE_SIZE
from upperson.config import TrainConfig
from upperson.model.parts import PLAIN_CLIP, UPPersonConfig
from upperson.official.importing import NO_ROOT, import_checkpoint, read_checkpoint
from upperson.official.mapping import map_checkpoint
from upperson.run import load_run
from upperson_rt.errors import InputError, UsageError

LORA = "LORA_learner.lora_image.1.lora_A.0"
TOKENS = "text_prefix_learner.text_prefix.0.key.tokens"
ALIAS = "base_model.transformer.resblocks.0.attn.prefix.key.tokens"
LORA_UP = "LORA_learner.lora_image.1.lora_B.1"
PROMPT = "base_model.visual.prompt"
DEEP = "LORA_learner.lora_text.7.lora_A.0"
NORM = "base_model.visual.transformer.resblocks.1.ln_2.bias"


@pytest.fixture(autouse=True)
def _toy_base(monkeypatch):
    know_toy_base(monkeypatch)


@pytest.fixture
def state():
    return official_state(TOY_OFFICIAL)


@pytest.fixture
def checkpoint(state, tmp_path):
    torch.save(training_checkpoint(with_aliases(state)), tmp_path / "best.pth")
    return tmp_path / "best.pth"


def map_toy(state):
    return map_checkpoint(state, IMAGE_SIZE, "toy")


def import_toy(path, **options):
    return import_checkpoint(
        path, path.with_name("run"), base="toy", image_size=IMAGE_SIZE, **options
    )


# --- names and settings ---


def test_the_readmes_settings_are_recognised_and_every_tensor_accounted_for(state):
    # Real shapes; one number stands for all of a tensor.
    shapes = Official().shapes()
    trained = [
        key
        for key in shapes
        if not key.startswith("base_model.") or "adapter" in key or "scale_" in key
    ]
    assert (len(shapes), len(trained)) == (805, 504)
    real = with_aliases({key: torch.ones(()).expand(shape) for key, shape in shapes.items()})
    model = map_checkpoint(real, (384, 128))
    assert model.base == "ViT-B-16-quickgelu"
    assert (len(model.mapped), len(model.trained), len(model.ignored)) == (805, 504, 120)

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
    model = map_toy(state | {"base_model.logit_scale": torch.tensor(4.0)})
    assert (model.clip["logit_scale"].item(), model.missing) == (4.0, {})


SIZES = {"prefix_length": 3, "lora_rank": 4, "adapter_reduction": 4}


def test_settings_are_read_off_names_and_shapes():
    for changes, expected in (
        ({"depth_prefix": 1}, {"prefix_blocks": "1-1"}),
        ({"depth_lora": 1}, {"lora_blocks": "1-1"}),
        ({"depth_adapter": 1}, {"adapter_blocks": "2-2"}),
        ({"depth_prefix": 0}, {"prefix_length": 0}),
        ({"depth_lora": 0}, {"lora_rank": 0}),
        ({"depth_adapter": 12}, {"adapter_reduction": 0}),
        ({"prefix_length": 1, "rank": 1}, {"prefix_length": 1, "lora_rank": 1}),
        ({"reduction": 16}, {"adapter_reduction": 16}),
    ):
        found = map_toy(official_state(replace(TOY_OFFICIAL, **changes))).config
        assert found == UPPersonConfig(**(SIZES | expected)), changes


def test_a_reduction_must_fit_both_towers():
    """64 // 5 and 48 // 5 are 12 and 9: neither width alone gives the reduction by a division."""
    found = map_toy(official_state(replace(TOY_OFFICIAL, reduction=5))).config
    assert (64 // found.adapter_reduction, 48 // found.adapter_reduction) == (12, 9)
    # 64 // 5 is 48 // 4, too, and still not of one reduction.
    for image, text in ((4, 2), (5, 4)):
        state = official_state(replace(TOY_OFFICIAL, reduction=image))
        other = official_state(replace(TOY_OFFICIAL, reduction=text))
        mixed = state | {key: value for key, value in other.items() if "visual" not in key}
        with refused("sizes_differ", InputError, part="L-Adapters"):
            map_toy(mixed)


def test_parts_that_are_left_out():
    scale = "base_model.transformer.resblocks.0.scale_1"  # Without its adapter.
    state = official_state(replace(TOY_OFFICIAL, depth_adapter=1)) | {scale: torch.tensor(1.0)}
    assert map_toy(state).ignored == {scale: "unused"}
    model = map_toy(official_state(replace(TOY_OFFICIAL, **PLAIN)) | irra_heads())
    assert model.config == replace(PLAIN_CLIP, prefix_scale=model.config.prefix_scale)
    assert model.trained == {}
    assert set(model.ignored.values()) == {"training head"}


# --- refusals ---


def dropped(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def without(part):
    return lambda state: {name: value for name, value in state.items() if part not in name}


def replaced(key, value):
    return lambda state: state | {key: value}


@pytest.mark.parametrize(
    ("change", "code", "fields"),
    [
        (dropped(NORM), "base_does_not_fit", {"base": "toy"}),
        (dropped(LORA), "tensor_missing", {"tensor": LORA}),
        (dropped(LORA_UP), "tensors_missing", {"missing": [LORA_UP], "expected": 84}),
        (replaced(NORM, torch.zeros(5)), "base_does_not_fit", {}),
        (replaced(LORA, torch.zeros(4, 5)), "tensor_shape", {"tensor": LORA, "expected": [4, 64]}),
        (replaced(LORA, torch.zeros(5, 64)), "sizes_differ", {"part": "LoRA"}),
        (replaced(LORA, torch.zeros(())), "tensor_missing", {"tensor": LORA}),
        (replaced(NORM, torch.full((64,), float("nan"))), "tensor_not_finite", {}),
        (replaced(TOKENS, torch.full((3, 48), float("inf"))), "tensor_not_finite", {}),
        (replaced(NORM, torch.zeros(64).to_sparse()), "tensor_not_floats", {}),
        (replaced(ALIAS, torch.zeros(3, 48)), "alias_differs", {"alias": ALIAS, "tensor": TOKENS}),
        (replaced(PROMPT, torch.zeros(3)), "tensor_unknown", {"tensor": PROMPT}),
        (replaced(DEEP, torch.zeros(4, 48)), "tensor_unknown", {"tensor": DEEP}),
        # Without it, a model without prefix would come out.
        (without("prefix_learner"), "alias_differs", {}),
        (without("lora_text"), "blocks_differ", {"places": "image 1-2, text none"}),
        (without("vit_prefix.1."), "blocks_differ", {"places": "image 1-1, text 1-2"}),
        (lambda state: {"fc.weight": torch.zeros(2)}, "not_official", {"found": "fc.weight"}),
        (lambda state: {}, "not_official", {"found": "no tensors"}),
    ],
)
def test_a_checkpoint_that_is_not_right_is_refused(state, change, code, fields):
    with refused(code, InputError, **fields):
        map_toy(change(with_aliases(state) if code == "alias_differs" else state))


def test_a_base_that_does_not_fit_is_refused(state):
    with refused("base_does_not_fit", InputError) as found:
        map_checkpoint(state, IMAGE_SIZE)
    assert found.value.fields["base"].startswith("ViT-")
    # The tensors of a base with another activation fit: the features would be quietly wrong.
    shapes = {key: torch.empty(shape) for key, shape in Official().shapes().items()}
    with refused("activation_contradicts", UsageError, base="ViT-B-16", found="GELU"):
        map_checkpoint(shapes, (384, 128), "ViT-B-16")
    with refused("image_size_wrong", InputError) as found:
        map_checkpoint(state, (384, 128), "toy")
    assert "48x32" in found.value.fields["likely"]
    with refused("image_size_indivisible", UsageError):
        map_checkpoint(state, (50, 32), "toy")


def test_a_size_with_as_many_patches_as_the_base_itself_is_refused(checkpoint):
    """The file does not distinguish 2x3 from 3x2 patches, and loading would interpolate."""
    run = checkpoint.with_name("run")
    with refused("image_size_ambiguous", InputError, image_size=(32, 48)):
        import_checkpoint(checkpoint, run, base="toy", image_size=(32, 48))
    assert not run.exists()


# --- files ---


@pytest.mark.parametrize("zipped", [True, False])
def test_every_form_of_file_gives_the_same_tensors(state, zipped, tmp_path):
    path = tmp_path / "best.pth"
    for content in (
        state,
        {"state_dict": state, "epoch": 3},
        training_checkpoint(state),
        {"model": {f"module.{key}": value for key, value in state.items()}},
    ):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        found, others = read_checkpoint(path)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) for key, value in state.items())
        assert "model" not in others
        assert ("optimizer" in others) == ("optimizer" in content)
    save_file(state, tmp_path / "best.safetensors")
    found, others = read_checkpoint(tmp_path / "best.safetensors")
    assert (found.keys(), others) == (state.keys(), [])


def test_another_content_is_refused(tmp_path):
    path = tmp_path / "best.pth"
    for content, code in (
        ([torch.zeros(2)], "not_a_checkpoint"),
        ({"model": {"a": torch.zeros(1), "module.a": torch.zeros(1)}}, "tensor_twice"),
        ({"epoch": 3}, "not_official"),
    ):
        torch.save(content, path)
        with refused(code, InputError):
            import_toy(path)
    save_openai_archive({"a": torch.zeros(2)}, path)
    with refused("checkpoint_unreadable", InputError):
        import_toy(path)
    with refused("checkpoint_not_found", InputError, path=tmp_path / "gone.pth"):
        import_toy(tmp_path / "gone.pth")


# --- the run ---


def test_the_run_folder_is_complete_and_loads_anywhere(checkpoint, tmp_path):
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


def test_stored_values_and_precisions_are_kept(checkpoint, state):
    mapped = map_toy(state).mapped
    flat = torch.cat([value.double().flatten() for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    views = {key: part.view(state[key].shape) for key, part in zip(state, parts, strict=True)}
    torch.save(views, checkpoint.with_name("views.pth"))
    for path, dtype in ((checkpoint, torch.float16), (checkpoint.with_name("views.pth"), None)):
        run = path.with_name(f"run of {path.stem}")
        import_checkpoint(path, run, base="toy", image_size=IMAGE_SIZE)
        base = load_file(run / "base.safetensors")
        adapter = load_file(run / "adapter.safetensors")
        assert base["visual.proj"].dtype == (dtype or torch.float32)
        for key, value in state.items():
            found = (base | adapter)[mapped[key]]
            assert torch.equal(found.float(), value.float()), key
        assert {value.dtype for value in adapter.values()} == {torch.float32}


def test_a_run_without_a_data_set_asks_for_one_and_is_not_written_over(checkpoint):
    import_toy(checkpoint)
    run = checkpoint.with_name("run")
    assert load_run(run).config.root == NO_ROOT
    assert "--root" in NO_ROOT
    before = (run / "import.json").stat().st_mtime_ns
    with pytest.raises(InputError):
        import_toy(checkpoint)
    assert (run / "import.json").stat().st_mtime_ns == before
