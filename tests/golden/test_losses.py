"""The first losses of a toy run against a committed curve: training's numbers do not drift.

Regenerate after a wanted change, and say in the commit why:  python -m tests.golden.losses
"""

import pytest

from tests.golden.losses import CURVE, toy_losses


@pytest.mark.timeout(120)
def test_losses_follow_the_golden_curve(tmp_path, monkeypatch):
    golden = [float(line.split()[1]) for line in CURVE.read_text("utf-8").splitlines()]
    # Pictures are JPEG-decoded and sums are ordered by the CPU's kernels: equal to a few digits.
    assert toy_losses(tmp_path, monkeypatch) == pytest.approx(golden, rel=2e-3)
    assert len(set(golden)) == len(golden) >= 9
