"""The first losses of a toy run against a committed curve: training's numbers do not drift.

Write it anew after a wanted change, and say in the commit why:  python -m tests.golden.test_losses
"""

import tempfile
from pathlib import Path

import pytest

from tests.helpers.toy_run import Recorder, toy_config
from upperson.train import train

CURVE = Path(__file__).with_name("toy_losses.txt")


def toy_losses(folder, monkeypatch):
    recorder = Recorder()
    train(toy_config(folder, monkeypatch, epochs=3, lr=1e-3), folder / "run", recorder)
    return recorder.losses


@pytest.mark.timeout(120)
def test_losses_follow_the_golden_curve(tmp_path, monkeypatch):
    golden = [float(line.split()[1]) for line in CURVE.read_text("utf-8").splitlines()]
    # Pictures are JPEG-decoded and sums are ordered by the CPU's kernels: equal to a few digits.
    assert toy_losses(tmp_path, monkeypatch) == pytest.approx(golden, rel=2e-3)
    assert len(set(golden)) == len(golden) >= 9


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        found = toy_losses(Path(name), patch)
    CURVE.write_text("".join(f"{i} {loss:.6f}\n" for i, loss in enumerate(found)), "utf-8")
