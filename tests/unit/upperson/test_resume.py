"""A run that stops anywhere goes on as if it had not."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from tests.helpers.refused import refused
from tests.helpers.toy_bases import SIZE, know_toy_towers, write_base
from tests.helpers.toy_run import Recorder, StoppedError, toy_config
from upperson import run_writer
from upperson.checkpoint import Checkpointer, RunState, identity_of
from upperson.config import read_config
from upperson.data.records import read_dataset
from upperson.train import train
from upperson_rt.errors import InputError, IntegrityError

pytestmark = pytest.mark.timeout(120)

# 6 people x 2 views x 2 captions in batches of 8 are 3 steps an epoch.
STEPS = 3
EPOCHS = 2


def make_config(folder, monkeypatch):
    return toy_config(
        folder, monkeypatch, epochs=EPOCHS, augment=True, mask_captions=True, loss="sdm+id",
        leave_out_noisy=True, checkpoint_every=1,
    )  # fmt: skip


def stop(config, run, steps, *, resume=False):
    """Train until so many steps are done."""
    with pytest.raises(StoppedError):
        train(config, run, Recorder(steps), resume=resume)


@pytest.fixture
def config(tmp_path, monkeypatch):
    return make_config(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The run folder of a run that was never stopped, on people and a base of its own."""
    folder, recorder = tmp_path_factory.mktemp("whole"), Recorder()
    with pytest.MonkeyPatch.context() as monkeypatch:
        train(make_config(folder, monkeypatch), folder / "run", recorder)
    assert len(recorder.losses) == STEPS * EPOCHS
    return folder / "run"


def result_files(run):
    return {name: (run / name).read_bytes() for name in ("metrics.csv", "adapter.safetensors")}


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """The run folder of a run that stopped again and again, within epochs and at their ends."""
    folder = tmp_path_factory.mktemp("stopped")
    run = folder / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        # TensorBoard reads files by their names: of one second, number 10 before number 9.
        counter = event_file_writer.AtomicCounter(1000)
        monkeypatch.setattr(event_file_writer, "_global_uid", counter)
        config = make_config(folder, monkeypatch)
        stop(config, run, 1)
        assert not (run / "last").exists(), "it starts from the beginning"
        for number in range(2):
            stop(config, run, 3, resume=True)
            newest = max((run / "last").iterdir())
            assert newest.name == f"step_{2 * (number + 1):08}.safetensors"
        train(read_config(run / "config.yaml"), run, Recorder(), resume=True)
    return run


def test_a_stopped_run_ends_bit_for_bit_as_a_whole_one(stopped_run, whole_run):
    assert result_files(stopped_run) == result_files(whole_run)


def test_so_does_one_over_a_base_with_rotary_embeddings(tmp_path, monkeypatch):
    know_toy_towers(monkeypatch)
    base, weights = write_base(tmp_path / "base", "pecore")
    config = toy_config(
        tmp_path, monkeypatch, base=str(base), pretrained=str(weights), height_px=SIZE[0],
        width_px=SIZE[1], checkpoint_activations=True, checkpoint_every=1,
    )  # fmt: skip
    train(config, tmp_path / "whole", recorder := Recorder())
    assert len(set(recorder.losses)) == STEPS * EPOCHS
    stop(config, tmp_path / "run", 2)
    train(read_config(tmp_path / "run/config.yaml"), tmp_path / "run", Recorder(), resume=True)
    assert result_files(tmp_path / "run") == result_files(tmp_path / "whole")


def test_tensorboard_shows_every_step_once(stopped_run):
    events = EventAccumulator(str(stopped_run)).Reload()
    assert [event.step for event in events.Scalars("step/loss")] == [*range(1, STEPS * EPOCHS + 1)]
    assert [event.step for event in events.Scalars("epoch/loss")] == [3, 6]


def test_a_finished_run_resumed_stays_as_it_is(config, whole_run, tmp_path, monkeypatch):
    def load(checkpointer, load=Checkpointer.load):
        state, damaged = load(checkpointer)
        return replace(state, seconds=1000.0), damaged

    monkeypatch.setattr(Checkpointer, "load", load)
    run = shutil.copytree(whole_run, tmp_path / "run")
    result = train(config, run, recorder := Recorder(), resume=True)
    assert result.seconds > 1000, "of earlier processes, too"
    assert recorder.losses == []
    assert recorder.notes == ["all epochs are done: only measuring the saved run"]
    assert result_files(run) == result_files(whole_run)


