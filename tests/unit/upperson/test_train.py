"""Training a toy, its run folder, and reading it back."""

import csv
import json
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.toy_clip import toy_clip
from tests.helpers.toy_run import Recorder, toy_config
from upperson import components
from upperson.components import build_components, start_accelerator
from upperson.data.records import read_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.evaluate import evaluate
from upperson.model.base import SMALL, build_clip, load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import UPPersonConfig
from upperson.observer import Step
from upperson.run import load_run
from upperson.run_writer import draw_curves
from upperson.train import train
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.machine import Processor

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = toy_config(tmp_path, monkeypatch)
    train(config, tmp_path / "run", Recorder())
    return tmp_path / "run"


def test_a_run_folder_holds_what_it_should(run: Path) -> None:
    names = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    assert names == {
        "config.yaml", "adapter.safetensors", "metrics.csv", "results.json", "curves.png", "last",
        "README.md",
    }  # fmt: skip
    assert any(path.name.startswith("events") for path in run.iterdir())
    rows = list(csv.DictReader((run / "metrics.csv").read_text("utf-8").splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    results = json.loads((run / "results.json").read_text("utf-8"))
    assert results["trained_parameters"] < results["parameters"]
    assert set(results["test"]) == {"R@1", "R@5", "R@10", "mAP", "mINP"}
    best = max(rows, key=lambda row: float(row["val R@1"]))
    assert results["val"]["R@1"] == float(best["val R@1"])


@pytest.mark.parametrize("split", ["val", "test", None])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_curves_are_a_picture(split: str | None, epochs: int) -> None:
    recall = {f"{split} R@{k}": 10.0 + k for k in (1, 5, 10)} if split else {}
    rows = [{"epoch": epoch, "loss": 3.0 - epoch} | recall for epoch in range(epochs)]
    with Image.open(BytesIO(draw_curves(rows))) as picture:
        assert (picture.format, picture.size) == ("PNG", (1080, 384))
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 20


def test_a_loaded_run_measures_what_training_reported(run: Path) -> None:
    config, _, model = load_run(run)
    records = read_dataset("jsonl", Path(config.root))["test"]
    found = evaluate(model, clip_tokenizer(), records).as_dict()
    assert found == pytest.approx(json.loads((run / "results.json").read_text())["test"])


def test_a_run_without_val_and_test_loads_its_base_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(toy_config(tmp_path, monkeypatch), epochs=1)
    file = tmp_path / config.root / "annotations.jsonl"
    lines = file.read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if json.loads(line)["split"] == "train"))
    loaded = []

    def load(*arguments: Any, **options: Any) -> Any:
        loaded.append(arguments)
        return load_base(*arguments, **options)

    for place in ("components", "run", "ongoing"):
        monkeypatch.setattr(f"upperson.{place}.load_base", load)
    result = train(config, tmp_path / "run", Recorder())
    assert (result.val, result.test) == (None, None)
    assert len(loaded) == 1
    assert load_run(tmp_path / "run").config.epochs == 1


def test_equal_seeds_give_equal_losses_and_the_loss_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, monkeypatch, epochs=6, lr=3e-3)
    first, second = Recorder(), Recorder()
    train(config, tmp_path / "first", first)
    train(config, tmp_path / "second", second)
    assert first.losses == second.losses
    steps = len(first.losses) // 6
    assert sum(first.losses[-steps:]) < sum(first.losses[:steps])


def test_what_is_kept_is_a_share_and_training_goes_on_with_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, monkeypatch, epochs=1, warmup_epochs=0, lr=3e-3)
    whole, half = Recorder(), Recorder()
    train(config, tmp_path / "whole", whole)
    train(replace(config, kept_share=0.5), tmp_path / "half", half)
    assert whole.losses == half.losses
    kept = load_file(tmp_path / "half/adapter.safetensors")
    for name, tensor in load_file(tmp_path / "whole/adapter.safetensors").items():
        scaled = name.endswith(".scale") and "prefix" not in name
        assert torch.equal(kept[name], tensor / 2 if scaled else tensor)
    _, _, model = load_run(tmp_path / "half")
    records = read_dataset("jsonl", Path(config.root))["test"]
    found = evaluate(model, clip_tokenizer(), records).as_dict()
    results = json.loads((tmp_path / "half/results.json").read_text())
    assert found == pytest.approx(results["test"])
    # The epoch is chosen by what is kept of it: what is saved has the R@1 that it was chosen for.
    (row,) = csv.DictReader((tmp_path / "half/metrics.csv").read_text("utf-8").splitlines())
    for name, value in results["val"].items():
        assert float(row[f"val {name}"]) == pytest.approx(value)
    (other,) = csv.DictReader((tmp_path / "whole/metrics.csv").read_text("utf-8").splitlines())
    assert any(row[f"val {name}"] != other[f"val {name}"] for name in results["val"])


