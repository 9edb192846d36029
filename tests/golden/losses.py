"""Compute the toy run's losses; as a program, write them as the golden curve."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.helpers.toy_run import Recorder, toy_config
from upperson.train import train

CURVE = Path(__file__).with_name("toy_losses.txt")


def toy_losses(folder, monkeypatch):
    """Train three epochs and return the loss of every step."""
    recorder = Recorder()
    train(toy_config(folder, monkeypatch, epochs=3, lr=1e-3), folder / "run", recorder)
    return recorder.losses


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        losses = toy_losses(Path(name), patch)
    CURVE.write_text("".join(f"{i} {loss:.6f}\n" for i, loss in enumerate(losses)), "utf-8")