def test_what_killed_processes_were_writing_stops_no_run_and_goes(config, whole_run, tmp_path):
    run = tmp_path / "run"
    half, mine = run / ".config.yaml.a1b2c3d4", run / ".gitignore.original"
    run.mkdir()
    half.write_bytes(b"half")
    stop(config, run, 2)
    assert not half.exists()
    left = [run / "last/.step_00000001.safetensors.zzzzzzzz", run / ".adapter.safetensors.___0___1"]
    for path in (*left, mine):
        path.write_bytes(b"half")
    train(config, run, Recorder(), resume=True)
    assert result_files(run) == result_files(whole_run)
    assert [path.exists() for path in (*left, mine)] == [False, False, True]


def test_events_that_cannot_be_written_are_named(config, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    config = replace(config, epochs=1, warmup_epochs=0, leave_out_noisy=False)
    for name in ("close", "add_scalar", "__init__"):
        monkeypatch.setattr(run_writer.SummaryWriter, name, full)
        with refused("events_not_written", InputError, path=tmp_path / name / "run"):
            train(config, tmp_path / name / "run", Recorder())


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(config, whole_run, tmp_path):
    stop(config, tmp_path / "run", STEPS + 2)
    before, newest = sorted((tmp_path / "run/last").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1000])
    recorder = Recorder()
    train(config, tmp_path / "run", recorder, resume=True)
    assert f"{newest} is damaged" in recorder.notes[0]
    assert before.name == "step_00000003.safetensors"
    assert len(recorder.losses) == STEPS * EPOCHS - 3
    assert result_files(tmp_path / "run") == result_files(whole_run)


def test_changed_data_and_configuration_are_refused(config, tmp_path, monkeypatch):
    def without_temperature(*facts):
        return {name: value for name, value in identity_of(*facts).items() if name != "temperature"}

    run = tmp_path / "run"
    with monkeypatch.context() as before:  # There was no such setting when the run began.
        before.setattr("upperson.train.identity_of", without_temperature)
        stop(config, run, 2)
    for fact, old, new in (
        ("temperature", 0.02, 0.01), ("lr", 0.001, 0.002), ("epochs", EPOCHS, EPOCHS + 1)
    ):  # fmt: skip
        with refused("run_changed", IntegrityError, fact=fact, before=str(old), now=str(new)):
            train(replace(config, **{fact: new}), run, Recorder(), resume=True)
    parts = replace(config.model, lora_rank=2)
    with refused("run_changed", IntegrityError, fact="model"):
        train(replace(config, model=parts), run, Recorder(), resume=True)
    annotations = Path(config.root) / "annotations.jsonl"
    text = annotations.read_text("utf-8")
    annotations.write_text("".join(text.splitlines(keepends=True)[1:]), "utf-8")
    with refused("run_changed", IntegrityError, fact="data"):
        train(config, run, Recorder(), resume=True)
    annotations.write_text(text, "utf-8")
    stop(config, run, 1, resume=True)  # A setting of later has its default.


def checkpointer(folder, scaler=None):
    """A trained layer with a checkpointer of its own."""
    layer = torch.nn.Linear(2, 2)
    return layer, Checkpointer(folder, layer, torch.optim.Adam(layer.parameters()), scaler, {})


def test_only_the_newest_two_checkpoints_stay(tmp_path):
    layer, written = checkpointer(tmp_path)
    for step in (1, 2, 10):
        with torch.no_grad():
            layer.bias.fill_(step)
        written.save(RunState(step=step, loss_sum=0.1 + 0.2, best={"x": torch.ones(1)}), step)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000002.safetensors", "step_00000010.safetensors"]
    fresh, read = checkpointer(tmp_path)
    found, problems = read.load()
    assert (found.step, found.loss_sum, found.best) == (10, 0.1 + 0.2, {"x": torch.ones(1)})
    assert fresh.bias.tolist() == [10, 10]
    assert torch.equal(fresh.weight, layer.weight)
    assert problems == []