def test_training_changes_no_frozen_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(tmp_path, monkeypatch)
    before = load_base("toy", config.pretrained).sha256
    train(config, tmp_path / "run", Recorder())
    _, base, _ = load_run(tmp_path / "run")
    assert base.sha256 == before
    started = load_file(tmp_path / "run" / "adapter.safetensors")
    assert any(float(tensor.abs().max()) > 0 for name, tensor in started.items() if "up" in name)


def test_captions_that_are_cut_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(tmp_path, monkeypatch, epochs=2)
    annotations = Path(config.root) / "annotations.jsonl"
    lines = annotations.read_text("utf-8").splitlines()
    entry = json.loads(lines[0]) | {"caption": "a man with a very long story " * 20}
    annotations.write_text("\n".join([json.dumps(entry), *lines[1:]]), "utf-8")
    recorder = Recorder()
    train(config, tmp_path / "run", recorder)
    assert recorder.notes == [
        f"1 of {len(lines)} captions are longer than 77 tokens and are cut there"
    ]


def test_captions_that_cannot_be_reworded_are_told_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(
        tmp_path, monkeypatch, epochs=1, warmup_epochs=0, shorten_captions=0.5, wrong_captions=True
    )
    annotations = Path(config.root) / "annotations.jsonl"
    entries = [json.loads(line) for line in annotations.read_text("utf-8").splitlines()]

    def write(*captions: str) -> None:
        lines = [
            json.dumps(entry | {"caption": captions[number % len(captions)]})
            for number, entry in enumerate(entries)
        ]
        annotations.write_text("\n".join(lines), "utf-8")

    recorder = Recorder()
    write("somebody", "somebody over there again", "a woman in a red coat")
    train(config, tmp_path / "run", recorder)
    assert [note.partition(":")[0] for note in recorder.notes] == [
        "shorten_captions leaves most captions as they are",
        "wrong_captions leaves most captions as they are",
    ]
    write("somebody over there again")
    for option, changes in (
        ("shorten", {"wrong_captions": False}),
        ("wrong", {"shorten_captions": 0.0}),
    ):
        with pytest.raises(InputError, match=f"{option}_captions needs captions"):
            train(replace(config, **changes), tmp_path / "other", Recorder())
    assert not (tmp_path / "other").exists()


def test_a_run_starts_from_another(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_file(run / "adapter.safetensors")
    # Another seed draws other values, and a rate so small leaves them nearly where they are.
    config = toy_config(tmp_path, monkeypatch, lr=1e-9, seed=2, init_from=str(run), epochs=1)
    train(config, tmp_path / "more", recorder := Recorder())
    assert f"starting from the trained tensors of {run}" in recorder.notes
    after = load_file(tmp_path / "more" / "adapter.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0)
    fresh = build_components(replace(config, init_from=None)).model.trained_state()
    assert any(float((tensor - before[name]).abs().max()) > 0.01 for name, tensor in fresh.items())
    card = (tmp_path / "more/README.md").read_text("utf-8")
    assert "trained tensors started from those of run `run`" in card
    assert str(run) not in card


def test_a_run_that_began_elsewhere_resumes_without_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    class Stops(Recorder):
        def evaluated(self, *_: object) -> None:
            raise StoppedError

    config = toy_config(tmp_path, monkeypatch, init_from=str(run))
    train(config, tmp_path / "whole", whole := Recorder())
    with pytest.raises(StoppedError):
        train(config, tmp_path / "more", Stops())
    moved = run.rename(tmp_path / "moved")
    train(config, tmp_path / "more", rest := Recorder(), resume=True)
    assert rest.losses == whole.losses[-len(rest.losses) :]
    for path in (tmp_path / "more/last").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="expected a run folder"):
        train(config, tmp_path / "more", Recorder(), resume=True)
    train(
        replace(config, init_from=str(moved)), tmp_path / "more", again := Recorder(), resume=True
    )
    assert again.losses == whole.losses


def test_a_run_of_another_kind_is_no_start(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {name: tensor + 0.01 for name, tensor in toy_clip().state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    wider = UPPersonConfig(prefix_length=2, lora_rank=8, adapter_reduction=4)
    fewer = UPPersonConfig(prefix_length=2, lora_rank=4, adapter_reduction=0)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"model": wider}, r"same trained parts: .*run has model\.lora_rank 4 \(here 8\): pass"),
        ({"model": fewer}, r"has model\.adapter_reduction 4 \(here 0\): pass"),
        ({"pretrained": "other.safetensors"}, r"the same base: .*run was trained on 'toy' with"),
        ({"init_from": "nowhere"}, r"expected a run folder with config\.yaml and adapter"),
    ]
    for change, message in changes:
        config = toy_config(tmp_path, monkeypatch, **({"init_from": str(run)} | change))
        with pytest.raises(InputError, match=message) as error:
            train(config, tmp_path / "more", Recorder())
        assert "\n" not in str(error.value)
    (run / "adapter.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be read"):
        train(toy_config(tmp_path, monkeypatch, init_from=str(run)), tmp_path / "more", Recorder())
    assert not (tmp_path / "more").exists()


