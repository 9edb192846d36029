"""A toy run on a GPU in every precision: it learns, as on the CPU, and goes on where it stopped."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.toy_run import Recorder, StoppedError, toy_config
from upperson.train import train

# 6 people x 2 views x 2 captions in batches of 12 are 2 steps an epoch.
EPOCHS, STEPS = 8, 16
STOPPED_AFTER = 7  # In the middle of an epoch.


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield toy_config(
            tmp_path_factory.mktemp("toy"), monkeypatch, epochs=EPOCHS, warmup_epochs=0,
            batch_size=12, lr=1e-2, loss="sdm+id", checkpoint_every=1, eval_every=EPOCHS,
        )  # fmt: skip


@pytest.fixture(scope="module")
def on_cpu(config, tmp_path_factory):
    """The losses of the run in float32 on the CPU."""
    recorder = Recorder()
    train(config, tmp_path_factory.mktemp("cpu") / "run", recorder, device="cpu")
    return recorder.losses


class Trained:
    def __init__(self, config, folder, device):
        self.config, self.run, self.device = config, folder / "run", device
        recorder = Recorder()
        train(config, self.run, recorder, device=device)
        self.losses = recorder.losses


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16"])
def trained(config, train_device, request, tmp_path_factory):
    if (request.param, train_device) == ("fp16", "cpu"):
        pytest.skip("a CPU does not train in fp16")
    folder = tmp_path_factory.mktemp(request.param)
    return Trained(replace(config, precision=request.param), folder, train_device)


def test_the_loss_falls_as_on_the_cpu(trained, on_cpu):
    print(f"{trained.config.precision}: {trained.losses[0]:.4f} to {trained.losses[-1]:.4f}")
    state = load_file(trained.run / "adapter.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    assert len(trained.losses) == len(on_cpu) == STEPS
    assert sum(trained.losses[-2:]) < 0.9 * sum(trained.losses[:2])
    # Rounding grows from step to step; fp16 may leave out some until its loss has the right scale.
    steps, tolerance = {"fp32": (STEPS, 1e-3), "bf16": (3, 0.01), "fp16": (1, 0.05)}[
        trained.config.precision
    ]
    assert trained.losses[:steps] == pytest.approx(on_cpu[:steps], rel=tolerance)


def test_a_stopped_run_goes_on_as_if_it_had_not(trained, tmp_path):
    stopped, rest = Recorder(STOPPED_AFTER), Recorder()
    with pytest.raises(StoppedError):
        train(trained.config, tmp_path / "run", stopped, device=trained.device)
    train(trained.config, tmp_path / "run", rest, device=trained.device, resume=True)
    # The last step was taken and not saved, so it is taken again.
    losses = stopped.losses[: STEPS - len(rest.losses)] + rest.losses
    assert len(rest.losses) == STEPS - STOPPED_AFTER + 1
    assert losses == pytest.approx(trained.losses, rel=1e-3)
    expected = load_file(trained.run / "adapter.safetensors")
    for name, tensor in load_file(tmp_path / "run/adapter.safetensors").items():
        # Kernels may differ in the last digits, and Adam enlarges that.
        torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=1e-2)
