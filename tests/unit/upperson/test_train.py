"""Training a toy, its run folder, and reading it back."""

import csv
import json
import shutil
from dataclasses import replace
from functools import partialmethod
from io import BytesIO
from itertools import chain, repeat
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from tests.helpers.refused import refused
from tests.helpers.toy_clip import toy_clip
from tests.helpers.toy_run import Recorder, StoppedError, know_toy, toy_config
from upperson import components, losses
from upperson import train as train_module
from upperson.components import build_components, start_accelerator
from upperson.config import read_config
from upperson.data.records import read_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.evaluate import evaluate
from upperson.model.base import load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import UPPersonConfig
from upperson.run import load_run
from upperson.run_writer import draw_curves
from upperson.train import train
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.machine import Processor

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A toy base, people and a run of two epochs, and what was observed; not to be changed."""
    folder, recorder = tmp_path_factory.mktemp("trained"), Recorder()
    with pytest.MonkeyPatch.context() as monkeypatch:
        train(toy_config(folder, monkeypatch), folder / "run", recorder)
    return folder, recorder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of the run, with a base and people of its own."""
    know_toy(monkeypatch)
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text("utf-8").replace(str(trained[0]), str(tmp_path)), "utf-8")
    return tmp_path / "run"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a configuration over a toy base and people."""
    return lambda **changes: toy_config(tmp_path, monkeypatch, **changes)


def records_of(config, split="test"):
    return read_dataset("jsonl", Path(config.root))[split]


def metrics_of(run):
    """What a run measures on its test split, and what it has measured."""
    config, _, model = load_run(run)
    found = evaluate(model, clip_tokenizer(), records_of(config)).text_to_image
    return found.as_dict(), results_of(run)["test"]


def rows_of(run):
    return list(csv.DictReader((run / "metrics.csv").read_text("utf-8").splitlines()))


def results_of(run):
    return json.loads((run / "results.json").read_text("utf-8"))


def test_a_run_folder_holds_its_results_and_measures_what_it_reports(run, trained):
    names = {path.name.partition(".tfevents")[0] for path in run.iterdir()} - {".gitignore"}
    assert names == {
        "config.yaml", "adapter.safetensors", "metrics.csv", "results.json", "curves.png", "last",
        "README.md", "events.out",
    }  # fmt: skip
    rows, results = rows_of(run), results_of(run)
    curves = draw_curves([{name: float(value) for name, value in row.items()} for row in rows])
    with Image.open(BytesIO(curves)) as opened:
        assert opened.format == "PNG"
    assert [row["epoch"] for row in rows] == ["1", "2"]
    means = [sum(trained[1].losses[first : first + 3]) / 3 for first in (0, 3)]
    assert [float(row["loss"]) for row in rows] == pytest.approx(means)
    assert results["trained_parameters"] < results["parameters"]
    best = max(rows, key=lambda row: float(row["val R@1"]))
    assert results["val"]["R@1"] == float(best["val R@1"])
    found, measured = metrics_of(run)
    assert found == pytest.approx(measured)
    config, base, _ = load_run(run)
    assert base.sha256 == load_base("toy", config.pretrained).sha256, "no frozen weight changed"
    state = load_file(run / "adapter.safetensors")
    assert any(float(tensor.abs().max()) > 0 for name, tensor in state.items() if "up" in name)
    before = (run / "results.json").read_bytes()
    with refused("run_not_empty", InputError, path=run):
        train(config, run, Recorder())
    assert (run / "results.json").read_bytes() == before


def test_a_run_without_val_and_test_loads_its_base_once(make, tmp_path, monkeypatch):
    config = make(epochs=1)
    file = Path(config.root) / "annotations.jsonl"
    lines = file.read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if json.loads(line)["split"] == "train"))
    load = Mock(wraps=load_base)
    for place in ("components", "run", "trainer"):
        monkeypatch.setattr(f"upperson.{place}.load_base", load)
    result = train(config, tmp_path / "run", Recorder())
    assert (result.val, result.test) == (None, None)
    assert load.call_count == 1
    assert load_run(tmp_path / "run").config.epochs == 1


def test_the_loss_falls_and_the_time_is_expected(make, tmp_path):
    train(
        make(epochs=5, lr=3e-3, accumulate=2, eval_every=5), tmp_path / "run", found := Recorder()
    )
    steps = len(found.losses) // 5
    assert sum(found.losses[-steps:]) < sum(found.losses[:steps])
    ((step_s, expected),) = found.expected
    assert 0 < step_s < 60
    assert expected == len(found.losses)


def test_what_is_kept_is_a_share_and_training_goes_on_with_all_of_it(make, tmp_path):
    config = make(epochs=1, warmup_epochs=0, lr=3e-3)
    whole, half = Recorder(), Recorder()
    train(config, tmp_path / "whole", whole)
    train(replace(config, kept_share=0.5), tmp_path / "half", half)
    assert whole.losses == half.losses
    kept = load_file(tmp_path / "half/adapter.safetensors")
    for name, tensor in load_file(tmp_path / "whole/adapter.safetensors").items():
        scaled = name.endswith(".scale") and "prefix" not in name
        assert torch.equal(kept[name], tensor / 2 if scaled else tensor)
    found, measured = metrics_of(tmp_path / "half")
    assert found == pytest.approx(measured)
    # The epoch is chosen by what is kept of it: what is saved has the R@1 that it was chosen for.
    (row,), (other,) = rows_of(tmp_path / "half"), rows_of(tmp_path / "whole")
    val = results_of(tmp_path / "half")["val"]
    assert {name: float(row[f"val {name}"]) for name in val} == pytest.approx(val)
    assert any(row[f"val {name}"] != other[f"val {name}"] for name in val)


def test_captions_that_are_cut_or_cannot_be_reworded_are_noted_or_refused(make, tmp_path):
    config = make(epochs=1, warmup_epochs=0, shorten_captions=0.5, wrong_captions=True)
    annotations = Path(config.root) / "annotations.jsonl"
    entries = [json.loads(line) for line in annotations.read_text("utf-8").splitlines()]

    def write(*captions):
        for number, entry in enumerate(entries):
            entry["caption"] = captions[number % len(captions)]
        annotations.write_text("\n".join(map(json.dumps, entries)), "utf-8")

    write("somebody " * 100, "somebody over there again", "a woman in a red coat")
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", recorder := Recorder(stop_after=1))
    short, wrong, cut = recorder.notes
    assert short.startswith("shorten_captions leaves most")
    assert wrong.startswith("wrong_captions leaves most")
    assert cut.startswith(f"{-(-len(entries) // 3)} of {len(entries)} captions are longer than 77")
    write("somebody over there again")
    for option, other in (
        ("shorten_captions", "wrong_captions"),
        ("wrong_captions", "shorten_captions"),
    ):
        with refused("captions_not_readable", InputError, option=option):
            train(replace(config, **{other: False}), tmp_path / "other", Recorder())
    assert not (tmp_path / "other").exists()


def test_a_run_starts_from_another(run, make, tmp_path):
    before = load_file(run / "adapter.safetensors")
    # Another seed draws other values, and a rate so small leaves them nearly where they are. The
    # blocks of LoRA may be named otherwise.
    parts = UPPersonConfig(prefix_length=2, lora_rank=4, adapter_reduction=4, lora_blocks="1-2")
    config = make(lr=1e-9, seed=2, init_from=str(run), epochs=1, model=parts)
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


def test_a_run_that_began_elsewhere_resumes_without_it(run, make, tmp_path):
    config = make(init_from=str(run))
    train(config, tmp_path / "whole", whole := Recorder())
    with pytest.raises(StoppedError):
        train(config, tmp_path / "more", Recorder(stop_after=4))
    moved = run.rename(tmp_path / "moved")
    train(config, tmp_path / "more", rest := Recorder(), resume=True)
    assert rest.losses == whole.losses[-len(rest.losses) :]
    for path in (tmp_path / "more/last").iterdir():
        path.unlink()
    with refused("not_a_run", InputError, path=run):
        train(config, tmp_path / "more", Recorder(), resume=True)
    config = replace(config, init_from=str(moved))
    again = Recorder(stop_after=2)
    with pytest.raises(StoppedError):
        train(config, tmp_path / "more", again, resume=True)
    assert again.losses == whole.losses[:2]


def test_a_run_of_another_kind_is_no_start(run, make, tmp_path, monkeypatch):
    other = {name: tensor + 0.01 for name, tensor in toy_clip().state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    wider = UPPersonConfig(prefix_length=2, lora_rank=8, adapter_reduction=0)
    differing = ["model.lora_rank 4 (here 8)", "model.adapter_reduction 4 (here 0)"]
    for change, code, fields in (
        ({"model": wider}, "init_from_other_parts", {"differing": differing}),
        ({"pretrained": "other.safetensors"}, "init_from_other_base", {"path": run}),
        ({"init_from": "nowhere"}, "not_a_run", {"path": Path("nowhere")}),
    ):
        with refused(code, InputError, **fields) as error:
            train(make(**({"init_from": str(run)} | change)), tmp_path / "more", Recorder())
        assert "\n" not in str(error.value)
    (run / "adapter.safetensors").write_bytes(b"broken")
    with refused("adapter_unreadable", InputError):
        train(make(init_from=str(run)), tmp_path / "more", Recorder())
    assert not (tmp_path / "more").exists()


def test_what_is_missing_ends_a_run_before_it_begins(make, tmp_path):
    config = make()
    image = records_of(config)[0].image
    image.unlink()
    with refused("images_missing", InputError, files=[image], folders={}):
        train(config, tmp_path / "run", Recorder())
    folder = image.parent.rename(tmp_path / "elsewhere")
    with refused("images_missing", InputError, folders={image.parent: 10}):
        train(config, tmp_path / "run", Recorder())
    assert not (tmp_path / "run").exists()
    folder.rename(image.parent)


def test_pictures_that_end_early_are_an_option(make, tmp_path):
    config = make(epochs=1)
    for split in ("train", "test"):
        image = records_of(config, split)[0].image
        image.write_bytes(image.read_bytes()[:-200])
    for workers in (0, 1):
        lenient = replace(config, load_truncated=True, workers=workers)
        train(lenient, tmp_path / f"run_{workers}", recorder := Recorder())
        assert recorder.metrics[-1][1] == "test"
    with pytest.raises(InputError, match="truncated"):
        train(config, tmp_path / "strict", Recorder())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_adapter(make, tmp_path, monkeypatch):
    config = make(epochs=3)
    real, factors = losses.sdm_loss, chain(repeat(1.0, 5), repeat(torch.nan))
    monkeypatch.setattr(losses, "sdm_loss", lambda *args: real(*args) * next(factors))
    with refused("loss_not_finite", InputError, epoch=2, step=3):
        train(config, tmp_path / "run", Recorder())
    assert load_run(tmp_path / "run")[2].training is False


def test_damaged_run_files_and_another_base_are_refused(run):
    adapter, config = run / "adapter.safetensors", run / "config.yaml"
    content, text = adapter.read_bytes(), config.read_text("utf-8")
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata()
    state = {name: tensor.clone() for name, tensor in load_file(adapter).items()}
    not_finite = {name: value * torch.nan for name, value in state.items()}
    for damaged, code in (
        (content[: len(content) // 2], "adapter_unreadable"),
        (save(state, metadata | {"base": "[" * 100_000}), "adapter_unreadable"),
        (save(not_finite, metadata), "tensor_not_finite"),
    ):
        adapter.write_bytes(damaged)
        with refused(code, InputError):
            load_run(run)
    adapter.write_bytes(content)
    config.write_text(text.replace("lora_rank: 4", "lora_rank: 3"), "utf-8")
    with refused("adapter_does_not_fit", InputError, path=adapter):
        load_run(run)
    config.write_text(text, "utf-8")
    save_file(toy_clip(seed=9).state_dict(), run.parent / "toy.safetensors")
    with refused("base_changed", IntegrityError, path=run):
        load_run(run)


def test_every_setting_reaches_the_run(make, tmp_path):
    config = make(epochs=3, eval_every=2, lr=1e-12)
    result = train(config, tmp_path / "plain", plain := Recorder())
    assert result.best_epoch == 2, "of equal epochs the first is kept"
    assert [bool(row["val R@1"]) for row in rows_of(tmp_path / "plain")] == [False, True, True]
    first = {plain.losses[0]}
    for changes in ({"augment": True}, {"mask_captions": True}, {"loss": "itc"}):
        with pytest.raises(StoppedError):
            train(replace(config, **changes), tmp_path / str(changes), found := Recorder(1))
        first |= {*found.losses}
    assert len(first) == 4


def test_settings_that_contradict_the_data_or_each_other_are_refused(make, tmp_path, monkeypatch):
    noisy = make(epochs=2, warmup_epochs=2, leave_out_noisy=True)
    with refused("noisy_in_warmup", UsageError, epochs=2, warmup_epochs=2):
        build_components(noisy)
    build_components(replace(noisy, warmup_epochs=1))
    config = make(batch_size=2)
    accelerator = start_accelerator("fp32", "cpu")
    monkeypatch.setattr(type(accelerator), "num_processes", 3)
    monkeypatch.setattr(train_module, "start_accelerator", lambda *_: accelerator)
    with refused("batch_size_too_small", UsageError, batch_size=2, processes=3):
        train(config, tmp_path / "run", Recorder())


def test_set_up_keeps_frozen_matrices_in_half_and_folds_quick_gelu_into_them(make):
    config = make()
    plain = build_components(config).model.eval()
    lean = build_components(replace(config, precision="bf16", checkpoint_activations=True)).model
    assert (plain.checkpoint_activations, lean.checkpoint_activations) == (False, True)
    assert plain.image.stem.weight.dtype == torch.float32
    assert lean.image.stem.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in lean.trained_state().values()} == {torch.float32}
    base = load_base("toy", config.pretrained)
    quick = UPPerson(base.clip, config.model, plain.image_size, base.statistics).eval()
    quick.load_state_dict(plain.trained_state(), strict=False)
    gelus = [type(block.mlp.gelu) for model in (quick, plain) for block in model.image.blocks]
    assert set(gelus) == {QuickGELU, torch.nn.SiLU}
    images = torch.randn(2, 3, *plain.image_size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[49406, 5, 49407]] * 2)
    for found, expected in zip(plain(images, ids), quick(images, ids), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_bf16_becomes_fp32_where_the_processor_has_no_instructions_for_it(
    make, tmp_path, monkeypatch
):
    monkeypatch.setattr(components, "processor", lambda: Processor("old", frozenset({"avx2"})))
    config = make(precision="bf16", epochs=1)
    train(config, tmp_path / "run", recorder := Recorder())
    assert recorder.notes == [components.NO_BF16]
    assert read_config(tmp_path / "run/config.yaml") == replace(config, precision="fp32")
    monkeypatch.setattr(components, "processor", lambda: Processor("new", frozenset({"amx_bf16"})))
    for device in ("cpu", "cuda"):
        assert components.usable_precision("bf16", torch.device(device)) == "bf16"


# The compiler looks at it itself, and hides the warning unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_train_as_others_on_captions_of_a_few_lengths(
    make, trained, tmp_path, monkeypatch
):
    compiled = []

    def note_and_run(graph, inputs):
        compiled.append(inputs[0].shape)
        return graph.forward

    with_backend = partialmethod(torch.nn.Module.compile, backend=note_and_run)
    monkeypatch.setattr(torch.nn.Module, "compile", with_backend)
    train(make(epochs=1, compile=True), tmp_path / "compiled", ours := Recorder())
    assert compiled
    assert ours.losses == pytest.approx(trained[1].losses[:3], rel=1e-5)