def test_a_changed_number_of_tensors_or_state_and_a_state_that_is_none_are_damage(tmp_path):
    checkpointer(tmp_path)[1].save(RunState(epoch=7), 1)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    before, after = (rf"\"epoch\": {epoch}".encode() for epoch in (7, 8))
    assert content.count(before) == 1
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content.replace(before, after)):
        file.write_bytes(damaged)
        with refused("checkpoints_damaged", IntegrityError, path=tmp_path) as found:
            checkpointer(tmp_path)[1].load()
        assert "hash" in found.value.fields["problems"][0]
    for state in ("", "[]", "[" * 100_000):
        digest = hashlib.sha256(state.encode()).hexdigest()
        file.write_bytes(save({}, metadata={"state": state, "sha256": digest}))
        with refused("checkpoints_damaged", IntegrityError):
            checkpointer(tmp_path)[1].load()


def test_a_full_disk_leaves_the_last_checkpoint(config, whole_run, tmp_path, monkeypatch):
    from upperson_rt import files

    real, left = files.os.fsync, [*range(8)]

    def full(handle):
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device"):
        train(config, run, Recorder())
    monkeypatch.setattr(files.os, "fsync", real)
    assert not list(run.rglob(".*"))
    recorder = Recorder()
    train(config, run, recorder, resume=True)
    notes = [note for note in recorder.notes if "left out as noisy" not in note]
    assert [note.split(" at ")[0] for note in notes] == ["resuming"]
    assert result_files(run) == result_files(whole_run)


def test_an_image_that_cannot_be_decoded_has_a_place_and_once_repaired_training_goes_on(
    config, whole_run, tmp_path
):
    class Breaks(Recorder):
        def step(self, step):
            super().step(step)
            if len(self.steps) == STEPS + 1:
                for image in images.rglob("*.jpg"):
                    image.write_bytes(b"broken")

    run, images = tmp_path / "run", Path(config.root) / "images"
    shutil.copytree(images, tmp_path / "whole")
    config = replace(config, checkpoint_every=100)
    with refused("training_data_unreadable", InputError, epoch=2, step=2):
        train(config, run, Breaks())
    shutil.copytree(tmp_path / "whole", images, dirs_exist_ok=True)
    train(config, run, rest := Recorder(), resume=True)
    assert len(rest.losses) == STEPS * EPOCHS - (STEPS + 1), "no step is lost"
    assert result_files(run) == result_files(whole_run)


def test_one_process_writes_a_run_at_a_time(config, tmp_path):
    class Second(Recorder):
        def step(self, step):
            with refused("run_locked", InputError):
                train(config, tmp_path / "run", Recorder(), resume=True)
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", Second())


def test_a_broken_picture_of_the_val_split_costs_no_step(config, whole_run, tmp_path):
    image = read_dataset("jsonl", Path(config.root))["val"][0].image
    content = image.read_bytes()
    image.write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot read image"):
        train(config, tmp_path / "run", Recorder())
    image.write_bytes(content)
    recorder = Recorder()
    train(config, tmp_path / "run", recorder, resume=True)
    assert len(recorder.losses) == STEPS * (EPOCHS - 1)
    assert result_files(tmp_path / "run") == result_files(whole_run)


def test_a_diverged_state_is_not_kept(config, tmp_path):
    with refused("loss_not_finite", InputError):
        train(replace(config, lr=1e20, warmup_epochs=0), tmp_path / "run", Recorder())
    kept = load_file(max((tmp_path / "run/last").iterdir()))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())


def test_the_scaler_of_fp16_is_part_of_a_checkpoint(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    layer, written = checkpointer(tmp_path, scaler)
    scaler.scale(layer(torch.ones(1, 2)).sum()).backward()
    scaler.update(64.0)
    written.save(RunState(), 1)
    fresh = torch.amp.GradScaler("cpu", init_scale=512.0)
    other, read = checkpointer(tmp_path, fresh)
    read.load()
    assert fresh.state_dict()["scale"] == 64.0
    torch.testing.assert_close(other.weight, layer.weight, atol=0, rtol=0)