def test_places_may_be_named_otherwise_in_the_run_that_one_starts_from(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = UPPersonConfig(prefix_length=2, lora_rank=4, adapter_reduction=4, lora_blocks="1-2")
    config = toy_config(tmp_path, monkeypatch, model=parts, init_from=str(run), epochs=1)
    train(config, tmp_path / "more", recorder := Recorder())
    assert recorder.losses


def test_what_is_missing_ends_a_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, monkeypatch)
    test = read_dataset("jsonl", Path(config.root))["test"][0].image
    test.unlink()
    with pytest.raises(InputError, match=f"images are missing: a file {re.escape(str(test))}: put"):
        train(config, tmp_path / "run", Recorder())
    folder = test.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"missing: {re.escape(str(test.parent))} \(10 images\)"):
        train(config, tmp_path / "run", Recorder())
    assert not (tmp_path / "run").exists()
    folder.rename(test.parent)


def test_pictures_that_end_early_are_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, monkeypatch, epochs=1)
    for split in ("train", "test"):
        image = read_dataset("jsonl", Path(config.root))[split][0].image
        image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(InputError, match="truncated"):
        train(config, tmp_path / "strict", Recorder())
    for workers in (0, 1):
        lenient = replace(config, load_truncated=True, workers=workers)
        train(lenient, tmp_path / f"run_{workers}", recorder := Recorder())
        assert recorder.metrics[-1][1] == "test"
    with pytest.raises(InputError, match="truncated"):
        train(config, tmp_path / "strict", Recorder(), resume=True)


def test_a_run_is_not_overwritten(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _, _ = load_run(run)
    before = (run / "results.json").read_bytes()
    with pytest.raises(InputError, match="not empty"):
        train(config, run, Recorder())
    assert (run / "results.json").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upperson import losses

    config = toy_config(tmp_path, monkeypatch, epochs=3)
    real, calls = losses.sdm_loss, []

    def diverging(*args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) > 5 else 1.0)

    monkeypatch.setattr(losses, "sdm_loss", diverging)
    with pytest.raises(InputError, match="loss became nan in epoch"):
        train(config, tmp_path / "run", Recorder())
    assert load_run(tmp_path / "run")[2].training is False


def test_another_base_is_refused(run: Path) -> None:
    save_file(toy_clip(seed=9).state_dict(), run.parent / "toy.safetensors")
    with pytest.raises(IntegrityError, match="trained on base 'toy' with weights"):
        load_run(run)


def test_damaged_run_files_are_refused(run: Path) -> None:
    adapter = run / "adapter.safetensors"
    content = adapter.read_bytes()
    adapter.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_run(run)
    adapter.write_bytes(content)
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata()
    state = load_file(adapter)
    save_file(state, adapter, metadata | {"base": "[" * 100_000})
    with pytest.raises(InputError, match="cannot be read: base is not valid JSON"):
        load_run(run)
    save_file({name: value * torch.nan for name, value in state.items()}, adapter, metadata)
    with pytest.raises(InputError, match=f"{adapter}: .* has NaN or infinite values"):
        load_run(run)
    adapter.write_bytes(content)
    config = run / "config.yaml"
    config.write_text(config.read_text("utf-8").replace("lora_rank: 4", "lora_rank: 3"), "utf-8")
    with pytest.raises(InputError, match=r"tensors differ, first '"):
        load_run(run)


def test_weights_of_another_shape_or_format_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=r"does not hold a 'upperson-small': \d+ of \d+ tensors"):
        load_base(SMALL, config.pretrained)
    (tmp_path / "text.safetensors").write_text("no weights", "utf-8")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_base("toy", str(tmp_path / "text.safetensors"))
    with pytest.raises(InputError, match="found no such file"):
        load_base("toy", str(tmp_path / "gone.safetensors"))
    with pytest.raises(UsageError, match="needs weights"):
        load_base("toy", None)
    with pytest.raises(UsageError, match="neither a file nor a tag"):
        load_base("ViT-B-16", "no-such-tag")
    with pytest.raises(UsageError, match="unknown"):
        build_clip("ViT-Z-99")


def test_a_pickle_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_config(tmp_path, monkeypatch)
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (trap,))

    torch.save({"state_dict": Trap()}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_base("toy", str(tmp_path / "bad.pt"))
    assert not trap.exists()


def test_every_setting_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(tmp_path, monkeypatch, epochs=3, eval_every=2, lr=1e-4)
    first = {}
    short = {"epochs": 1}
    for name, changes in {
        "plain": {},
        "augment": short | {"augment": True},
        "masks": short | {"mask_captions": True},
        "loss": short | {"loss": "itc"},
    }.items():
        recorder = Recorder()
        train(replace(config, **changes), tmp_path / name, recorder)
        first[name] = recorder.losses[0]
    assert len(set(first.values())) == 4
    rows = list(csv.DictReader((tmp_path / "plain/metrics.csv").read_text("utf-8").splitlines()))
    assert [bool(row["val R@1"]) for row in rows] == [False, True, True]


def test_noisy_pairs_cannot_be_left_out_in_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, monkeypatch, epochs=2, warmup_epochs=2, leave_out_noisy=True)
    message = r"none of the epochs \(2\): .* warmup_epochs=1,  or switch leave_out"
    with pytest.raises(UsageError, match=message):
        build_components(config)
    build_components(replace(config, warmup_epochs=1))


def test_set_up_keeps_frozen_matrices_in_half_and_recomputes_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, monkeypatch)
    plain = build_components(config).model
    lean = build_components(replace(config, precision="bf16", checkpoint_activations=True)).model
    assert (plain.checkpoint_activations, lean.checkpoint_activations) == (False, True)
    assert plain.image.stem.weight.dtype == torch.float32
    assert lean.image.stem.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in lean.trained_state().values()} == {torch.float32}


def test_of_equal_epochs_the_first_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(tmp_path, monkeypatch, epochs=3, lr=1e-12)
    result = train(config, tmp_path / "run", Recorder())
    assert result.best_epoch == 1


def test_more_processes_than_pairs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upperson import train as train_module

    config = toy_config(tmp_path, monkeypatch, batch_size=2)
    accelerator = start_accelerator("fp32", "cpu")
    monkeypatch.setattr(type(accelerator), "num_processes", property(lambda self: 3))
    monkeypatch.setattr(train_module, "start_accelerator", lambda precision, device: accelerator)
    with pytest.raises(UsageError, match=r"batch_size \(2\) must be at least the number of proc"):
        train(config, tmp_path / "run", Recorder())


def test_the_slope_of_quick_gelu_rides_along_in_the_frozen_matrices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, monkeypatch)
    trained = build_components(config).model.eval()
    base = load_base("toy", config.pretrained)
    plain = UPPerson(base.clip, config.model, trained.image_size, base.statistics).eval()
    plain.load_state_dict(trained.trained_state(), strict=False)
    gelus = [type(block.mlp.gelu) for model in (plain, trained) for block in model.image.blocks]
    assert set(gelus) == {QuickGELU, torch.nn.SiLU}
    images = torch.randn(2, 3, *trained.image_size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[49406, 5, 49407]] * 2)
    for found, expected in zip(trained(images, ids), plain(images, ids), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_run_says_how_long_it_should_take_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AtFirst(Recorder):
        def step(self, step: Step) -> None:
            assert len(self.expected) == 1
            super().step(step)

    recorder = AtFirst()
    train(toy_config(tmp_path, monkeypatch, accumulate=2), tmp_path / "run", recorder)
    ((step_s, steps),) = recorder.expected
    assert 0 < step_s < 60
    assert steps == len(recorder.losses) == 6


def test_bf16_becomes_fp32_where_the_processor_has_no_instructions_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "processor", lambda: Processor("old", frozenset({"avx2"})))
    config = toy_config(tmp_path, monkeypatch, precision="bf16", epochs=1)
    train(config, tmp_path / "run", recorder := Recorder())
    assert recorder.notes == [components.NO_BF16]
    assert load_run(tmp_path / "run").config == replace(config, precision="fp32")
    monkeypatch.setattr(components, "processor", lambda: Processor("new", frozenset({"amx_bf16"})))
    assert components.usable_precision("bf16", torch.device("cpu")) == "bf16"
    assert components.usable_precision("bf16", torch.device("cuda")) == "bf16"


# The compiler looks at it itself, and hides the warning unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_train_as_others_on_captions_of_a_few_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.Size] = []

    def note_and_run(graph: Any, inputs: Any) -> Any:
        compiled.append(inputs[0].shape)
        return graph.forward

    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: real(self, backend=note_and_run, **options),
    )
    config = toy_config(tmp_path, monkeypatch, epochs=1)
    train(config, tmp_path / "plain", plain := Recorder())
    assert not compiled
    train(replace(config, compile=True), tmp_path / "compiled", ours := Recorder())
    assert compiled
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
